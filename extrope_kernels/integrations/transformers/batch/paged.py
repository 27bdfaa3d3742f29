"""The rows of continuous batching: one row for many requests, their keys in a paged cache.

transformers gathers a request's pages into one tensor per layer, for attentions without pages.
The ops read pages in place, so extended layers are told that there is nothing to gather:
`PagedAttentionCache.update` then only writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .... import rope_attention_with_kvcache
from . import Batch


@dataclass(frozen=True, eq=False)
class PagedBatch(Batch):
    """The tokens of one forward of continuous batching.

    positions: (1, total) int32 or int64, counted from each request's first token.
    arguments: transformers' arguments beside the tokens: cu_seq_lens_q, per kind of layers
        cu_seq_lens_k and max_length_k, and by the cache's allocators read_index, write_index, or
        block_table if the attention must write.
    tables: (requests, pages) int32 of the allocators used so far.
    """

    cache: Any
    positions: Tensor
    arguments: Mapping[str, Any]
    tables: dict[int, Tensor] = field(default_factory=dict)
    has_boundaries = True

    def for_layer(self, layer: nn.Module, arguments: dict[str, Any], attention: Any) -> Any:
        """Return a layer's arguments changed so that its cache writes and does not gather."""
        if "read_index" not in arguments:
            return arguments
        return {**arguments, "read_index": [x[:0] for x in arguments["read_index"]]}

    def attend(
        self, layer: nn.Module, q: Tensor, k: Tensor, v: Tensor, call: dict[str, Any]
    ) -> Tensor:
        allocator = self.cache.layer_to_allocator[layer.layer_idx]
        if allocator.layer_type != "full_attention" or "chunk_size" in call:
            raise ValueError(
                "extend: layers with a sliding window or chunks must not be extended under "
                "continuous batching, whose cache forgets their keys; extend with layers='full'"
            )
        k_pages, v_pages = allocator.get_cache_for_block_table(layer.layer_idx)
        table = self._table(allocator)
        if self.arguments.get("block_table") is not None:
            self._write(allocator, table, (k_pages, v_pages), (k, v))
        elif "past_key_values" in self.arguments:  # before 5.24 the attention writes, no layer does
            slots = self.arguments["write_index"][allocator.index]
            allocator.update(k[0], v[0], layer.layer_idx, slots[:0], slots)
        cu_seqlens_k = self.arguments["cu_seq_lens_k"][allocator.layer_type]
        call |= {
            "cache_seqlens": cu_seqlens_k.diff().to(torch.int32),
            "cu_seqlens_q": self.arguments["cu_seq_lens_q"].to(torch.int32),
            "block_table": table,
        }
        return rope_attention_with_kvcache(q[0], k_pages, v_pages, **call)[None]

    def _table(self, allocator: Any) -> Tensor:
        """Return the pages of each request, from the slots of its tokens."""
        if allocator.index in self.tables:
            return self.tables[allocator.index]
        table = self.arguments.get("block_table")
        if table is not None:
            table = table[allocator.index]
        else:
            slots = self.arguments["read_index"][allocator.index]
            if not slots.numel():  # no request has a past: all tokens are new
                slots = self.arguments["write_index"][allocator.index]
            size = allocator.tokens_per_page
            longest = self.arguments["max_length_k"][allocator.layer_type]
            firsts = torch.arange(0, max(longest, 1), size, device=slots.device)
            begins = self.arguments["cu_seq_lens_k"][allocator.layer_type][:-1, None]
            # Entries past a request's last page are never read, but must be indices.
            at = (begins + firsts).clamp(max=slots.numel() - 1)
            table = (slots[at] // size).to(torch.int32)
        self.tables[allocator.index] = table
        return table

    def _write(
        self,
        allocator: Any,
        table: Tensor,
        pages: tuple[Tensor, Tensor],
        new: tuple[Tensor, Tensor],
    ) -> None:
        """Write one token per request, if transformers leaves that to the attention."""
        requests, size = table.shape[0], allocator.tokens_per_page
        position = self.positions[0, :requests].long()
        page = table.gather(1, (position // size)[:, None])[:, 0].long()
        slots = page * size + position % size
        # Requests that pad the batch have no pages.
        slots = torch.where(page < 0, allocator.write_trash_index, slots)
        for cached, x in zip(pages, new):
            cached.flatten(0, 1).index_copy_(0, slots, x[0, :requests].to(cached.dtype))


def paged_batch(cache: Any, arguments: Mapping[str, Any]) -> PagedBatch | None:
    """Return the rows of a forward of continuous batching; None for any other.

    Raises ValueError before transformers 5.19, whose caches do not say where pages lie.
    """
    if not hasattr(cache, "layer_to_allocator"):
        if "cu_seq_lens_k" in arguments and hasattr(cache, "layer_index_to_group_indices"):
            raise ValueError(
                "extend: transformers must be >= 5.19 for continuous batching by a score method, "
                "got an older one"
            )
        return None
    return PagedBatch(cache, arguments["position_ids"], arguments)
