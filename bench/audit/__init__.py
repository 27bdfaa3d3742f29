"""The audit of GPU kernels that needs no GPU: what each configuration compiles to."""
