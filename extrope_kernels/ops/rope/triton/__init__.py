"""The rotation's Triton kernels; read rotation.py and device.py first."""
