"""Hugging Face's `kernels`: layers for its models, and the folder that it loads.

`python -m extrope_kernels.integrations.kernels FOLDER` writes that folder; `make hub` calls it.
"""
