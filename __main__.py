"""`python -m tcsae` is the `tcsae` program."""

from tcsae.shared.cli import main

if __name__ == "__main__":
    main()
