"""Transformers' side: how it reads a folder, a layer of a model at a time, and a pass through it."""
