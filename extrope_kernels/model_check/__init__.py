"""The `check` command: a model's positions as built, and a method to try at a length."""
