"""Attention of continuous batching: one row for many requests, their keys in a paged cache.

transformers gathers the pages of all requests into one tensor a layer, or hands over a block table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ... import rope_attention_with_kvcache


def attend(
    q: Tensor, k: Tensor, v: Tensor, options: Mapping[str, Any], call: dict[str, Any]
) -> Tensor:
    """Attend from the new tokens of all requests: (1, new, heads, head_dim).

    q: (1, new, heads, head_dim). k, v: (1, keys, heads, head_dim), gathered by transformers, or the
    new tokens' alone with a block table. options: the layer's, from transformers' cache.
    Raises ValueError before transformers 5.24, whose layers leave the cache to the attention.
    """
    of_keys, table = options.get("cu_seq_lens_k"), options.get("block_table")
    if not isinstance(of_keys, Tensor):
        raise ValueError(
            "extend: transformers must be >= 5.24 for continuous batching by a score method, got "
            "an older one"
        )
    cu_seqlens, lengths = options["cu_seq_lens_q"].to(torch.int32), of_keys.diff().to(torch.int32)
    call |= {"cu_seqlens_q": cu_seqlens, "cache_seqlens": lengths}
    if call["rotated"] is None:
        call["stored"] = "raw"
    if table is not None:
        pages = options["k_cache"], options["v_cache"]
        _write(pages, table, lengths, (k[0], v[0]))
    else:  # of pages of one token
        longest = torch.arange(max(options["max_length_k"], 1), device=k.device)
        table = (of_keys[:-1, None] + longest).clamp(max=k.shape[1] - 1).to(torch.int32)
        pages = k[0][:, None], v[0][:, None]
    return rope_attention_with_kvcache(q[0], *pages, block_table=table, **call)[None]


def _write(
    pages: tuple[Tensor, Tensor], table: Tensor, lengths: Tensor, new: tuple[Tensor, Tensor]
) -> None:
    """Write one token per request, which transformers leaves to the attention with a table."""
    last, size = (lengths - 1).clamp(min=0).long(), pages[0].shape[1]
    page = table.gather(1, (last // size)[:, None])[:, 0].long()
    # Requests that pad the batch have no pages.
    requests = ((lengths > 0) & (page >= 0)).nonzero()[:, 0]
    slots = (page * size + last % size)[requests]
    for cached, x in zip(pages, new, strict=True):
        cached.flatten(0, 1).index_copy_(0, slots, x[requests].to(cached.dtype))
