"""What several operations compute with: positions, maps, caches, dtypes, and their checks."""
