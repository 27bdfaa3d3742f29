"""vLLM's attention backend for CPUs, replaced by ours in engines that need it.

vLLM has one CPU backend and ignores any other choice. So ours is registered in its place, and uses
vLLM's for all other engines.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.config import VllmConfig, get_current_vllm_config_or_none
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionMetadataBuilder,
)

from .attention import ScoreImpl, ScoreMetadataBuilder, attending_engine, refuse_derived
from .settings import CACHES, takes_head


class HeadwiseImpl(ScoreImpl):
    """The attention of one layer over pages in the layout of vLLM's CPU kernels.

    A head's keys in a block are contiguous, and so are its values. With keys and values side by
    side in each row, a decode step on 8,000 tokens took 1.4 times as long.
    """

    def _pages(self, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        blocks, heads, block_size, _ = kv_cache.shape
        halves = self._typed(kv_cache).view(blocks, heads, 2 * block_size, -1).chunk(2, 2)
        k_cache, v_cache = (half.transpose(1, 2) for half in halves)
        return k_cache, v_cache


class ScoreBackend(CPUAttentionBackend):
    """The backend in place of CPU_ATTN."""

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        """Return True if the engine's attention takes this head size."""
        if attending_engine(get_current_vllm_config_or_none()) is None:
            return super().supports_head_size(head_size)
        return takes_head(head_size)

    @classmethod
    def supports_kv_cache_dtype(cls, kv_cache_dtype: Any) -> bool:
        """Return True if the engine's attention takes this cache; vLLM's needs AVX-512 for fp8."""
        if attending_engine(get_current_vllm_config_or_none()) is None:
            return super().supports_kv_cache_dtype(kv_cache_dtype)
        return kv_cache_dtype is None or kv_cache_dtype in CACHES

    @staticmethod
    def get_impl_cls() -> type:
        """Return the class for the current engine's layers."""
        if attending_engine(get_current_vllm_config_or_none()) is None:
            return CPUAttentionBackend.get_impl_cls()
        return HeadwiseImpl

    @staticmethod
    def get_builder_cls() -> type:
        """Return the class that makes an engine's builder."""
        return _Builder


class _Builder(CPUAttentionMetadataBuilder):
    """vLLM's builder, or ours if the engine's attention is ours.

    vLLM derives others from it, such as one for layers that are not causal; those stay vLLM's.
    """

    def __new__(
        cls, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: Any
    ) -> Any:
        if attending_engine(vllm_config) is None:
            return super().__new__(cls)
        refuse_derived(cls, _Builder)
        return ScoreMetadataBuilder(kv_cache_spec, layer_names, vllm_config, device)
