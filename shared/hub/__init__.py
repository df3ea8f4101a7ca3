"""Trained SAEs and stores on the Hugging Face Hub."""
