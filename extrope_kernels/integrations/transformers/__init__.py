"""Hugging Face models: `extend` a loaded model by any method, `restore` it exactly.

Nothing is known of a model by its name: what its layers do is found out by running four tokens.

extension: `extend`, and the handle that undoes it.
architecture, tables, fused: where a model rotates, what its rotary embedding makes of frequencies,
    whether the op does the same. calls, forwards: how its layers call their attention, by which
    arguments. trial, layers: what they do with it, recorded.
frequency_methods: what a frequency method changes. rotary stands in for the rotary embedding and
    hands a Rotation (rotation) through the model to its wrapped `apply_rotary_pos_emb` (apply);
    requests, softmax_scale and norms are for methods that depend on the length, DeepSeek, and norms
    before the rotation. parameters: what the model gives of a method's parameters.
score_methods: what a score method changes. An Attending (attending) goes through the model and
    takes the mask's place in its layers; it knows the rows of the batch: rows, and static_cache,
    paged and context_parallel for other ways to keep them. layer_options: softmax options.
context_changes: what a mesh changes. interface: `attn_implementation="extrope"`.
"""

from .._shared.parameters import PARAMETERS
from .extension import Extension, extend
from .interface import register_interface

__all__ = ["PARAMETERS", "Extension", "extend", "register_interface"]
