"""torch's files without torch: zip archives, pickles and distributed checkpoints' indices, read inertly."""
