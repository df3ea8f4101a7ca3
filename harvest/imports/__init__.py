"""Activations that other programs saved, as stores."""
