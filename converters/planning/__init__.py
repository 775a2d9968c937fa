"""Plans of conversions: import, export, another layout, and pairs to compare."""
