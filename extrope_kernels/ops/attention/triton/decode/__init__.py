"""Attention over a key/value cache in Triton, and the write of new keys, for GPUs."""
