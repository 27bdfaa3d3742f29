"""Hugging Face models: `extend` a loaded model by any method, `restore` it exactly.

extension: `extend`, and the handle that undoes it.

What a model does, which is found out by four tokens and not known by its name:
architecture: where it rotates, a `RotarySite` for each rotary embedding.
tables: what its rotary embedding makes of other frequencies.
fused: whether the op does what its layers do with these tables.
forwards, calls: the arguments of its forwards, and how its layers call their attention.
trial, layers: the four tokens, and which layers can attend by a score method.

Frequency methods:
frequency_methods: what one changes.
rotary: stands in for the rotary embedding, and hands a `Rotation` to the layers.
rotation, apply: that, and the wrapped `apply_rotary_pos_emb` that rotates by it.
model_values: what the model gives of a method's parameters.
requests, softmax_scale, norms: methods that depend on the length; DeepSeek; norms before rotation.

Score methods:
score_methods: what one changes.
attending: goes through the model as tables do, and takes the mask's place in each layer.
rows, static_cache, paged: the rows of a batch, by how their keys are kept.
layer_options: what a layer tells its attention, in the words of the ops.

context_changes, context_parallel: a model over a mesh, as it is extended and as it runs.
interface: `attn_implementation="extrope"`, which models that are not extended can have too.
"""

from .._shared.parameters import PARAMETERS
from .extension import Extension, extend
from .interface import register_interface

__all__ = ["PARAMETERS", "Extension", "extend", "register_interface"]
