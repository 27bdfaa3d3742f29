"""vLLM's attention backend for CPUs, with ours in engines that attend by a score method.

vLLM knows one backend there, whatever is asked for, so ours is registered in its place and hands
every other engine on to it.

Chunks of a prompt attend to keys gathered from their pages, a copy that costs a hundredth of the
attention: the kernel without pages multiplies blocks of keys, in 16 bits by the processor's own
instructions for them, where the one over a cache is made for single queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import VllmConfig, get_current_vllm_config_or_none
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionMetadataBuilder,
)

from ...ops.attention import attend
from ...ops.decode import attend_with_kvcache
from ...ops.rope import rope_append_kvcache
from .attention import ScoreImpl, ScoreMetadata, ScoreMetadataBuilder, score_engine
from .engine import engine_of
from .settings import NAME

# Queries of a request from which on gathering its keys pays, on a cache of 8,000 tokens.
_CHUNK = 16


@dataclass
class Chunk:
    """New tokens of one request: queries start .. stop - 1 of the batch, behind `past` others."""

    request: int
    start: int
    stop: int
    past: int


@dataclass
class ChunkedMetadata(ScoreMetadata):
    """steps: how many of the requests, the first ones, attend over the cache; then come chunks."""

    steps: int
    chunks: list[Chunk]


class ChunkedBuilder(ScoreMetadataBuilder):
    """Has vLLM sort a batch: requests with few new tokens first."""

    reorder_batch_threshold: ClassVar[int] = _CHUNK - 1

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> ChunkedMetadata:
        """Return the metadata of one forward."""
        made = super().build(common_prefix_len, common_attn_metadata, fast_build)
        bounds, past = made.cu_seqlens.tolist(), made.past.tolist()
        steps = 0
        while steps < len(past) and bounds[steps + 1] - bounds[steps] < _CHUNK:
            steps += 1
        chunks = [
            Chunk(n, bounds[n], bounds[n + 1], past[n])
            for n in range(steps, len(past))
            if bounds[n + 1] > bounds[n]
        ]
        return ChunkedMetadata(**vars(made), steps=steps, chunks=chunks)


class ChunkedImpl(ScoreImpl):
    """One layer's attention."""

    def _write_and_attend(
        self, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, batch: ChunkedMetadata
    ) -> Tensor:
        if not batch.chunks:
            return super()._write_and_attend(query, key, value, kv_cache, batch)
        k_cache, v_cache = self._pages(kv_cache)
        rope_append_kvcache(
            None,
            key,
            value,
            k_cache,
            v_cache,
            self.freqs,
            score=self.score,
            cache_seqlens=batch.past,
            cu_seqlens=batch.cu_seqlens,
            block_table=batch.block_table,
            interleaved=self.options["interleaved"],
        )
        out = torch.zeros_like(query)
        if batch.steps:
            stop = batch.chunks[0].start
            cu_seqlens = batch.cu_seqlens[: batch.steps + 1]
            out[:stop] = attend_with_kvcache(
                self.score,
                query[:stop],
                k_cache,
                v_cache,
                self.freqs,
                cache_seqlens=batch.past[: batch.steps] + cu_seqlens.diff(),
                block_table=batch.block_table[: batch.steps],
                cu_seqlens_q=cu_seqlens,
                **self.options,
            )
        for chunk in batch.chunks:
            rows = slice(chunk.start, chunk.stop)
            out[rows] = self._attend_to_gathered(query[None, rows], kv_cache, batch, chunk)[0]
        return out

    def _pages(self, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        k_cache, v_cache = (half.transpose(1, 2) for half in _halves(kv_cache))
        return k_cache, v_cache

    def _attend_to_gathered(
        self, query: Tensor, kv_cache: Tensor, batch: ScoreMetadata, chunk: Chunk
    ) -> Tensor:
        """(1, tokens, heads, head_size); keys before every window are left where they are."""
        block_size = kv_cache.shape[2]
        total = chunk.past + chunk.stop - chunk.start
        first = 0
        if self.sliding_window is not None:
            first = max(chunk.past + 1 - self.sliding_window, 0) // block_size
        blocks = batch.block_table[chunk.request, first : -(-total // block_size)]
        start = first * block_size
        k, v = (
            # Head by head, so that a gathered one is contiguous.
            half.transpose(0, 1)[:, blocks].flatten(1, 2)[None, :, : total - start].transpose(1, 2)
            for half in _halves(kv_cache)
        )
        options = self.options | {"q_start": chunk.past, "k_start": start}
        return attend(self.score, query, k, v, self.freqs, keys_stored=True, **options)


def _halves(kv_cache: Tensor) -> tuple[Tensor, ...]:
    """(blocks, kv_heads, block_size, head_size) of keys and of values.

    As vLLM's own kernels lay them out on a CPU: a head's keys in a block are contiguous, and so are
    its values. Keys beside values in each row made a decode step on 8,000 tokens 1.4 times as long.
    """
    blocks, heads, block_size, _ = kv_cache.shape
    return kv_cache.view(blocks, heads, 2 * block_size, -1).chunk(2, 2)


class ScoreBackend(CPUAttentionBackend):
    """In place of CPU_ATTN."""

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        """Say what the engine's attention takes."""
        if score_engine(get_current_vllm_config_or_none()) is None:
            return super().supports_head_size(head_size)
        return head_size % 8 == 0 and head_size <= 256

    @staticmethod
    def get_impl_cls() -> type:
        """Return the class of the layers that are being made."""
        if score_engine(get_current_vllm_config_or_none()) is None:
            return CPUAttentionBackend.get_impl_cls()
        return ChunkedImpl

    @staticmethod
    def get_builder_cls() -> type:
        """Return what makes the builder of an engine."""
        return _Builder


class _Builder(CPUAttentionMetadataBuilder):
    """vLLM's builder, or where the engine attends by a score method ours."""

    def __new__(
        cls, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: Any
    ) -> Any:
        engine = engine_of(vllm_config)
        if engine is not None and not engine.heads:
            raise ValueError(f"{NAME}: the model must rotate by vLLM's rotary layer, got none")
        builder = CPUAttentionMetadataBuilder
        if score_engine(vllm_config) is not None:
            builder = ChunkedBuilder
        return builder(kv_cache_spec, layer_names, vllm_config, device)
