"""Hugging Face models: `extend` a loaded model by any method, save it, `restore` it exactly.

The files, in the order in which `extend` calls them:

extension: `extend`, and the handle that undoes it.
find: the places where a model rotates, a `RotarySite` for each rotary embedding.
frequencies: changes of a frequency method; a `Rotary` replaces the rotary embedding's forward.
trial: four tokens through the model, to learn how its layers attend.
scores: changes of a score method; a `ScoreRotary` hands an `Attending` to the layers.
context_parallel: changes for a mesh.
norms: norms before the rotation, done in the rotation's pass.
saved: an extension on disk.

In a forward:
entry: sends direct calls of `forward` through the hooks.
rotation: a `Rotation` in place of cosines and sines, and the wrapped function that rotates by it.
attend: the layers' calls of their attention, and an `Attending` in the mask's place.
rows, packed, paged: the rows of a batch, by the kind of cache.

interface: `attn_implementation="extrope"`, also for models that are not extended.
"""

from .._shared.parameters import PARAMETERS
from .extension import Extension, extend, extend_from_saved
from .interface import register_interface

__all__ = ["PARAMETERS", "Extension", "extend", "extend_from_saved", "register_interface"]
