"""vLLM's attention backend CUSTOM on NVIDIA GPUs, by Triton's kernels. No GPU has run it yet."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    MultipleOf,
)

from .attention import ScoreImpl, ScoreMetadataBuilder, refuse_derived
from .settings import CACHES, takes_head


class ScoreBackend(AttentionBackend):
    """The backend for score methods and raw keys; the plugin chooses it."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = list(CACHES)
    forward_includes_kv_cache_update = True
    supports_head_size = staticmethod(takes_head)

    @staticmethod
    def get_name() -> str:
        """Return the backend's name in vLLM's table."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type:
        """Return the class of the layers."""
        return ScoreImpl

    @staticmethod
    def get_builder_cls() -> type:
        """Return the class of the metadata's builder."""
        return GraphBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        """Return the page sizes that the kernels take."""
        return [MultipleOf(16)]

    @classmethod
    def supports_sink(cls) -> bool:
        """Return True: sinks join the softmax."""
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """Return True: layers with a sliding window keep their plain rotation."""
        return True

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        """Return True for Ampere and later."""
        return capability.major >= 8


class GraphBuilder(ScoreMetadataBuilder):
    """The builder that allows CUDA graphs of decode steps with one token per request.

    A launch depends only on the shapes of its tensors; lengths stay on the device, in tensors that
    a replay reads again.
    """

    _cudagraph_support: ClassVar[AttentionCGSupport] = (
        AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    )
    reorder_batch_threshold = 1

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        refuse_derived(type(self), GraphBuilder)
        super().__init__(*args, **kwargs)
