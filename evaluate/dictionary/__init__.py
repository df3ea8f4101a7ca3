"""Dictionaries: how much the decoders of runs repeat themselves, and each other."""
