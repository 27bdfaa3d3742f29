"""What a call must be: specifications of tensors, checks of arguments, limits."""
