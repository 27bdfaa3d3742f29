"""One sensible call of every frequency method, for the tests that run over all of them."""

from __future__ import annotations

from typing import Any

DIM = 16
LENGTH = "original_max_position_embeddings"
EXAMPLES: dict[str, dict[str, Any]] = {
    "rope": {},
    "abf": {},
    "pi": {"factor": 4},
    "ntk_aware": {"factor": 4},
    "dynamic_ntk": {"factor": 2, "seq_len": 100, "max_position_embeddings": 64},
    "ntk_by_parts": {"factor": 4, LENGTH: 256},
    "ntk_mixed": {"factor": 4},
    "yarn": {"factor": 4, LENGTH: 256},
    "dynamic_yarn": {"seq_len": 300, LENGTH: 256},
    "giraffe_power": {"power": 0.5},
    "giraffe_truncation": {"truncate_pos": 256},
    "xpos": {},
    "llama3": {"factor": 8, LENGTH: 8192},
    "longrope": {
        "short_factor": [1 + 0.01 * i for i in range(DIM // 2)],
        "long_factor": [2.0 + i for i in range(DIM // 2)],
        LENGTH: 64,
        "seq_len": 100,
        "factor": 4,
    },
    "proportional": {"partial_rotary_factor": 0.25},
    "axial": {"axes": 2},
    "cope": {},
    "mrrope": {"factor": 4, LENGTH: 256},
    "nope": {},
}


def example(name: str, dim: int = DIM) -> dict[str, Any]:
    """The keyword arguments of a call at `dim`: lists have one entry a pair of dims."""
    pairs = range(dim // 2)
    return {
        key: [value[i % len(value)] for i in pairs] if isinstance(value, list) else value
        for key, value in EXAMPLES[name].items()
    }
