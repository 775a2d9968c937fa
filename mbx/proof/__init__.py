"""Whether two checkpoints are the same model, and whether one is still what was written."""
