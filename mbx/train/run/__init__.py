"""The run itself: checked, stepped, logged."""
