"""Checks and timings for a machine with a GPU, in steps of under nine minutes: `make gpu`."""
