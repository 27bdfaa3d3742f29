"""The Triton kernel that appends to a cache."""
