"""Attention layers of vLLM by a score method or over raw keys, shared by all platforms.

A layer writes keys and values and attends for all requests of a batch: prefill chunks, decode steps
and padding, on a GPU in one call. vLLM's pages hold keys as the method stores them, so a cached
prefix serves every request that begins with it. Layers with a sliding window keep their plain
rotation. In a raw cache all layers' keys are unrotated, and frequencies may follow each request's
present length.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import (
    AttentionImpl,
    AttentionImplBase,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)

from ... import RopeFreqs, rope_attention_with_kvcache
from .engine import Engine, engine_of
from .lengths import Lengths
from .settings import CACHES, FP8, NAME, OURS, takes_head


def attending_engine(config: VllmConfig | None) -> Engine | None:
    """Return the engine of a VllmConfig if its attention is ours."""
    engine = engine_of(config)
    return engine if engine is not None and engine.settings.attends else None


def attend_for(model: Any, engine: Engine, *, whole: bool) -> None:
    """Give a model's attention layers their engine, so that they agree with its rotary layers.

    vLLM builds the language model inside a larger one from a copy of the configuration, which has
    its own engine. whole: not a stage of a pipeline.
    Raises ValueError for attention layers of another backend, which would not rotate queries and
    keys, and if a score method would change nothing.
    """
    if not engine.settings.attends:
        return
    impls = [getattr(module, "impl", None) for module in model.modules()]
    impls = [impl for impl in impls if isinstance(impl, AttentionImplBase)]
    others = {type(impl).__qualname__ for impl in impls if not isinstance(impl, ScoreImpl)}
    if others:
        raise ValueError(
            f"{NAME}: attention layers must be of the plugin's backend for {OURS}, "
            f"got {', '.join(sorted(others))}"
        )
    for impl in impls:
        impl.engine = engine
    if whole and engine.settings.score and all(impl.sliding_window is not None for impl in impls):
        raise ValueError(
            f"{NAME}: some layers must have no sliding window for a score method, got none"
        )


@dataclass
class ScoreMetadata:
    """The batch of one forward.

    num_actual_tokens: without padding.
    cu_seqlens: (requests + 1,) int32, the boundaries of each request's new tokens; all 0 in a run
        that must not write.
    block_table: (requests, blocks) int32.
    lengths: tensors that depend on the requests' lengths.
    """

    num_actual_tokens: int
    cu_seqlens: Tensor
    block_table: Tensor
    lengths: Lengths

    @property
    def past(self) -> Tensor:
        """Each request's tokens that are in the cache already: (requests,) int32."""
        return self.lengths.past[: len(self.cu_seqlens) - 1]


class ScoreMetadataBuilder(AttentionMetadataBuilder[ScoreMetadata]):
    """Builds the metadata of a group of layers, once per forward, without reading the device."""

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: Any
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        requests = vllm_config.scheduler_config.max_num_seqs
        graphs = vllm_config.compilation_config.max_cudagraph_capture_size or 0
        tokens = max(vllm_config.scheduler_config.max_num_batched_tokens, graphs)
        engine = attending_engine(vllm_config)
        kinds = {name: kind.by_length for name, kind in engine.kinds.items() if kind.by_length}
        scale_from = engine.settings.scale_from
        self._lengths = Lengths(kinds, scale_from, max(requests, graphs), tokens, device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> ScoreMetadata:
        """Return the metadata of one forward."""
        common = common_attn_metadata
        if common.causal is not True:
            raise ValueError(
                f"{NAME}: attention must be causal for {OURS}, got causal={common.causal}"
            )
        starts = common.query_start_loc
        requests = starts.shape[0] - 1
        lengths = self._lengths
        lengths.update(starts, common.seq_lens)
        # vLLM's dummy runs, which capture graphs or keep an idle rank in step, have no slots, but
        # their pages may belong to a request: without new tokens nothing is written.
        any_slot = (common.slot_mapping >= 0).any()
        cu_seqlens = torch.mul(starts, any_slot, out=lengths.cu_seqlens[: requests + 1])
        return ScoreMetadata(
            common.num_actual_tokens,
            cu_seqlens,
            common.block_table_tensor,
            lengths,
        )


def refuse_derived(builder: type, ours: type) -> None:
    """Refuse builders that vLLM derives from ours for layers that see another batch."""
    if builder is not ours:
        raise ValueError(
            f"{NAME}: attention layers must see a request's own tokens for {OURS}, "
            f"got some whose batch is made by {builder.__name__}"
        )


class ScoreImpl(AttentionImpl):
    """The attention of one layer."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        _refuse(
            head_size=not takes_head(head_size),
            alibi_slopes=alibi_slopes is not None,
            attn_type=attn_type != AttentionType.DECODER,
            kv_sharing_target_layer_name=kv_sharing_target_layer_name is not None,
            kv_cache_dtype=kv_cache_dtype not in CACHES,
        )
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.sliding_window = sliding_window
        self.sinks = sinks
        self.engine = attending_engine(get_current_vllm_config())
        self.score = self.engine.settings.score if sliding_window is None else None
        self.freqs: RopeFreqs | None = None
        self.kind: str | None = None
        self.options: dict[str, Any] = {
            "softmax_scale": self.scale,
            "softcap": float(logits_soft_cap or 0.0),
            "sliding_window": sliding_window,
            "log_n": self.engine.settings.log_n if sliding_window is None else None,
            "stored": "raw" if self.engine.settings.raw else None,
        }

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Read the sinks, which are loaded by now."""
        if self.sinks is not None:
            self.options["sinks"] = self.sinks.detach().float()

    def do_kv_cache_update(self, layer: Any, *_: Any) -> None:
        """Do nothing: `forward` writes too."""

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor | None,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: ScoreMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Write key and value, then attend from query into output.

        query: (tokens, heads, head_size); key, value: (tokens, kv_heads, head_size).
        kv_cache: (blocks, kv_heads, block_size, 2 * head_size), in fp8 with the layer's scales.
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError(
                f"{NAME}: outputs must not be quantized in the attention, got a scale"
            )
        if key is None:
            raise ValueError(
                f"{NAME}: a layer must have keys of its own for {OURS}, got none for "
                f"{layer.layer_name}"
            )
        if self.freqs is None:
            self._prepare(layer, query.device)
        if attn_metadata is None:  # a run that measures memory
            return output.fill_(0)
        k_cache, v_cache = self._pages(kv_cache)
        lengths, past = attn_metadata.lengths, attn_metadata.past
        inv_freq = lengths.inv_freq(self.kind, len(past))
        freqs = self.freqs if inv_freq is None else replace(self.freqs, inv_freq=inv_freq)
        found = rope_attention_with_kvcache(
            query,
            k_cache,
            v_cache,
            freqs,
            self.score,
            cache_seqlens=past,
            k=key,
            v=value,
            block_table=attn_metadata.block_table,
            cu_seqlens_q=attn_metadata.cu_seqlens,
            query_scale=lengths.query_scale(self.kind, self.score is not None, len(query)),
            **self.options,
        )
        return output.copy_(found)

    def _pages(self, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        """Return views of keys and of values: (blocks, block_size, kv_heads, head_size)."""
        k_cache, v_cache = self._typed(kv_cache).transpose(1, 2).chunk(2, -1)
        return k_cache, v_cache

    def _typed(self, kv_cache: Tensor) -> Tensor:
        # vLLM allocates fp8 as bytes.
        return kv_cache.view(torch.float8_e4m3fn) if self.kv_cache_dtype in FP8 else kv_cache

    def _prepare(self, layer: Any, device: torch.device) -> None:
        """Find the layer's frequencies; by now all of vLLM's rotary layers exist."""
        heads = self.engine.heads
        sizes = {size for size, _ in heads}
        pairings = {interleaved for _, interleaved in heads}
        if self.head_size not in sizes or len(pairings) != 1:
            raise ValueError(
                f"{NAME}: the model must rotate heads of {self.head_size} by vLLM's rotary layer, "
                f"got layers for (head_dim, interleaved) {sorted(heads)}"
            )
        self.kind = self.engine.kind_of(extract_layer_index(layer.layer_name))
        rotated = self.engine.kinds[self.kind]
        if rotated.extended != (self.sliding_window is None) and None not in self.engine.kinds:
            raise ValueError(
                f"{NAME}: layer_types must say which layers have a sliding window, "
                f"got others for {layer.layer_name}"
            )
        self.options["interleaved"] = pairings.pop()
        if self.kv_cache_dtype in FP8:
            for name in "k_scale", "v_scale":
                scale = getattr(layer, f"_{name}").to(device, torch.float32)
                self.options[name] = scale.expand(self.num_kv_heads).contiguous()
        self.freqs = rotated.freqs.to(device)


def _refuse(**wrong: Any) -> None:
    """Raise ValueError for the first unsupported argument of an attention layer."""
    for name, found in wrong.items():
        if found:
            raise ValueError(f"{NAME}: a score method does not support this layer's {name}")
