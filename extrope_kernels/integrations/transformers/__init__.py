"""Hugging Face models: `extend` a loaded model by any method, save it, `restore` it exactly.

extend: `extend`. handle: what it returns, which undoes it. request: what it is asked for, and the
    choice of a method for a length.

rotary: finds a model's rotary embeddings, a `RotaryModule` for each. layers: runs four tokens
    twice, to find which layers a score method can serve (`LayerProbe`).
patches: what an extension changes (`Patches`), and hooks around a forward. frequencies, scores:
    those of the two kinds of methods. generate: of the methods that generate. rotation: what a
    rotary embedding does then.

attention: the attention function that layers call, and its masks; also for models that are not
    extended, by `attn_implementation="extrope"`. An extended layer has an `ExtendedLayer`, and a
    config by which it calls our function. paged: continuous batching.
caches: what filled a cache, for those that cross `extend` or `restore`.
saved: an extension on disk, and what of it a config can have.
context_parallel: an extension over a mesh, imported when needed. guards: against trainers with a
    plain reference model, and torch's regions.
"""

from .._shared.parameters import PARAMETERS
from .attention import register_interface
from .extend import extend, extend_from_saved, restore
from .handle import Extension

__all__ = [
    "PARAMETERS",
    "Extension",
    "extend",
    "extend_from_saved",
    "register_interface",
    "restore",
]
