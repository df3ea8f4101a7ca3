"""The commands as Python functions, SAEs in live models, and what both return."""
