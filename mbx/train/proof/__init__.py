"""`mbx verify training`: the first rows of a recipe through Megatron Core and through Transformers by themselves."""
