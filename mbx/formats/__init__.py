"""Checkpoint formats: what a folder is, and its tensors as named regions."""
