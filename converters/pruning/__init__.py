"""Pruning as index algebra: which layers, heads, channels and experts stay, and what that makes of every tensor."""
