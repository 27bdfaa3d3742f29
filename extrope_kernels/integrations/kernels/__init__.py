"""Hugging Face's `kernels`: the layers that it puts into models, and the folder that it loads.

`python -m extrope_kernels.integrations.kernels FOLDER` writes that folder; `make hub` calls it.
"""
