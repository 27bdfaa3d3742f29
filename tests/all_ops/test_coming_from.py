"""Names of other libraries: the guide's tables, and what errors say of them."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch

import extrope_kernels
from extrope_kernels import (
    apply_rope,
    apply_rope_qk,
    methods,
    rope_append_kvcache,
    rope_attention,
    rope_attention_with_kvcache,
    scores,
)
from extrope_kernels._coming_from import LIBRARIES

PAGE = Path(__file__).parents[2] / "docs/guide/coming_from.md"
X = torch.zeros(1, 8, 2, 64)
FREQS = methods.rope(64)
HOT = (
    *(apply_rope, apply_rope_qk, rope_append_kvcache),
    *(rope_attention, rope_attention_with_kvcache),
)


def table(library):
    rows = [(library, "here", "note"), ("---", "---", "---"), *(x[:3] for x in LIBRARIES[library])]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def test_the_guide_has_the_tables():
    page = PAGE.read_text()
    for library in LIBRARIES:
        assert table(library).replace("|  |", "| |") in page, f"write:\n{table(library)}"
    assert len(re.findall("^## ", page, re.MULTILINE)) == len(LIBRARIES)


def test_what_stands_here_is_here():
    """Functions and arguments that the tables name."""
    arguments = {name for each in HOT for name in inspect.signature(each).parameters}
    for axis in (methods.METHODS, scores.SCORES):
        arguments |= {name for each in axis.values() for name in inspect.signature(each).parameters}
    for rows in LIBRARIES.values():
        for row in rows:
            for call in re.findall(r"`([\w.]+)\(", row.here):
                found = extrope_kernels
                for part in call.split("."):
                    found = getattr(found, part, None)
                assert callable(found) or call == "register_interface", call
            named = set(re.findall(r"(\w+)=", row.here)) - {"attn_implementation"}
            assert named <= arguments, row


ATTEND = (rope_attention, (X, X, X, FREQS))
ROTATE = (apply_rope, (X, FREQS))
YARN = (methods.yarn, (64,))
# Calls with a name of another library, and what is said of it.
KEYWORDS = [
    (ATTEND, "causal", "causal=True of flash-attn: always here; aligned at the end"),
    (ATTEND, "is_causal", "is_causal=True of PyTorch's SDPA: always here; aligned"),
    (ATTEND, "window_size", "window_size=(w - 1, 0) of flash-attn: sliding_window=w here; w keys"),
    (ATTEND, "attn_mask", "attn_mask of PyTorch's SDPA: cu_seqlens=, sliding_window=, q_start=, "),
    (ATTEND, "scale", "scale of PyTorch's SDPA: softmax_scale= here"),
    (ATTEND, "dropout_p", "alibi_slopes, dropout_p, deterministic of flash-attn: none here"),
    (ATTEND, "cu_seqlens_q", "flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k) of fla"),
    (ROTATE, "position_ids", "position_ids of transformers: positions= here"),
    (ROTATE, "seqlen_offsets", "seqlen_offsets=n of flash-attn: positions=n here"),
    (YARN, "rope_theta", "rope_theta of transformers: base= here"),
    (YARN, "scaling_factor", "scaling_factor of vLLM: factor= here"),
    ((methods.rope, ()), "head_dim", "head_dim of transformers: dim=, the first argument here"),
    ((scores.self_extend, (8,)), "group_size", "group_size of the authors of SelfExtend: factor= "),
    ((scores.rerope, ()), "window_size", "window_size of the authors of SelfExtend: window= here"),
]


@pytest.mark.parametrize(("call", "name", "told"), KEYWORDS)
def test_a_name_of_another_library_is_answered_with_ours(call, name, told):
    function, args = call
    message = re.escape(f"{function.__name__}: no argument {name}; {told}"[:100])
    with pytest.raises(TypeError, match=f"^{message}"):
        function(*args, **{name: 1})


def test_a_name_of_nobody():
    with pytest.raises(TypeError, match=r"^apply_rope: no argument position \(did you mean 'posit"):
        apply_rope(X, FREQS, position=3)
    with pytest.raises(TypeError, match=r"^rerope: no argument nonsense; it has window$"):
        scores.rerope(8, nonsense=3)


PLACES = [
    (
        lambda: apply_rope(X, X, X),
        "apply_rope: too many positional arguments; by position it takes x, freqs, and got "
        "x = Tensor, freqs = Tensor, Tensor. apply_rotary_emb(x, cos, sin) of flash-attn: "
        "apply_rope(x, freqs) here; no tables",
    ),
    (
        lambda: apply_rope(X, X[0, :, 0]),
        "rope: freqs must be a RopeFreqs, as methods.rope(head_dim) makes one, got Tensor; it",
    ),
    (
        lambda: rope_attention_with_kvcache(X, X, X, X, X, cache_seqlens=8),
        "rope_attention_with_kvcache: freqs must be a RopeFreqs, as methods.rope(head_dim) makes "
        "one, got Tensor; it takes the place of cosines and sines, which are computed from it and "
        "positions; by position it takes q, k_cache, v_cache, freqs, score, and got q = Tensor, "
        "k_cache = Tensor, v_cache = Tensor, freqs = Tensor, score = Tensor. flash_attn_with_kv",
    ),
    (
        lambda: rope_attention(X, X, X),
        "rope_attention: missing a required argument: 'freqs'; by position it takes q, k, v, "
        "freqs, score, and got q = Tensor, k = Tensor, v = Tensor. flash_attn_func(q, k, v, ",
    ),
    (
        lambda: methods.yarn(64, 4.0),
        "yarn: too many positional arguments; by position it takes dim, and got dim = int, float",
    ),
]


@pytest.mark.parametrize(("call", "told"), PLACES)
def test_what_stands_in_whose_place(call, told):
    with pytest.raises(TypeError, match=f"^{re.escape(told)}"):
        call()


def test_an_error_of_a_right_call_is_left_alone():
    with pytest.raises(TypeError, match=r"^rope: q must be a Tensor, got float$"):
        apply_rope(1.0, FREQS)
    assert inspect.signature(apply_rope).parameters["positions"].default is None


ATTRIBUTES = {
    "yarn": ": it is in extrope_kernels.methods",
    "rerope": ": it is in extrope_kernels.scores",
    "apply_rotary_pos_emb": "; apply_rotary_pos_emb(q, k, cos, sin) of transformers: apply_rope_qk",
    "flash_attn_func": "; flash_attn_func(q, k, v, causal=True) of flash-attn: rope_attention(q, k",
    "scaled_dot_product_attention": "; scaled_dot_product_attention(q, k, v) of PyTorch's SDPA: ro",
    "extendd": " (did you mean 'extend'?)",
    "nonsense": "",
}


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_a_name_that_the_package_does_not_have(name):
    message = f"module 'extrope_kernels' has no attribute '{name}'{ATTRIBUTES[name]}"
    end = "" if ATTRIBUTES[name] else "$"
    with pytest.raises(AttributeError, match=f"^{re.escape(message)}{end}"):
        getattr(extrope_kernels, name)


def test_all_names_are_listed():
    for name in ("extend", "check", "restore"):
        assert name in dir(extrope_kernels) and name in extrope_kernels.__all__
    found = {}
    exec("from extrope_kernels import *", found)
    assert found["extend"] is extrope_kernels.extend
