"""What is covered: the models page, and drafts of new tables."""
