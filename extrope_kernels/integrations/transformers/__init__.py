"""Hugging Face models: `extend` a loaded model by any method, save it, `restore` it exactly.

extend: `extend`, and the handle that undoes it. request: what it is asked for, and the choice of a
    method for a length.

rotary: finds a model's rotary embeddings, a `RotaryModule` for each. layers: runs four tokens
    twice, to find which layers a score method can serve (`LayerProbe`).
patches: what an extension changes (`Patches`), and hooks around a forward. frequencies, scores:
    those of the two kinds of methods. generate: of the methods that generate. In a forward `state`
    says by which ways it is told of them; `rotation` rotates, `rows` checks positions.

attention: the attention function that layers call, and its masks; also for models that are not
    extended, by `attn_implementation="extrope"`. `paged` is for continuous batching.
extended_layer: the attribute by which a layer attends otherwise (`ExtendedLayer`). `attending`: the
    config by which it calls our function.
caches: what filled a cache, for those that cross `extend` or `restore`.
saved: an extension on disk; `rope_parameters` what of it a config can have.
context_parallel: an extension over a mesh. guards: against trainers with a plain reference model,
    and torch's regions. Both are imported when needed.
"""

from .._shared.parameters import PARAMETERS
from .attention import register_interface
from .extend import Extension, extend, extend_from_saved, restore

__all__ = [
    "PARAMETERS",
    "Extension",
    "extend",
    "extend_from_saved",
    "register_interface",
    "restore",
]
