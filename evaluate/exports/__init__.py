"""Trained SAEs and their features in the forms of other tools."""
