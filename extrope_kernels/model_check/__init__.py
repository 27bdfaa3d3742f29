"""The `check` command: what a model's configuration really does, and what to try at a length."""
