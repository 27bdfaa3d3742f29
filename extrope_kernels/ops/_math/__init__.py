"""What operations compute with: positions, maps, pairs, dtypes."""
