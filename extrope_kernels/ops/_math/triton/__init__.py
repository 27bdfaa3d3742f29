"""Code shared by the Triton kernels of several operations; imported by them only."""
