"""What a run leaves behind: checkpoints to resume from, and what is exported from them."""
