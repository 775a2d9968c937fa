"""What writes pages of docs/ from the code, and builds them into a site."""
