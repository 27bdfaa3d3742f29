"""Our attention for any model: `model.set_attn_implementation("extrope")`.

Queries and keys come rotated by the layer, or not at all, so the ops attend by frequencies of 0.
Masks are those that transformers makes for `sdpa`, except for a window that the layer passes too.
Only causal rows, padded on the left or not, are ours; masks of other kinds (a vision tower, packed
rows, tokens that see later ones) are left to `sdpa`.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ... import rope_attention, rope_attention_with_kvcache
from .batch.padded import records
from .patch.generate import INTERFACE
from .probe.attention import KNOWN, no_freqs, softmax_options

_ON_MASK = "_extrope_causal"
# Arguments that causal rows do not need.
_KNOWN = KNOWN | {"cache", "past_key_values", "cache_position", "logits_to_keep"}


def register_interface() -> None:
    """Register "extrope" with transformers, for `attn_implementation` and its setter.

    `extend` does it too; call it for models that are not extended.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(INTERFACE, attention)
    AttentionMaskInterface.register(INTERFACE, make_mask)


def make_mask(**given: Any) -> Tensor | None:
    """Make the mask: transformers' mask function, with the arguments of its `sdpa_mask`.

    A prompt's mask has an entry per pair of tokens, 2.4 GB at 49,152. Without padding, causal rows
    need none, with or without a sliding window that layers pass. Chunks need one.
    """
    from transformers.masking_utils import sdpa_mask

    config = given.get("config")
    chunk = getattr(config, "attention_chunk_size", None)
    # Before transformers 5.4 positions give the number of queries.
    queries = given["q_length"] if "q_length" in given else len(given["cache_position"])
    prompt = given.get("allow_is_causal_skip") and queries == given["kv_length"]
    if prompt and given.get("local_size") != chunk and _layers_tell_windows(type(config)):
        given["local_size"] = None
    return sdpa_mask(**given)


@cache
def _layers_tell_windows(config: type) -> bool:
    """Return True if the layers of a config's model tell their attention of a sliding window.

    Phimoe's leave it to the mask.
    """
    modeling = sys.modules.get(config.__module__.replace(".configuration_", ".modeling_"))
    modules = [
        each
        for each in vars(modeling or nn).values()
        if isinstance(each, type) and issubclass(each, nn.Module)
    ]
    names = [{*_names_in(each.forward), *_names_in(each.__init__)} for each in modules]
    return any({"ALL_ATTENTION_FUNCTIONS", "sliding_window"} <= each for each in names)


def _names_in(function: Callable[..., Any]) -> Iterator[str]:
    """Yield the attributes, globals and arguments that a function names."""
    if inspect.isfunction(function := inspect.unwrap(function)):
        yield from function.__code__.co_names
        for each in function.__code__.co_consts:
            yield from map(str, each) if isinstance(each, tuple) else (str(each),)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend: the attention function of transformers' interface.

    query, key, value: (batch, heads, seqlen, head_dim). attention_mask: as for `sdpa`: None, or
    (batch or 1, 1, seqlen_q, seqlen_k), True where a query sees a key.
    Returns (batch, seqlen_q, heads, head_dim) and None, since there are no weights.
    Raises ValueError for sinks or a cap of the logits if rows are not causal.
    """
    q, k, v = (x.transpose(1, 2).to(value.dtype) for x in (query, key, value))
    call, out = softmax_options(module, options) | {"freqs": no_freqs(q)}, None
    if _may_be_causal(module, attention_mask, options):
        if attention_mask is None:
            out = _all_causal(q, k, v, call)
        elif not records(q, k, v):
            out = _masked(q, k, v, attention_mask, call)
    if out is not None:
        return out, None
    if options.get("s_aux") is not None or options.get("softcap") is not None:
        raise ValueError(
            f"{INTERFACE}: a layer with sinks or a soft cap must have a causal attention_mask, "
            f"padding on the left and no dropout, got others in {type(module).__name__}"
        )
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    window, tokens = call.get("sliding_window"), q.shape[1]
    if attention_mask is None and window and tokens == k.shape[1] and _causal(module, options):
        at = torch.arange(tokens, device=q.device)  # the mask that `make_mask` has left out
        attention_mask = ((at <= at[:, None]) & (at > at[:, None] - window))[None, None]
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


def _causal(module: nn.Module, options: Mapping[str, Any]) -> bool:
    causal = options.get("is_causal")
    return getattr(module, "is_causal", True) if causal is None else causal


def _may_be_causal(module: nn.Module, mask: Tensor | None, options: Mapping[str, Any]) -> bool:
    given = {name for name, value in options.items() if value is not None}
    if not _causal(module, options) or options.get("dropout") or not given <= _KNOWN:
        return False
    return mask is None or (mask.dtype == torch.bool and mask.dim() == 4 and mask.shape[1] == 1)


def _all_causal(q: Tensor, k: Tensor, v: Tensor, call: dict[str, Any]) -> Tensor:
    """Attend without a mask: one query sees all keys; of several, the first sees the first key."""
    if q.shape[1] > 1:
        k, v = k[:, : q.shape[1]], v[:, : q.shape[1]]
    elif not records(q, k, v):
        call.pop("sliding_window", None)  # a window's cache holds no more
        return rope_attention_with_kvcache(q, k, v, cache_seqlens=k.shape[1], **call)
    return rope_attention(q, k, v, keys_stored=True, **call)


def _masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, call: dict[str, Any]) -> Tensor | None:
    """Attend by a mask; return None if it is not that of causal rows."""
    if q.shape[1] == 1:
        window = None  # the keys begin where the query's window does
        call.pop("sliding_window", None)
    else:
        window = call.get("sliding_window")
    rows = _rows(mask, window)
    if rows is None:
        return None
    ends, pads = (x.expand(q.shape[0]).contiguous() for x in rows)
    return rope_attention_with_kvcache(q, k, v, cache_seqlens=ends, cache_leftpad=pads, **call)


def _rows(mask: Tensor, window: int | None) -> tuple[Tensor, Tensor] | None:
    """Return the ends and beginnings of each row's keys, int32; None if rows are not causal.

    Values are read on the host, once per forward. In a graph they cannot be read: it assumes, and
    asserts, that one query's keys lie in one piece.
    """
    if torch.compiler.is_compiling():
        if mask.shape[2] > 1:
            return None
        ends, pads, right = _read(mask, window)
        torch._assert_async(right, f"{INTERFACE}: a row's keys must lie in one piece")
        return ends, pads
    # Inference tensors do not tell if they have been written to since.
    key = None if mask.is_inference() else (window, mask._version)
    known = getattr(mask, _ON_MASK, {})
    if key is None or key not in known:
        ends, pads, right = _read(mask, window)
        known = {key: (ends, pads) if right else None}
        setattr(mask, _ON_MASK, known)
    return known[key]


def _read(mask: Tensor, window: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the ends and beginnings of a mask's rows, and if it is the mask of causal rows."""
    seen = mask[:, 0]
    new, keys = seen.shape[1:]
    at = torch.arange(keys, device=mask.device)
    last = seen[:, -1]
    ends = torch.where(last, at + 1, 0).amax(-1)
    pads = torch.where(seen.any(1), at, keys).amin(-1)
    pads = torch.minimum(pads, ends)
    query = (ends - new)[:, None, None] + torch.arange(new, device=mask.device)[:, None]
    want = (at <= query) & (at >= pads[:, None, None])
    if window is not None:
        want &= at > query - window
    return ends.to(torch.int32), pads.to(torch.int32), (want == seen).all()
