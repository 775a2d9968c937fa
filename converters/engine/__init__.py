"""Plans, and what carries them out: pieces of bounded size from source regions to target regions."""
