"""Doors to Megatron Core: the only modules that import `megatron`, each named for what it gives.

A door imports it, and torch, when it is imported itself; others open one where they need it, inside a function.
What a release calls elsewhere, or builds otherwise, is settled here.
"""
