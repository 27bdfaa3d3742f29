"""What `extend` changes in a model."""
