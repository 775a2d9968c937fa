"""Real models of a checkpoint, Megatron Core's and Transformers', a decoder layer in memory at a time.

Importing a module of this package costs neither torch nor a model library, unless its own text says otherwise.
"""
