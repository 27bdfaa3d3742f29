"""The layers' calls of their attention, and the attention of a score method in its place.

A rotary embedding returns an `Attending` in place of its tables, so it reaches every layer as
tables would. A pre-hook of an extended layer replaces it by tables that rotate keys as a cache
stores them, and puts it in the place of the mask, which every layer passes to its attention. A
pre-hook of any other layer replaces it by that layer's own tables. Forwards share nothing, even if
a layer is recomputed for its gradients.

However a layer calls its attention, the object in the mask's place computes it:
`attend(layer, q, k, v, options)`, with q, k, v of (batch, heads, seqlen, head_dim) and the options
of transformers' interface, returns (batch, seqlen, heads, head_dim).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ... import RopeFreqs, apply_rope, scores
from ...scores import Score
from .find import Override, argument_names, forward_of
from .packed import BOUNDARIES, PackedRows
from .paged import PagedRows
from .rows import Rows

ATTENTION = "extrope_score"  # in the config of a layer that attends by a score method
# The object in the mask's place is passed by this name too, as accelerate removes masks.
ARGUMENT = "extrope_attending"
# Options that layers pass to their attention: also options of the ops, or without effect here.
KNOWN = {
    *("scaling", "dropout", "is_causal", "softcap", "s_aux", "sliding_window", "position_ids"),
    *("use_cache", "output_attentions", "output_hidden_states", "return_dict"),
    "output_router_logits",
}
_METHOD = ["self", "query", "key", "value", "attention_mask"]
_sdpa = nn.functional.scaled_dot_product_attention


class Call:
    """A call through transformers' registered functions, by the name in the layer's config."""

    attention = ATTENTION

    def overrides(self, layer: nn.Module) -> list[Override]:
        """Return attributes that make the layer use the object in the mask's place."""
        config = copy.copy(layer.config)  # everything in it is shared
        config._attn_implementation_internal = self.attention
        return [(layer, "config", config)]

    def mask(self, layer: nn.Module, attending: Any) -> Any:
        """Return the object for the mask's place that leads to `attending`."""
        return attending

    def own(
        self, layer: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, options: dict
    ) -> Tensor | None:
        """Attend by the layer's own function; None if it has none."""
        function = forward_of(layer).__globals__.get("eager_attention_forward")
        return function and function(layer, q, k, v, mask, **options)[0]


class SdpaCall(Call):
    """A call of PyTorch's function, for layers whose config names it (Falcon)."""

    attention = "sdpa"

    def mask(self, layer: nn.Module, attending: Any) -> Any:
        return _SdpaMask(layer, attending)

    def own(
        self, layer: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, options: dict
    ) -> Tensor:
        return _sdpa(q, k, v, mask, scale=options["scaling"], enable_gqa=True).transpose(1, 2)


class MethodCall(Call):
    """A call of the layer's own method of (query, key, value, mask): GPT-NeoX-Japanese."""

    def __init__(self, name: str) -> None:
        self.name = name

    def overrides(self, layer: nn.Module) -> list[Override]:
        return [(layer, self.name, partial(_attend_by_mask, layer))]

    def own(
        self, layer: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, options: dict
    ) -> Tensor:
        return getattr(type(layer), self.name)(layer, q, k, v, mask)[0].transpose(1, 2)


def call_of(module: nn.Module) -> Call | None:
    """Return how a module calls its attention; None if no op can replace that."""
    forward = forward_of(module)
    if forward is None or "attention_mask" not in argument_names(module):
        return None
    names = forward.__code__.co_names
    if "config" in vars(module):
        if "ALL_ATTENTION_FUNCTIONS" in names:
            return Call()
        if _sdpa.__name__ in names:
            return SdpaCall()
    for name in names:
        method = inspect.getattr_static(type(module), name, None)
        if inspect.isfunction(method) and list(inspect.signature(method).parameters) == _METHOD:
            return MethodCall(name)
    return None


def calls_in(owner: nn.Module) -> dict[nn.Module, Call]:
    """Return an owner's modules whose attention an op can replace, with their calls of it."""
    calls = ((module, call_of(module)) for module in owner.modules())
    return {module: call for module, call in calls if call is not None}


def register_attention() -> None:
    """Register the attention of score methods by name in transformers."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _attention)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """Attend by the object in the mask's place: a function of transformers' interface."""
    attention_mask = options.pop(ARGUMENT, attention_mask)
    if attention_mask is None or isinstance(attention_mask, Tensor):
        raise RuntimeError(
            f"extend: {type(module).__name__} must be called by its model, got a direct call"
        )
    return attention_mask.attend(module, query, key, value, options), None


def _attend_by_mask(
    layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any
) -> tuple[Tensor, None]:
    options = {"dropout": dropout_of(layer) if layer.training else 0.0}
    return attention_mask.attend(layer, query, key, value, options).transpose(1, 2), None


@dataclass(frozen=True, eq=False)
class _SdpaMask:
    """A mask that takes over PyTorch's attention function."""

    layer: nn.Module
    attending: Any

    def __getitem__(self, index: Any) -> _SdpaMask:
        """Return itself: before 5.2, transformers' layers cut their mask to the number of keys."""
        return self

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Tensor:
        if function is not _sdpa:
            return NotImplemented
        return _sdpa_by_mask(*args, **(kwargs or {}))


def _sdpa_by_mask(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,  # ignored: the numbers of heads tell
) -> Tensor:
    if is_causal:
        raise ValueError("extend: is_causal must be False beside a mask, got True")
    options = {"scaling": scale, "dropout": dropout_p}
    out = attn_mask.attending.attend(attn_mask.layer, query, key, value, options)
    return out.transpose(1, 2)


def dropout_of(layer: nn.Module) -> float:
    """Return a layer's dropout probability; 0 outside training."""
    dropout = getattr(layer, "attention_dropout", 0.0)
    return dropout.p if isinstance(dropout, nn.Dropout) else dropout


def softmax_options(module: nn.Module, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return a layer's attention options as options of the ops."""
    found = {"softmax_scale": options.get("scaling")}
    if found["softmax_scale"] is None:
        found["softmax_scale"] = getattr(module, "scaling", None)
    if options.get("softcap") is not None:
        found["softcap"] = float(options["softcap"])
    if options.get("s_aux") is not None:
        sinks = options["s_aux"]
        found["sinks"] = sinks.to(torch.promote_types(sinks.dtype, torch.float32))
    # Qwen2 MoE's layers have their window only in the mask.
    if window := options.get("sliding_window", getattr(module, "sliding_window", None)):
        found["sliding_window"] = window
    return found


def no_freqs(x: Tensor) -> RopeFreqs:
    """Return frequencies of 0, for queries and keys that need no rotation by an op."""
    return RopeFreqs(torch.zeros(1, dtype=torch.float32, device=x.device))


def refuse_options(module: nn.Module, options: Mapping[str, Any], packed: bool = False) -> None:
    """Raise ValueError for options that change the attention and may be set at any time.

    packed: the rows are packed, and know the boundaries of sequences.
    """
    if options.get("dropout"):
        raise ValueError(
            "extend: a model in training must have attention_dropout 0, "
            f"got {options['dropout']} in {type(module).__name__}"
        )
    if options.get(BOUNDARIES) is not None and not packed:
        raise ValueError(
            f"extend: {BOUNDARIES} must be left out, got one; give each sequence a row"
        )


@dataclass(frozen=True)
class Heads:
    """The rotation of an extended layer's heads, and the bounds of the keys that they see.

    start: the first rotated dim; the frequencies tell how many there are.
    interleaved: the pairing of dims. sign: -1 if pairs are rotated backwards. scaled: False if a
    norm after the rotation undoes the attention factor (Llama 4).
    chunk_size: in tokens, if the layer attends in chunks. sliding_window: in tokens, if its cache
    keeps no more, even if its attention gets no such option.
    """

    start: int
    interleaved: bool
    sign: int
    scaled: bool = True
    chunk_size: int | None = None
    sliding_window: int | None = None


class Attending:
    """A score method, frequencies, the rows of a batch, and tables for both kinds of layers.

    It is no dataclass, since FSDP casts the tensors in those.

    scale_from: the length from which logits grow (`query_scale.qwen_1m`), or None.
    positions: stored positions of keys, (batch or 1, seqlen), or (pairs, batch or 1, seqlen) if
        each pair has its own; None if keys stay raw.
    raw_queries: the tables for extended layers rotate only keys.
    stored, own: the position embeddings for extended layers, and those for the others.
    heads: the heads of the layer whose attention this is.
    """

    def __init__(
        self,
        score: Score,
        log_n: float | None,
        scale_from: int | None,
        freqs: RopeFreqs,
        rows: Any,
        positions: Tensor | None,
        raw_queries: bool,
        stored: Any = None,
        own: Any = None,
        heads: Heads | None = None,
    ) -> None:
        self.score = score
        self.log_n = log_n
        self.scale_from = scale_from
        self.freqs = freqs
        self.rows = rows
        self.positions = positions
        self.raw_queries = raw_queries
        self.stored = stored
        self.own = own
        self.heads = heads

    def changed(self, **changes: Any) -> Attending:
        """Return a copy with other values of some attributes."""
        return Attending(**{**vars(self), **changes})

    def of(self, heads: Heads) -> Attending:
        """Return the attention for one layer."""
        freqs = self.freqs
        if heads.sign < 0:
            freqs = replace(freqs, inv_freq=-freqs.inv_freq)
        if not heads.scaled:
            freqs = replace(freqs, attention_factor=1.0)
        return self.changed(heads=heads, freqs=freqs)

    def __getitem__(self, index: Any) -> Attending:
        """Return the attention of the last tokens, sliced like tables of (batch, seqlen, dim).

        In layers that reuse other layers' keys, a model computes only the requested tokens.
        """
        if not isinstance(self.rows, Rows):
            raise ValueError(
                "extend: a model with layers that compute only the last tokens must run without "
                "a static cache in a graph, continuous batching and packed rows, got one of them"
            )
        tokens = range(self.rows.new)[index[1]]
        last = len(tokens)
        if tokens != range(self.rows.new)[self.rows.new - last :]:
            raise ValueError(f"extend: tables must be sliced to the last tokens, got {index[1]}")

        def sliced(tables: Any) -> Any:
            return None if tables is None else type(tables)(each[index] for each in tables)

        positions = None if self.positions is None else self.positions[..., tokens.start :]
        rows, stored, own = self.rows.last(last), sliced(self.stored), sliced(self.own)
        return self.changed(rows=rows, positions=positions, stored=stored, own=own)

    def to(self, device: torch.device | str | int, **_: Any) -> Attending:
        """Move to `device`: accelerate's hooks call this if a model spans several devices."""

        def move(value: Any) -> Any:
            if isinstance(value, (tuple, list)):
                return type(value)(move(each) for each in value)
            return value.to(device) if hasattr(value, "to") else value

        moved = ("freqs", "rows", "positions", "stored", "own")
        return self.changed(**{name: move(getattr(self, name)) for name in moved})

    def attend(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, options: Mapping[str, Any]
    ) -> Tensor:
        """Attend from queries in the layer's rotation to keys and values in the cache's form.

        q, k, v: (batch, heads, seqlen, head_dim), the queries the last of the keys' tokens.
        Returns (batch, seqlen_q, heads, head_dim).
        """
        heads, paged = self.heads, isinstance(self.rows, PagedRows)
        refuse_options(module, options, paged or isinstance(self.rows, PackedRows))
        if paged and heads.start:
            raise ValueError(
                f"extend: {type(module).__name__} must rotate the first dims of its heads for "
                f"continuous batching, got {heads.start} dims before them"
            )
        # Under autocast, norms return q and k in a wider dtype than v's.
        q, k, v = (x.transpose(1, 2).to(v.dtype) for x in (q, k, v))
        here = self if self.freqs.inv_freq.device == q.device else self.to(q.device)
        q, k = (rotated_first(x, heads.start) for x in (q, k))
        rotation = {"interleaved": heads.interleaved}
        if not self.raw_queries and here.positions is not None:
            freqs = RopeFreqs(here.freqs.inv_freq, axes=axes_of(here.positions))
            q = apply_rope(q, freqs, positions=here.positions, inverse=True, **rotation)
        if self.scale_from is not None:
            scale = scores.query_scale.qwen_1m(here.rows.positions.to(q.device), self.scale_from)
            q = (q * scale[..., None, None]).to(q.dtype)
        call = {"freqs": here.freqs, "score": self.score, "log_n": self.log_n, **rotation}
        call |= softmax_options(module, options)
        if heads.sliding_window is not None:
            call.setdefault("sliding_window", heads.sliding_window)
        if heads.chunk_size is not None:
            call["chunk_size"] = heads.chunk_size
        return here.rows.attend(module, q, k, v, call)


def axes_of(positions: Tensor | None) -> Tensor | None:
    """Return axes for frequencies whose pairs have their own positions, else None."""
    if positions is None or positions.dim() < 3:
        return None
    return torch.arange(len(positions), dtype=torch.int32, device=positions.device)


def rotated_first(x: Tensor, start: int) -> Tensor:
    """Put the rotated dims first, where the ops expect them: scores are sums over dims."""
    return x if start == 0 else torch.cat((x[..., start:], x[..., :start]), -1)


def exchange(value: Any, found: Callable[[Attending], Any]) -> Any:
    """Return a layer's argument with every `Attending` in it replaced by `found` of it."""
    if value is None or isinstance(value, Tensor):
        return value  # the most common case
    if isinstance(value, Attending):
        return found(value)
    if isinstance(value, tuple) and value and isinstance(value[0], Attending):
        return found(value[0])
    if isinstance(value, Mapping):
        exchanged = {key: exchange(each, found) for key, each in value.items()}
        # Layers share keys by mappings, which must stay the same objects.
        if any(exchanged[key] is not each for key, each in value.items()):
            return exchanged
    return value
