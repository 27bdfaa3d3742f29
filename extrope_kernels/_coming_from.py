"""What other libraries name, and what stands for it here.

docs/guide/coming_from.md shows these tables, and errors quote them (`_names`).
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import NamedTuple


class Row(NamedTuple):
    """A row of a library's table, in Markdown.

    theirs, here: the name there, and what stands for it here. note: what differs.
    names: keywords and functions of theirs that the row is about.
    """

    theirs: str
    here: str
    note: str
    names: tuple[str, ...]


def _row(theirs: str, here: str, note: str = "", also: str = "") -> Row:
    """Return a row about the first name in each piece of code of `theirs`, and those in `also`."""
    found = [] if here == "the same" else re.findall(r"`(\w+)", theirs)
    return Row(theirs, here, note, (*found, *also.split()))


LIBRARIES: dict[str, tuple[Row, ...]] = {
    "flash-attn": (
        _row(
            "`apply_rotary_emb(x, cos, sin)`",
            "`apply_rope(x, freqs)`",
            "no tables: cosines and sines are computed from `freqs` and `positions`",
            "cos sin",
        ),
        _row(
            "`seqlen_offsets=n`",
            "`positions=n`",
            "an int, or (batch,)",
        ),
        _row(
            "`flash_attn_func(q, k, v, causal=True)`",
            "`rope_attention(q, k, v, freqs)`",
            "q and k unrotated; always causal; same layout (batch, seqlen, heads, head_dim)",
        ),
        _row("`causal=True`", "always", "aligned at the end where q is shorter than k"),
        _row(
            "`flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k)`",
            "`rope_attention(q, k, v, freqs, cu_seqlens=)`",
            "one set of boundaries; the longest sequence need not be given",
            "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k cu_seqlens max_seqlen",
        ),
        _row(
            "`window_size=(w - 1, 0)`",
            "`sliding_window=w`",
            "w keys, the query's own among them",
        ),
        _row("`softmax_scale`, `softcap`", "the same"),
        _row(
            "`return_attn_probs=True` for the log-sum-exp",
            "`return_lse=True`",
            "(batch, heads_q, seqlen_q) float32",
            "return_softmax_lse",
        ),
        _row(
            "`flash_attn_with_kvcache(q, k_cache, v_cache, k, v, rotary_cos, rotary_sin)`",
            "`rope_attention_with_kvcache(q, k_cache, v_cache, freqs, cache_seqlens=, k=, v=)`",
            "the cache holds keys as the score method stores them",
            "rotary_cos rotary_sin",
        ),
        _row("`cache_seqlens`, `block_table`, `cache_leftpad`", "the same"),
        _row("`rotary_interleaved=True`", "`interleaved=True`", "pairs (2i, 2i + 1)"),
        _row("`alibi_slopes`, `dropout_p`, `deterministic`", "none"),
    ),
    "PyTorch's SDPA": (
        _row(
            "`scaled_dot_product_attention(q, k, v)`",
            "`rope_attention(q, k, v, freqs)`",
            "(batch, seqlen, heads, head_dim): of (batch, heads, seqlen, head_dim) take "
            "`q.transpose(1, 2)`, without a copy; q and k unrotated, the attention rotates them",
            "query key value",
        ),
        _row(
            "`is_causal=True`",
            "always",
            "aligned at the end where q is shorter than k; SDPA aligns at the beginning",
        ),
        _row("`scale`", "`softmax_scale=`"),
        _row("`enable_gqa=True`", "always", "heads_k divides heads_q"),
        _row(
            "`attn_mask`",
            "`cu_seqlens=`, `sliding_window=`, `q_start=`, `k_start=`",
            "no other masks",
            "attention_mask mask",
        ),
    ),
    "transformers": (
        _row(
            "`apply_rotary_pos_emb(q, k, cos, sin)`",
            "`apply_rope_qk(q, k, freqs)`",
            "on (batch, seqlen, heads, head_dim)",
        ),
        _row("`position_ids`", "`positions=`", "(batch, seqlen), or None for 0, 1, 2, ..."),
        _row(
            '`rope_parameters={"rope_type": "yarn", "factor": 4.0, ...}`',
            "`methods.yarn(dim, factor=4.0, ...)`",
            "`methods.from_hf_config(config)` reads what is there",
            "rope_scaling",
        ),
        _row(
            '`rope_type` "default", "linear", "dynamic", "llama3", "longrope", "proportional"',
            "`rope`, `pi`, `dynamic_ntk`, `llama3`, `longrope`, `proportional`",
            "`extend` takes the first three too",
        ),
        _row("`rope_theta`", "`base=`", "", "theta"),
        _row("`head_dim`", "`dim=`, the first argument", "how many dims of a head rotate"),
        _row(
            "`partial_rotary_factor=p`",
            "`dim=` p * head_dim",
            "for `proportional` the parameter itself",
        ),
        _row("`attention_factor`", "`RopeFreqs.attention_factor`"),
        _row(
            "a changed `rope_parameters` and a new load",
            '`extend(model, "yarn", factor=4.0)`',
            "on the loaded model; `handle.restore()`",
        ),
        _row(
            '`attn_implementation="sdpa"`',
            '`register_interface()`, then `attn_implementation="extrope"`',
            "[guide](transformers.md)",
        ),
        _row("`attn_logit_softcapping` of Gemma 2", "`softcap=`"),
        _row("`s_aux`, the sinks of GPT-OSS", "`sinks=`"),
    ),
    "vLLM": (
        _row("`scaling_factor`", "`factor=`", "", "rope_scaling_factor"),
        _row("`kv_cache`", "`k_cache=`, `v_cache=`", "two tensors", "key_cache value_cache"),
    ),
    "the authors of SelfExtend": (
        _row("`group_size`", "`factor=`", "`scores.self_extend(window, factor)`", "group_size_1"),
        _row("`window_size`", "`window=`", "", "neighbor_window neighbor_size group_size_2"),
    ),
}


def stands_for(name: str, arguments: Collection[str] | None = None) -> str | None:
    """Return what stands here for a name of another library, in a line; None if nothing is known.

    arguments: of the function that the name was given to; None for a name of a module.
    """
    for library, rows in LIBRARIES.items():
        for row in rows:
            ours = re.findall(r"`(?:[\w.]+\(.*?)?(\w+)=", row.here)
            if arguments is None:
                fits = "(" in row.here
            else:
                fits = not ours or not set(ours).isdisjoint(arguments)
            if name in row.names and fits:
                return said(library, row)
    return None


def stand_in_for(function: str) -> str | None:
    """Return which functions of other libraries one of ours stands for, in a line."""
    for library, rows in LIBRARIES.items():
        for row in rows:
            if row.here.startswith(f"`{function}("):
                return said(library, row)
    return None


def said(library: str, row: Row) -> str:
    """Return a row in a line of plain text."""
    note = f"; {row.note}" if row.note else ""
    return f"{row.theirs} of {library}: {row.here} here{note}".replace("`", "")
