"""The comparison of two models' passes: what both read, how far hidden states, logits and losses are apart."""
