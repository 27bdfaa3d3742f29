"""One call of every public function that works, by name and arguments."""

from __future__ import annotations

import torch
from support.method_examples import DIM, EXAMPLES
from support.score_examples import EXAMPLES as SCORES
from support.score_examples import OF_PAIRS

from extrope_kernels import RopeFreqs, head_permutations, methods, scores
from extrope_kernels.testing import device

DEVICE = device()


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


FREQS = RopeFreqs(methods.rope(DIM).inv_freq.to(DEVICE))
XPOS = methods.xpos(DIM).to(DEVICE)
SECTIONS = methods.with_sections(FREQS, [2, 3, 3])
ATTENTION = {
    "q": randn(2, 6, 4, DIM),
    "k": randn(2, 6, 2, DIM),
    "v": randn(2, 6, 2, DIM),
    "freqs": FREQS,
    "score": scores.leaky_rerope(4, 2.0),
    "softmax_scale": None,
    "log_n": None,
    "query_scale": None,
    "softcap": 0.0,
    "sinks": None,
    "sliding_window": None,
    "q_start": None,
    "k_start": None,
    "cu_seqlens": None,
    "interleaved": False,
    "rotary_offset": 0,
    "return_lse": False,
    "rotated": None,
    "backend": None,
}
ROPE = {
    "freqs": FREQS,
    "positions": ints(*range(6)),
    "cu_seqlens": None,
    "interleaved": False,
    "rotary_offset": 0,
    "inverse": False,
    "inplace": False,
    "backend": None,
}
CACHE = {
    **{
        name: value
        for name, value in ATTENTION.items()
        if name not in ("cu_seqlens", "q_start", "k_start", "positions")
    },
    "q": randn(2, 1, 4, DIM),
    "k": randn(2, 1, 2, DIM),
    "v": randn(2, 1, 2, DIM),
    "k_cache": randn(2, 8, 2, DIM),
    "v_cache": randn(2, 8, 2, DIM),
    "cache_seqlens": 3,
    "block_table": None,
    "cache_leftpad": None,
    "cu_seqlens_q": None,
    "k_scale": None,
    "v_scale": None,
}
APPEND = {
    **{name: CACHE[name] for name in ("q", "k", "v", "k_cache", "v_cache", "freqs")},
    "cache_seqlens": 3,
    "block_table": None,
    "slot_mapping": None,
    "cu_seqlens": None,
    "cache_leftpad": None,
    "positions": None,
    "score": None,
    "k_scale": None,
    "v_scale": None,
    "interleaved": False,
    "rotary_offset": 0,
    "backend": None,
}


def permutations(heads: int) -> torch.Tensor:
    return head_permutations(heads, DIM).to(DEVICE)


PERMUTE = {
    "permutations": permutations(2),
    "positions": ints(*range(6)),
    "cu_seqlens": None,
    "inverse": False,
    "backend": None,
}
LINEAR = {
    **{name: ATTENTION[name] for name in "qkv"},
    "permutations": permutations(2),
    "decay": None,
    "normalize": True,
    "positions": None,
    "backend": None,
}
PACKED = {"q": randn(6, 4, DIM), "k": randn(6, 2, DIM), "cu_seqlens": ints(0, 2, 6)}
NO_TOKENS = {name: x[:0] for name, x in PACKED.items()} | {"cu_seqlens": ints(0, 0)}
FP8 = {name: CACHE[name].to(torch.float8_e4m3fn) for name in ("k_cache", "v_cache")}
FP8 |= {name: torch.ones(2, device=DEVICE) for name in ("k_scale", "v_scale")}
LSE = randn(2, 4, 6)
# What follows a space in a name tells calls of one function apart.
CALLS = {
    "apply_rope": {"x": ATTENTION["q"], **ROPE},
    "apply_rope_qk": {"q": ATTENTION["q"], "k": ATTENTION["k"], **ROPE},
    "apply_rope_qk in place": {
        "q": randn(2, 6, 4, DIM),
        "k": randn(2, 6, 2, DIM),
        **ROPE,
        "inplace": True,
    },
    "apply_rope_qk of XPOS": {"q": ATTENTION["q"], "k": ATTENTION["k"], **ROPE, "freqs": XPOS},
    "apply_rope of several axes": {
        "x": ATTENTION["q"],
        **ROPE,
        "freqs": SECTIONS,
        "positions": torch.zeros(3, 2, 6, device=DEVICE),
    },
    "rope_attention": {**ATTENTION, "score": None},
    "rope_attention of a score": ATTENTION,
    "rope_attention between starts": {**ATTENTION, "score": None, "q_start": 3, "k_start": 0},
    "rope_attention of packed sequences": {**ATTENTION, **PACKED, "v": PACKED["k"] + 1},
    "rope_attention of no packed tokens": {**ATTENTION, **NO_TOKENS, "v": NO_TOKENS["k"]},
    "rope_attention_with_kvcache": {**CACHE, "score": None},
    "rope_attention_with_kvcache of packed queries": {
        **CACHE,
        "q": PACKED["q"],
        "k": PACKED["k"],
        "v": PACKED["k"] + 1,
        "cu_seqlens_q": PACKED["cu_seqlens"],
    },
    **{f"scores.{name}": example.parameters for name, example in SCORES.items()},
    **{f"scores.{name}": parameters(DIM // 2) for name, parameters in OF_PAIRS.items()},
    "rope_attention_with_kvcache in fp8": {**CACHE, "score": None, **FP8},
    "rope_append_kvcache": APPEND,
    "rope_append_kvcache of packed tokens": {**APPEND, **PACKED, "v": PACKED["k"] + 1},
    "apply_rope_qk of packed sequences": {**ROPE, **PACKED},
    "apply_rope_qk of packed sequences after a norm": {
        **ROPE,
        **PACKED,
        "q_norm_weight": randn(DIM),
    },
    "apply_rope_qk of no packed tokens": {**ROPE, **NO_TOKENS, "positions": None},
    "permute": {"x": ATTENTION["q"], **PERMUTE, "permutations": permutations(4)},
    "permute_qk": {"q": ATTENTION["q"], "k": ATTENTION["k"], **PERMUTE},
    "permuteformer_attention": {**LINEAR, "causal": True, "cu_seqlens": None},
    "permuteformer_step": {**LINEAR, "state": None},
    "head_permutations": {"heads": 2, "head_dim": 8, "seed": 1},
    "merge_attention": {"outs": [ATTENTION["q"]] * 2, "lses": [LSE] * 2},
    **{f"methods.{name}": {"dim": DIM, **options} for name, options in EXAMPLES.items()},
    "methods.with_sections": {"freqs": FREQS, "sections": [2, 3, 3], "interleaved": False},
    "methods.by_axis": {
        "freqs": FREQS,
        "axes": [0],
        "over": methods.with_sections(FREQS, [2, 3, 3]),
    },
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
    "scores.query_scale.llama4": {
        "positions": ints(3, 9),
        "floor_scale": 64.0,
        "attn_scale": 0.1,
    },
    "scores.query_scale.ministral3": {
        "positions": ints(3, 9),
        "original_max_position_embeddings": 64,
        "beta": 0.1,
    },
    "scores.query_scale.qwen_1m": {
        "positions": ints(3, 9),
        "original_max_position_embeddings": 64,
    },
    "positions.shape": {"batch": 2, "seqlen": 5, "max_shift": 3, "eval_shift": "zero"},
    "positions.randomized": {"seqlen": 5, "max_len": 9, "batch": 2},
    "positions.random_padding": {"batch": 2, "num_tokens": 3, "length": 9},
    "positions.pose": {"batch": 2, "num_tokens": 9, "train_length": 4, "target_length": 12},
    "positions.giraffe_randomized": {"batch": 2, "seqlen": 5},
}
