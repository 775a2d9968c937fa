"""A recipe's validation matrix: baselines of Transformers and PEFT, then one setting changed at a time."""
