"""`python -m tcsae` is the `tcsae` program."""

from tcsae.shared.commands.group import main

if __name__ == "__main__":
    main()
