"""Hugging Face models: `extend` a loaded model by any method, save it, `restore` it exactly.

In the order in which a call goes through the files:

extension: `extend`, and the handle that undoes it.
find: where a model rotates, a `RotarySite` for each rotary embedding.
frequencies: what a frequency method changes; a `Rotary` stands in for the rotary embedding.
trial: four tokens, which show what the layers of a model do.
scores: what a score method changes; a `ScoreRotary` hands an `Attending` to the layers.
context_parallel: what a mesh changes.
norms: norms before the rotation, left to it.
saved: an extension on disk.

In a forward:
entry: calls of a `forward` by itself, sent through the hooks.
rotation: a `Rotation` in place of cosines and sines, and the wrapped function that rotates by it.
attend: how layers call their attention, and an `Attending` in the mask's place.
rows, packed, paged: the rows of a batch, by how their keys are kept.

interface: `attn_implementation="extrope"`, which models that are not extended can have too.
"""

from .._shared.parameters import PARAMETERS
from .extension import Extension, extend, extend_from_saved
from .interface import register_interface

__all__ = ["PARAMETERS", "Extension", "extend", "extend_from_saved", "register_interface"]
