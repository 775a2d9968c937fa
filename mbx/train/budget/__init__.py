"""The memory a rank will need, counted before anything runs."""
