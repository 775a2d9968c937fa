"""The comparison of two models' passes: how far hidden states, logits and losses are apart."""
