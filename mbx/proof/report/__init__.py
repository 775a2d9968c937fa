"""A comparison as a page to read."""
