"""From a recipe to a built model: its config, its process group, its weights."""
