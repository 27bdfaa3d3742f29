"""The rope types of transformers: what every reader of a configuration knows of one."""

from __future__ import annotations

from typing import NamedTuple


class RopeType(NamedTuple):
    """A rope type.

    method: the frequency method that computes it.
    keys: what it reads of `rope_parameters` beside the base and the share of a head that rotates.
    by_length: True if its frequencies follow the length.
    scaling: None if it scales nothing, "trained" if it is part of a training, "replaced" if it came
        after one, so that a new factor takes its place.
    """

    method: str
    keys: tuple[str, ...] = ()
    by_length: bool = False
    scaling: str | None = None


_TRAINED = "original_max_position_embeddings"
_LONGROPE = RopeType(
    "longrope",
    ("short_factor", "long_factor", "factor", _TRAINED, "attention_factor"),
    by_length=True,
    scaling="trained",
)
ROPE_TYPES = {
    "default": RopeType("rope"),
    "mrope": RopeType("rope"),  # the name in Qwen2-VL's first configurations
    "axial": RopeType("axial"),
    "linear": RopeType("pi", ("factor",), scaling="trained"),
    "dynamic": RopeType("dynamic_ntk", ("factor",), by_length=True, scaling="replaced"),
    "yarn": RopeType(
        "yarn",
        (
            *("factor", _TRAINED, "beta_fast", "beta_slow"),
            *("attention_factor", "mscale", "mscale_all_dim", "truncate"),
        ),
        scaling="replaced",
    ),
    "longrope": _LONGROPE,
    "su": _LONGROPE,  # the name in Phi-3's first configurations
    "llama3": RopeType(
        "llama3",
        ("factor", _TRAINED, "low_freq_factor", "high_freq_factor"),
        scaling="trained",
    ),
    "proportional": RopeType("proportional", ("factor",), scaling="trained"),
}


def rope_type(name: str | None) -> RopeType:
    """Return the type of a name; that of plain RoPE for None, and for a name that is not known."""
    return ROPE_TYPES.get(name or "default", ROPE_TYPES["default"])
