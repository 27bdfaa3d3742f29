"""A right call of every public function, by name and arguments; a wrong one changes one of these.

Calls that run an op are rows of `operations`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from support import operations
from support.method_examples import DIM, EXAMPLES, LENGTH
from support.operations import CACHES, FEW, FORMS, OF_AXES, Operation, both, line, starts
from support.score_examples import EXAMPLES as SCORES
from support.score_examples import OF_PAIRS

from extrope_kernels.testing import device

DEVICE = device()
NONE = replace(FEW, seqlen=0)
FREQS, SECTIONS = operations.FREQS[DIM], OF_AXES[DIM]


def ints(*values: int) -> torch.Tensor:
    return operations.ints(*values).to(DEVICE)


SHARED: dict[tuple, torch.Tensor] = {}  # a cache is one tensor in all calls


def arguments(row: Operation) -> dict[str, Any]:
    given = row.arguments(**row.tensors(0, torch.float32))
    caches = {name: given[name] for name in CACHES if name in given}
    return given | {name: SHARED.setdefault((name, x.dtype), x) for name, x in caches.items()}


# Rows that refuse different things. Caches are in rows, of which `wrong_values` says what is too
# much; a block_table makes pages of them.
ROWS = {
    name: FORMS[name]
    for name in (
        *("rope", "rope of one tensor", "rope, in place", "rope by head, with decay"),
        *("rope by axes", "rope after a norm, packed"),
        *("append in rows", "append in rows, packed", "permute", "permute of one tensor"),
        *("no score", "leaky_rerope", "leaky_rerope, packed", "attention between numbers"),
        *("append and decode in rows", "packed decode in rows", "decode in fp8"),
        "linear attention",
    )
} | {
    "rope, packed": replace(FORMS["rope, packed"], lengths=both(starts, line)),
    "rope, packed, of no tokens": replace(FORMS["rope, packed"], sizes=NONE, lengths=starts),
    "leaky_rerope, packed, of no tokens": replace(FORMS["leaky_rerope, packed"], sizes=NONE),
}
# What follows a space in a name tells calls of one function apart.
CALLS: dict[str, dict[str, Any]] = {
    **{f"{row.function.__name__} of {name}": arguments(row) for name, row in ROWS.items()},
    "permuteformer_step": {**arguments(FORMS["linear attention"]), "state": None},
    "merge_attention": {name: list(x[:2]) for name, x in arguments(FORMS["merge"]).items()},
    "head_permutations": {"heads": 2, "head_dim": 8, "seed": 1},
    **{f"scores.{name}": example.parameters for name, example in SCORES.items()},
    **{f"scores.{name}": parameters(DIM // 2) for name, parameters in OF_PAIRS.items()},
    **{f"methods.{name}": {"dim": DIM, **options} for name, options in EXAMPLES.items()},
    "methods.with_sections": {"freqs": FREQS, "sections": [2, 3, 3], "interleaved": False},
    "methods.by_axis": {"freqs": FREQS, "axes": [0], "over": SECTIONS},
    "methods.resonance": {"freqs": FREQS},
    "methods.ms_poe": {
        "freqs": FREQS,
        "heads": 4,
        "min_ratio": 1.2,
        "max_ratio": 1.8,
        "order": [1, 0],
        "group": 2,
    },
    "scores.query_scale.log_n": {"positions": ints(3, 9), "length": 64},
    "scores.query_scale.llama4": {"positions": ints(3, 9), "floor_scale": 64.0, "attn_scale": 0.1},
    "scores.query_scale.ministral3": {"positions": ints(3, 9), LENGTH: 64, "beta": 0.1},
    "scores.query_scale.qwen_1m": {"positions": ints(3, 9), LENGTH: 64},
    "positions.shape": {"batch": 2, "seqlen": 5, "max_shift": 3, "eval_shift": "zero"},
    "positions.randomized": {"seqlen": 5, "max_len": 9, "batch": 2},
    "positions.random_padding": {"batch": 2, "num_tokens": 3, "length": 9},
    "positions.pose": {"batch": 2, "num_tokens": 9, "train_length": 4, "target_length": 12},
    "positions.giraffe_randomized": {"batch": 2, "seqlen": 5},
}
ATTENTION = CALLS["rope_attention of leaky_rerope"]
CACHE = CALLS["rope_attention_with_kvcache of append and decode in rows"]
