"""Attention with a cache: one new token or many, packed or not."""
