"""What every argument of every public function must not be."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from support.operations import FEW, XPOS
from support.right_calls import (
    ATTENTION,
    CACHE,
    CALLS,
    DEVICE,
    FREQS,
    SECTIONS,
    ints,
)
from support.wrong_tensors import (
    NOT_A_NUMBER,
    NOT_ABOVE_0,
    not_factors,
    not_freqs,
    not_ints,
    not_like,
    not_rows,
)

from extrope_kernels import RopeFreqs, head_permutations, methods, scores

LSE, SLOTS = CALLS["merge_attention"]["lses"][0], FEW.max_len
NOT_AN_INT = {**NOT_A_NUMBER, "half": 2.5, "nan": math.nan, "inf": math.inf, "True": True}
NOT_POSITIVE = {"-1": -1, "-2**63": -(2**63), "-2**80": -(2**80)}
HUGE = {"2**63": 2**63, "2**80": 2**80}
NOT_A_BOOL = {"text": "yes", "two": 2, "None": None, "tensor": torch.ones(2), "float": 0.5}
NOT_A_NAME = {"number": 3, "bytes": b"cpu", "unknown": "metal", "list": ["cpu"], "empty": ""}
FACTOR = {**NOT_A_NUMBER, **{k: v for k, v in NOT_ABOVE_0.items() if k != "inf"}, "None": None}
SCALE = {**NOT_A_NUMBER, **NOT_ABOVE_0}
NOT_A_WEIGHT = {
    k: v
    for k, v in not_factors(ATTENTION["q"][0, 0, 0]).items()
    if k not in ("None", "half", "double", "longer")
} | {
    "of three heads": ATTENTION["q"][0, 0, :3].flatten(),
    "of seven dims": ATTENTION["q"][0, 0, 0, :7],
    "strided": ATTENTION["q"][0, 0, :2].flatten()[::2],
}
COUNT = {**NOT_AN_INT, **NOT_POSITIVE, **HUGE, "None": None, "0": 0}
SIZE = {**COUNT, "2**31": 2**31}
PLACE = {"number": 3.5, "text": "moon", "list": []}
NOT_POSITIONS = not_ints(ints(*range(6))) | {**HUGE, "complex number": 1j}
# "values": wrong by what the host reads of a tensor, which on a GPU it does not.
BOUNDARIES = {
    "values past the end": ints(0, 2, 7),
    "values that fall": ints(0, 4, 2, 6),
    "values not from 0": ints(1, 6),
    "values below 0": ints(-2, 6),
    "one": ints(0),
    "none": ints(),
    "strided": torch.stack((ints(0, 2, 6), ints(0, 2, 6)), -1)[:, 0],
    "values 1, 0": ints(1, 0),
    "values 0, -5, 0": ints(0, -5, 0),
    "values 0, 2**30": ints(0, 2**30),
    "values past int32": torch.tensor([0, 2**32 + 6], device=DEVICE),
}


def permutations(heads: int) -> torch.Tensor:
    return head_permutations(heads, FEW.dim).to(DEVICE)


def starts() -> dict:
    last = {"2**29": 2**29, "values to 2**29": ints(0, 2**29), "values -1": ints(3, -1)}
    return not_ints(ints(0, 0)) | {**HUGE, **NOT_POSITIVE, **last}


def cached(name: str) -> dict:
    """What is not to be read, or written, by a call that appends to a cache."""
    x = CACHE[name]
    return not_like(x) | {"heads": x[:, :, :1], "learned": x.clone().requires_grad_()}


def cache(name: str, other: str) -> dict:
    x = CACHE[name]
    return cached(name) | {
        "expanded": x[:1].expand_as(x),
        "the other": CACHE[other],
        "a view of the other": CACHE[other][:],
        "slots": x[:, :7],
        "e5m2": x.to(torch.float8_e5m2),
        "float8 elsewhere": x.to(torch.float8_e4m3fn).to("meta"),
    }


def scales() -> dict:
    own = {"scale": torch.ones(2, device=DEVICE), "no scale": None}
    bad = (0.0, -1.0, math.inf, math.nan)
    return not_factors(torch.ones(2, device=DEVICE)) | {
        **own,
        **{f"values 1, {x}": torch.tensor([1.0, x], device=DEVICE) for x in bad},
    }


# What every argument must not be. "name" means every function that has the argument,
# "function.name" that one alone, "with_kvcache.name" all of that ending; bools and numbers without
# an entry have `of_the_kind`.
WRONG = {
    "x": not_rows(ATTENTION["q"]) | {"None": None},
    "q": not_like(ATTENTION["q"]),
    "k": not_like(ATTENTION["k"]) | {"seqlen": ATTENTION["k"][:, :5]},
    "v": not_like(ATTENTION["v"])
    | {"seqlen": ATTENTION["v"][:, :5], "heads": ATTENTION["v"][:, :, :1]},
    "rope_attention.q": not_like(ATTENTION["q"]) | {"heads": ATTENTION["q"][:, :, :3]},
    "with_kvcache.q": cached("q") | {"heads": CACHE["q"][:, :, :3]},
    "with_kvcache.k": cached("k") | {"seqlen": torch.cat([CACHE["k"]] * 2, 1)},
    "with_kvcache.v": cached("v") | {"seqlen": torch.cat([CACHE["v"]] * 2, 1)},
    "k_cache": cache("k_cache", "v_cache"),
    "v_cache": cache("v_cache", "k_cache"),
    "freqs": not_freqs(),
    "rope_attention.freqs": not_freqs()
    | {
        "freqs of axes": SECTIONS,
        **{f"attention_factor {x}": replace(FREQS, attention_factor=x) for x in (1e20, 1e300)},
    },
    "with_kvcache.freqs": not_freqs() | {"freqs of axes": SECTIONS, "freqs of XPOS": XPOS[FEW.dim]},
    **{
        f"methods.{wrapper}.freqs": {
            name: value
            for name, value in not_freqs().items()
            if not isinstance(value, RopeFreqs)
            or value.inv_freq.dim() == 0
        }
        for wrapper in methods.WRAPPERS
    },
    "positions": {
        **{k: v for k, v in not_ints(ints(*range(6))).items() if k != "float"},
        **HUGE,
        "-2**80": -(2**80),
        "2**53 + 1": 2**53 + 1,
        "complex number": 1j,
        "two": torch.ones(2, 2, device=DEVICE),
        "by axes": torch.zeros(3, 2, 6, device=DEVICE),
        "by no axes": torch.zeros(0, 2, 6, device=DEVICE),
        "axes of another batch": torch.zeros(3, 3, 6, device=DEVICE),
        "axes of another length": torch.zeros(3, 2, 4, device=DEVICE),
    },
    "cu_seqlens": {k: v for k, v in not_ints(ints(0, 2, 6)).items() if k != "longer"}
    | {**BOUNDARIES, "boundaries": ints(0, 2, 6), "values twice": ints(0, 2, 6, 0, 2, 6),
       "values of another length": ints(0, 2, 5)},
    "cu_seqlens_q": {k: v for k, v in not_ints(ints(0, 2, 6)).items() if k != "longer"}
    | {k: v for k, v in BOUNDARIES.items() if v.dim() != 1 or len(v) != 2}
    | {"batch": ints(0, 2, 4, 6), "values that fall": ints(0, 4, 2),
       "values from 1": ints(1, 2, 6), "values below 0": ints(-2, 2, 6)},
    "q_start": starts(),
    "k_start": starts(),
    "query_scale": not_factors(torch.ones(2, 6, device=DEVICE)),
    "with_kvcache.query_scale": not_factors(torch.ones(2, 1, device=DEVICE)),
    "sinks": not_factors(torch.ones(4, device=DEVICE)),
    "rotary_offset": {k: v for k, v in COUNT.items() if k != "0"} | {"past the end": 8},
    "softcap": {k: v for k, v in SCALE.items() if k != "0"}
    | {"None": None, "True": True, "1e-46": 1e-46, "1e39": 1e39},
    "sliding_window": {k: v for k, v in COUNT.items() if k != "None"} | {"2**62": 2**62},
    "cache_seqlens": not_ints(ints(3, 3))
    | {"None": None, "values 33": SLOTS + 1, "2**31": 2**31, **HUGE, **NOT_POSITIVE,
       "one": ints(3), "values 32": ints(3, SLOTS), "values -1": ints(3, -1)},
    "block_table": not_ints(ints(0, 1).view(2, 1))
    | {"long": ints(0, 1).view(2, 1).long(), "row": ints(0, 1), "values 2": ints(2, 1).view(2, 1),
       "values -1": ints(-1, 0).view(2, 1)},
    "cache_leftpad": not_ints(ints(1, 1))
    | {"long": ints(1, 1).long(), "one": ints(1), "values -1": ints(-1, 0)},
    "slot_mapping": not_ints(ints(3, 12).view(2, 1))
    | {"values past the end": ints(3, 2 * SLOTS).view(2, 1), "values -2": ints(-2, 3).view(2, 1)},
    "score": {"text": "rerope", "number": 4.0, "function": scores.rerope},
    "rope_append_kvcache.freqs": {k: v for k, v in not_freqs().items() if k != "None"},
    "k_scale": scales(),
    "v_scale": scales(),
    "q_norm_weight": NOT_A_WEIGHT,
    "k_norm_weight": NOT_A_WEIGHT,
    "norm_eps": {k: v for k, v in SCALE.items() if k not in ("0", "inf")}
    | {"None": None, "True": True},
    "backend": NOT_A_NAME,
    "window": COUNT,
    "chunk_size": COUNT,
    "local_window": {**COUNT, "0": -3, "chunk_size": 9},
    "scores.string.window": {**COUNT, "0": -3},
    "scores.self_extend.factor": FACTOR | {"inf": math.inf, "half": 2.5},
    "shift": COUNT,
    "block_size": COUNT | {"odd": 3},
    "factor": FACTOR,
    "softmax_scale": SCALE | {"1e39": 1e39},
    "log_n": {**SCALE, "1": 1, "0.5": 0.5},
    "outs": {
        "None": None,
        "number": 3.0,
        "text": "text",
        "texts": ["a", "b"],
        "empty": [],
        "scalar": torch.tensor(1.0),
        "one result": ATTENTION["q"],
        "one": [ATTENTION["q"]],
        "meta": [ATTENTION["q"], ATTENTION["q"].to("meta")],
        "dtypes": [ATTENTION["q"], ATTENTION["q"].half()],
        "ints": [ATTENTION["q"].int()] * 2,
        "float8": [ATTENTION["q"].to(torch.float8_e4m3fn)] * 2,
        "complex": [ATTENTION["q"].to(torch.complex64)] * 2,
        "batch": [ATTENTION["q"], ATTENTION["q"][:1]],
        "2-D": [ATTENTION["q"][0, 0]] * 2,
        "set": {1, 2},
    },
    "lses": {
        "None": None,
        "number": 3.0,
        "text": "text",
        "empty": [],
        "scalar": torch.tensor(1.0),
        "one result": LSE,
        "one": [LSE],
        "meta": [LSE, LSE.to("meta")],
        "half": [LSE.half()] * 2,
        "dtypes": [LSE, LSE.double()],
        "batch": [LSE, LSE[:1]],
        "seqlen first": [LSE.mT] * 2,
    },
    # PermuteFormer
    "permutations": {k: v for k, v in not_ints(permutations(2)).items() if k != "longer"}
    | {"None": None, "int32": permutations(2).int(), "three": permutations(3),
       "dims": head_permutations(2, 8).to(DEVICE), "strided": permutations(2).T.contiguous().T,
       "values of 0": permutations(2) * 0, "values from 1": permutations(2) + 1,
       "values from -1": permutations(2) - 1},
    "permute_qk.permutations": {"of q": permutations(4)},
    "decay": {
        **{k: v for k, v in NOT_A_NUMBER.items() if k != "tensor"},
        "three": torch.full((3,), 0.5, device=DEVICE),
        "half": torch.full((2,), 0.5, device=DEVICE).half(),
        "int": torch.ones(2, device=DEVICE).int(),
        "meta": torch.full((2,), 0.5, device="meta"),
        "values above 1": torch.full((2,), 1.5, device=DEVICE),
        "values of a parameter": torch.nn.Parameter(torch.ones(2, device=DEVICE) * 2, False),
        "learned": torch.full((2,), 0.5, device=DEVICE, requires_grad=True),
        "values of 0": torch.zeros(2, device=DEVICE),
        "values of nan": torch.full((2,), math.nan, device=DEVICE),
    },
    "state": {"number": 1.0, "tensor": ATTENTION["k"], "one": (ATTENTION["k"],),
              "numbers": (1.0, 2.0)},
    "heads": COUNT,
    "head_dim": COUNT,
    "seed": NOT_AN_INT,
    "permute.positions": NOT_POSITIONS,
    "permute_qk.positions": NOT_POSITIONS,
    "permuteformer_attention.positions": NOT_POSITIONS,
    "permuteformer_step.positions": NOT_POSITIONS,
    # Frequencies
    "dim": {**SIZE, "odd": 7, "1": 1},
    "base": FACTOR | {"1": 1.0, "0.5": 0.5, "inf": math.inf},
    "seq_len": {k: v for k, v in COUNT.items() if k not in HUGE}
    | {"tensor": torch.ones(2), "2-D": torch.ones(2, 2, dtype=torch.int64)},
    "max_position_embeddings": {k: v for k, v in COUNT.items() if k not in ("None", *HUGE)},
    "original_max_position_embeddings": {k: v for k, v in COUNT.items() if k not in HUGE},
    "truncate_pos": FACTOR,
    "scale_base": FACTOR,
    "power": {**NOT_A_NUMBER, "None": None, "nan": math.nan, "-1": -1.0},
    "gamma": FACTOR,
    "decay_origin": {**NOT_A_NUMBER, "None": None, "nan": math.nan, "inf": math.inf},
    "clip": {k: v for k, v in COUNT.items() if k != "0"},
    "exponent": {**NOT_A_NUMBER, "None": None, "nan": math.nan},
    "partial_rotary_factor": {k: v for k, v in FACTOR.items() if k != "0"} | {"2": 2.0},
    "variant": NOT_A_NAME | {"None": None},
    "ramp": NOT_A_NAME | {"None": None},
    "short_factor": {"None": None, "number": 1.0, "text": "1" * 8, "shorter": [1.0], "nan":
                     [math.nan] * 8, "texts": ["1"] * 8, "0": [0.0] * 8, "longer": [1.0] * 9,
                     "rows": torch.ones(2, 4), "tensor of 0": torch.zeros(8)},
    "sections": {"None": None, "number": 8, "text": "233", "empty": [], "sum": [2, 3],
                 "negative": [-2, 5, 5], "half": [2.5, 2.5, 3], "texts": ["2", "3", "3"],
                 "0": [0, 4, 4]},
    "axes": COUNT,
    "methods.by_axis.axes": {"None": None, "number": 0, "text": "0", "empty": [], "3": [3],
                             "-1": [-1], "half": [0.5], "True": [True], "texts": ["0"]},
    "methods.by_axis.over": {k: v for k, v in not_freqs().items() if not isinstance(v, RopeFreqs)}
    | {"one axis": methods.rope(16), "longer": methods.axial(32)},
    "ladder": NOT_A_NAME | {"None": None},
    "group": COUNT,
    "order": {"number": 8, "text": "01", "empty": [], "twice": [0, 0], "from 1": [1, 2],
              "half": [0.0, 1.0], "one": [0], "bool": [0, True], "texts": ["0", "1"],
              "tensor": torch.arange(2), "dict": {0: 1}},
    # Temperatures
    "scores.query_scale.log_n.length": SCALE | {"None": None, "1": 1},
    "floor_scale": FACTOR,
    "attn_scale": {**NOT_A_NUMBER, "None": None, "-1": -1.0},
    "beta": {**NOT_A_NUMBER, "None": None, "-1": -1.0},
    "dtype": {},
    # Positions
    "batch": {k: v for k, v in SIZE.items() if k != "None"},
    "seqlen": SIZE,
    "max_shift": {k: v for k, v in SIZE.items() if k != "0"},
    "max_len": {k: v for k, v in SIZE.items() if k != "None"},
    "num_tokens": {**SIZE, "list": [4], "texts": ["a", "b"], "tensor": torch.ones(2),
                   "three": torch.ones(3, dtype=torch.int64), "set": {5, 6}, "a bool": [5, True],
                   "a float": [5, 5.0], "0 in one": [5, 0], "tensor with 0": torch.tensor([0, 5]),
                   "bools": torch.ones(2, dtype=torch.bool), "column": torch.tensor([[5], [5]])},
    "length": SIZE,
    "num_fixed_prefix": {k: v for k, v in SIZE.items() if k != "0"},
    "train_length": SIZE,
    "target_length": SIZE,
    "eval_shift": {k: v for k, v in SIZE.items() if k != "0"} | {"list of K": ["K"], "k": "k"},
    "generator": {"number": 3, "text": "cpu", "function": torch.manual_seed},
    "device": PLACE,
}  # fmt: skip
WRONG["permute_qk.permutations"] |= WRONG["permutations"]
for _name in "qkv":  # of an append, which writes k and v, and has no gradient
    _learned = CACHE[_name].clone().requires_grad_()
    WRONG[f"rope_append_kvcache.{_name}"] = WRONG[_name] | {"learned": _learned}
del WRONG["rope_append_kvcache.q"]["None"]  # only keys and values are written then
WRONG["rope_append_kvcache.positions"] = WRONG["positions"] | {"int": 3, "offsets": ints(3, 4)}
WRONG["rope_append_kvcache.cu_seqlens"] = WRONG["cu_seqlens_q"]
for _name in ("log_n", "llama4", "ministral3", "qwen_1m"):
    WRONG[f"scores.query_scale.{_name}.positions"] = {
        "number": 5,
        "list": [1, 2],
        "None": None,
        "bool": torch.ones(2, dtype=torch.bool),
    }
WRONG["long_factor"] = WRONG["short_factor"]
WRONG["group_sizes"] = WRONG["divisors"] = {
    "None": None, "number": 1.0, "text": "1" * 8, "texts": ["1"] * 8, "empty": [],
    "empty rows": [[]],
    "nan": [math.nan] * 8, "inf": [math.inf] * 8, "0": [0.0] * 8, "-1": [-1.0] * 8,
    "uneven": [[1.0, 2.0], [1.0]], "deep": [[[1.0]]],
    "tensor of none": torch.ones(0), "number of a tensor": torch.ones(()),
}  # fmt: skip
for _end in (
    "beta_fast", "beta_slow", "beta_0", "beta_1", "gamma_0", "gamma_1", "low_freq_factor",
    "high_freq_factor",
):  # fmt: skip
    WRONG[_end] = FACTOR
for _name in ("attention_factor", "mscale", "mscale_all_dim"):
    WRONG[_name] = {**NOT_A_NUMBER, "nan": math.nan, "inf": math.inf}


def of_the_kind(right: object) -> dict:
    """What an argument must not be, whatever it means: right is a value that it may have."""
    return NOT_A_BOOL if isinstance(right, bool) else {**NOT_A_NUMBER, "nan": math.nan}
