"""Our attention for any model, and its masks: `model.set_attn_implementation("extrope")`.

A layer rotates queries and keys, caches keys, and calls a registered function, as transformers
says. The mask is None if a row is one sequence whose queries are its last tokens. Otherwise it is
(batch, 1, 1, keys) int32, the number of the sequence that a key belongs to: 0 for padding, from 1
on for sequences, -1 for a slot not in use. So padded, packed and chunked rows and static caches
have one form, linear in the number of keys. `read_rows` reads it once per forward.

Rows whose tokens see later ones, masks with holes, and dropout are left to `sdpa`.

An extended layer differs by one attribute, an `ExtendedLayer`, which the function reads. The layer
rotates queries and keys to their positions and caches keys, as its model does without an extension;
the op moves both on to where the score's regions have them. Its config is a view (`attending`), by
which it calls our function whatever others call.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ... import RopeFreqs, rope_attention, rope_attention_with_kvcache, scores
from . import paged
from .model import Override

if TYPE_CHECKING:
    from ...scores import Score
    from .rotation import RotaryForward

INTERFACE = "extrope"  # the name for `model.set_attn_implementation`
BOUNDARIES = "cu_seq_lens_q"  # of packed sequences, as transformers' flash attention takes them
# Options that layers pass to their attention: also options of the ops, or without effect here.
KNOWN = {
    *("scaling", "dropout", "is_causal", "softcap", "s_aux", "sliding_window", "position_ids"),
    *("use_cache", "output_attentions", "output_hidden_states", "return_dict"),
    *("output_router_logits", "cache", "past_key_values", "cache_position", "logits_to_keep"),
    *(BOUNDARIES, "cu_seq_lens_k", "max_length_q", "max_length_k"),
}
ON_LAYER = "_extrope"  # the attribute of a layer that is extended, or looked at
_PADDING = 64  # slots of padding that are one sequence
_ON_MASK = "_extrope_rows"


def register_interface() -> None:
    """Register "extrope" with transformers, for `attn_implementation` and its setter.

    `extend` does it too; call it for models that are not extended.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(INTERFACE, attention)
    AttentionMaskInterface.register(INTERFACE, make_mask)


def make_mask(**given: Any) -> Tensor | None:
    """Make the mask: transformers' mask function, with the arguments of its `sdpa_mask`.

    Of the function that says which keys a query sees, only neighbours are asked: each key for the
    one before it and the one after it.
    """
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    function, padding = given.get("mask_function", causal_mask_function), given["attention_mask"]
    config, local_size = given.get("config"), given.get("local_size")
    chosen = getattr(config, "_attn_implementation_internal", INTERFACE)
    if local_size is not None and chosen != INTERFACE:  # extended layers see all keys
        return _mask_as_chosen(chosen, given)
    skips = given.get("allow_is_causal_skip", True)
    chunk = getattr(config, "attention_chunk_size", None)
    windowed = local_size not in (None, chunk)
    if given.get("use_vmap") or (windowed and not _layers_tell_windows(type(config))):
        return sdpa_mask(**given)
    # Before transformers 5.4 positions give the number of queries.
    at = given.get("cache_position")
    new, past = (given["q_length"], given.get("q_offset", 0)) if at is None else (len(at), at[0])
    growing = not isinstance(past, Tensor)
    if growing and not skips and function is causal_mask_function and chosen != INTERFACE:
        return sdpa_mask(**given)  # whoever asks for one that is never None adds to it
    keys, first = given["kv_length"], given.get("kv_offset", 0)
    asked = not (windowed and skips) and function is not causal_mask_function
    whole = growing and first + keys == past + new
    compiling = torch.compiler.is_compiling()
    if asked and compiling and new > 1:
        if not growing or chosen == INTERFACE:
            return sdpa_mask(**given)  # whether the rows are packed cannot be looked at
        asked = False  # the hook of an extended owner has seen to it
    if whole and padding is None and not asked:
        return None
    device = given["device"]
    slots = torch.arange(keys, device=device) + first
    numbers = torch.ones(given["batch_size"], keys, dtype=torch.int32, device=device)
    if asked:
        rows = torch.arange(given["batch_size"], device=device)[:, None]
        head = torch.zeros((), dtype=torch.int64, device=device)
        later, before = slots[None, 1:], slots[None, :-1]
        if not compiling and function(rows, head, before, later).any():
            return sdpa_mask(**given)
        begins = ~function(rows, head, later, before)
        numbers[:, 1:] += begins.cumsum(-1, dtype=torch.int32)
    if padding is not None:
        padding = nn.functional.pad(padding, (0, max(first + keys - padding.shape[1], 0)))
        numbers = numbers * padding[:, first : first + keys]
    if not whole:
        numbers = numbers.masked_fill(slots >= past + new, -1)
    if not compiling and (numbers == 1).all():
        return None
    return numbers[:, None, None]


def _mask_as_chosen(chosen: str | None, given: Mapping[str, Any]) -> Tensor | None:
    """Make the mask of layers that keep the attention of the user's choice."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    make = ALL_MASK_ATTENTION_FUNCTIONS.get(chosen)
    return None if make is None else make(**given)


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
    """Yield the attributes, globals and arguments that a function names, or one that it wraps.

    Not every wrapper of `kernels` says what it wraps; all have it in their closure.
    """
    functions = [function]
    for each in filter(inspect.isfunction, functions):
        yield from each.__code__.co_names
        for value in each.__code__.co_consts:
            yield from map(str, value) if isinstance(value, tuple) else (str(value),)
        wrapped = [cell.cell_contents for cell in each.__closure__ or ()]
        functions += [other for other in wrapped if other not in functions]


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend: the attention function of transformers' interface.

    query, key, value: (batch, heads, seqlen, head_dim). attention_mask: of `make_mask` or, as for
    `sdpa`, (batch or 1, 1, seqlen_q, seqlen_k), True or 0 where a query sees a key.
    Returns (batch, seqlen_q, heads, head_dim) and None, since there are no weights.
    Raises ValueError for sinks or a cap of the logits if rows are not causal.
    """
    if (extended := getattr(module, ON_LAYER, None)) is not None:
        return extended.attend(module, query, key, value, attention_mask, options), None
    call = softmax_options(module, options)
    if is_paged(options):
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return paged.attend(q, k, v, options, call | no_rotation(q)), None
    given = {name for name, value in options.items() if value is not None}
    if _causal(module, options) and not options.get("dropout") and given <= KNOWN:
        rows = read_rows(attention_mask, query, key, options)
        if rows is not None:
            q, k, v = (x.transpose(1, 2).to(value.dtype) for x in (query, key, value))
            return attend_rows(q, k, v, rows, call | no_rotation(q)), None
    if options.get("s_aux") is not None or options.get("softcap") is not None:
        raise ValueError(
            f"{INTERFACE}: a layer with sinks or a soft cap must have a causal attention_mask, "
            f"each row's tokens in one piece and no dropout, got others in {type(module).__name__}"
        )
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    window = call.get("sliding_window") if _causal(module, options) else None
    mask = seen_by_queries(attention_mask, query, key, window)
    return sdpa_attention_forward(module, query, key, value, mask, **options)


def is_paged(arguments: Mapping[str, Any]) -> bool:
    """Return True for a model's or a layer's arguments in a forward of continuous batching."""
    return "read_index" in arguments or "block_table" in arguments


def no_rotation(q: Tensor) -> dict[str, Any]:
    """Return the options of the ops for queries and keys that are rotated where they belong."""
    freqs = RopeFreqs(torch.zeros(1, dtype=torch.float32, device=q.device))
    return {"freqs": freqs, "rotated": "qk"}


def _causal(module: nn.Module, options: Mapping[str, Any]) -> bool:
    causal = options.get("is_causal")
    return getattr(module, "is_causal", True) if causal is None else causal


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


def seen_by_queries(
    mask: Tensor | None, query: Tensor, key: Tensor, window: int | None = None
) -> Tensor | None:
    """Return the mask of pairs for `sdpa`, bool; None if it needs none.

    window: of a layer, which is in no mask of `make_mask`.
    """
    new, keys = query.shape[2], key.shape[2]
    if mask is None:
        if new == keys and window and window < keys:
            mask = torch.ones(1, 1, 1, keys, dtype=torch.int32, device=query.device)
        else:
            return None
    if not is_rows(mask):
        return mask
    numbers = mask[:, 0, 0]
    used = (numbers >= 0).sum(-1, keepdim=True)
    at = (used - new + torch.arange(new, device=mask.device)).clamp(min=0)[..., None]
    slots = torch.arange(keys, device=mask.device)
    seen = (numbers[:, None] == numbers[..., None].gather(1, at)) & (slots <= at)
    return (seen & (slots > at - window) if window else seen)[:, None]


def is_rows(mask: Tensor) -> bool:
    """Return True for a mask of `make_mask`, in whatever way a model has sliced it."""
    return mask.dtype == torch.int32


class Rows(NamedTuple):
    """The rows of a batch.

    keys: slots in use, of all rows; None: all. cu_seqlens: the boundaries of all rows' sequences,
    one after another, if all tokens are new. ends, pads: (batch,) int32, the ends and beginnings of
    each row's keys, if there are others. Without either a row is one sequence.
    """

    keys: int | None = None
    cu_seqlens: Tensor | None = None
    ends: Tensor | None = None
    pads: Tensor | None = None

    def positions(self, q: Tensor, k: Tensor) -> Tensor:
        """Return the new tokens' positions in their sequences, (batch or 1, new); 0 in padding."""
        batch, new = q.shape[:2]
        at = torch.arange(new, device=q.device)
        if self.cu_seqlens is not None:
            slots = torch.arange(batch * new, device=q.device)
            sequence = torch.searchsorted(self.cu_seqlens, slots, right=True) - 1
            return (slots - self.cu_seqlens[sequence]).view(batch, new)
        if self.ends is not None:
            return (at + (self.ends - new - self.pads)[:, None]).clamp(min=0)
        return (at + (k.shape[1] if self.keys is None else self.keys) - new)[None]


def read_rows(
    mask: Tensor | None, query: Tensor, key: Tensor, options: Mapping[str, Any]
) -> Rows | None:
    """Return the rows that a mask tells; None if they are not causal, or not in one piece.

    query, key: only sizes count. Values are read on the host, once per forward. A graph cannot read
    them: it assumes, and asserts, that a row's tokens are one sequence.
    """
    batch, new = query.shape[0], query.shape[2]
    boundaries = options.get(BOUNDARIES)
    if isinstance(boundaries, Tensor) and boundaries.dim() == 1 and new == key.shape[2]:
        # Padding is a sequence too: then nothing else sees it.
        return Rows(cu_seqlens=nn.functional.pad(boundaries.int(), (0, 1), value=batch * new))
    if mask is None:  # unless a cache has dropped keys
        return Rows() if new <= key.shape[2] else None
    if mask.dim() != 4 or mask.shape[1] != 1:
        return None
    if torch.compiler.is_compiling():
        return _rows_of_graph(mask[:, 0, 0], new) if is_rows(mask) else None
    # Those of a user may be written to, and inference tensors do not tell.
    version = 0 if is_rows(mask) or mask.is_inference() else mask._version
    known = getattr(mask, _ON_MASK, {})
    if (new, version) not in known or (mask.is_inference() and not is_rows(mask)):
        numbers = numbers_in(mask, batch, new)
        rows = None if numbers is None else _rows_of_numbers(numbers, new)
        known = {(new, version): rows}
        setattr(mask, _ON_MASK, known)
    return known[new, version]


def numbers_in(mask: Tensor, batch: int, new: int) -> Tensor | None:
    """Return the sequences that keys belong to by any mask, (batch, keys); None for other masks.

    new: the number of queries.
    """
    if mask.dim() == 2:
        return mask.int()
    if mask.dim() != 4 or mask.shape[1] != 1:
        return None
    if is_rows(mask):
        return mask[:, 0, 0].expand(batch, -1)
    numbers = _numbers_of_pairs(mask) if mask.shape[2] == new else None
    return None if numbers is None else numbers.expand(batch, -1)


def _rows_of_numbers(numbers: Tensor, new: int) -> Rows | None:
    """Return the rows by their keys' numbers, (batch, keys)."""
    used = int((numbers >= 0).sum(-1).amax())
    if used < new:
        return None
    numbers = numbers[:, :used]
    begins = torch.ones_like(numbers, dtype=torch.bool)
    begins[:, 1:] = numbers.diff() != 0
    again = begins[:, 1:] & (numbers[:, 1:] > 0) & (numbers[:, 1:] <= numbers.cummax(-1)[0][:, :-1])
    # With a past all queries must belong to the last sequence.
    tail = (numbers == numbers[:, -1:]).flip(-1).cumprod(-1).sum(-1)
    pads = used - tail
    slots = torch.arange(used, device=numbers.device)
    early = (slots >= used - new) & (slots < pads[:, None]) & (numbers > 0)
    broken, early, whole = torch.stack(
        (again.any(), early.any(), ~begins[:, 1:].any())
    ).tolist()  # one reading on the host
    if broken or (early and new < used):
        return None
    if whole:
        return Rows(used)
    if new == used:
        # Nobody reads what padding sees, so it sees little: its cost is linear.
        begins |= (numbers == 0) & (slots % _PADDING == 0)
        firsts = begins.flatten().nonzero()[:, 0].int()
        return Rows(used, nn.functional.pad(firsts, (0, 1), value=numbers.numel()))
    return Rows(used, None, torch.full_like(pads, used, dtype=torch.int32), pads.int())


def _rows_of_graph(numbers: Tensor, new: int) -> Rows:
    """Return the rows by tensors of a graph: each is padding, one sequence, padding."""
    batch, keys = numbers.shape
    slots, real = torch.arange(keys, device=numbers.device), numbers == 1
    pads = torch.where(real, slots, keys).amin(-1)
    ends = torch.where(real, slots + 1, 0).amax(-1)
    used = (numbers >= 0).sum(-1)
    pads = torch.where(ends > 0, pads, 0)
    right = (real == (slots >= pads[:, None]) & (slots < ends[:, None])) & (numbers <= 1)
    if new == keys:
        firsts = torch.arange(batch, device=numbers.device) * keys
        pieces = torch.stack((firsts, firsts + pads, firsts + ends), -1).flatten().int()
        rows = Rows(cu_seqlens=nn.functional.pad(pieces, (0, 1), value=batch * keys))
    else:
        right &= ((ends == used) | (ends == 0))[:, None]
        rows = Rows(ends=used.int(), pads=pads.int())
    torch._assert_async(right.all(), f"{INTERFACE}: a row's keys must lie in one piece")
    return rows


def _numbers_of_pairs(mask: Tensor) -> Tensor | None:
    """Return the numbers of keys by a mask of pairs, (batch, 1, new, keys); None for other masks.

    A padding token sees nothing or, where a softmax over nothing would be NaN, everything.
    """
    seen = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0
    batch, new, keys = seen.shape
    slots = torch.arange(keys, device=mask.device)
    used = int(torch.where(seen[:, -1], slots + 1, 0).amax())
    if used < new:
        return None
    at = torch.arange(used - new, used, device=mask.device)
    everything = seen.all(-1) & (at < keys - 1)
    diagonal = seen.gather(-1, at.expand(batch, new)[..., None])[..., 0]
    real = diagonal & ~everything
    seen = seen & ~everything[..., None]
    before = seen.gather(-1, (at - 1).clamp(min=0).expand(batch, new)[..., None])[..., 0]
    numbers = torch.full((batch, keys), -1, dtype=torch.int32, device=mask.device)
    numbers[:, : used - new] = seen[..., : used - new].any(1)
    # With a past all are its sequence: only then a token may see none right before it.
    begins = (~before | (at == 0)).int().cumsum(-1) if used == new else torch.ones_like(at)
    numbers[:, used - new : used] = (begins * real).int()
    want = (numbers[:, None] == numbers[:, used - new : used, None]) & (slots <= at[:, None])
    wrong = (want != seen) & real[..., None]
    return None if wrong.any() else numbers


def attend_rows(q: Tensor, k: Tensor, v: Tensor, rows: Rows, call: dict[str, Any]) -> Tensor:
    """Attend from the new tokens to all of their sequences: (batch, new, heads, head_dim).

    q, k, v: (batch, seqlen, heads, head_dim). call: frequencies and options of the ops.
    """
    if rows.keys is not None:
        k, v = k[:, : rows.keys], v[:, : rows.keys]
    if rows.cu_seqlens is not None:
        flat = (x.flatten(0, 1) for x in (q, k, v))
        return rope_attention(*flat, cu_seqlens=rows.cu_seqlens, **call).unflatten(0, q.shape[:2])
    # Raw keys that decay have no bound in a cache, and the op of caches no gradients.
    alone = records(q, k, v) or call["freqs"].log_decay is not None
    if not alone and (q.shape[1] == 1 or rows.ends is not None):
        ends = k.shape[1] if rows.ends is None else rows.ends
        cached = {"cache_seqlens": ends, "cache_leftpad": rows.pads}
        cached |= {"stored": None if call["rotated"] else "raw"}
        return rope_attention_with_kvcache(q, k, v, **cached, **call)
    if rows.pads is None:
        return rope_attention(q, k, v, **call)
    outs = []
    for row, pad in enumerate(rows.pads.tolist()):
        one = slice(row, row + 1)
        skip = max(pad - (k.shape[1] - q.shape[1]), 0)
        out = rope_attention(q[one, skip:], k[one, pad:], v[one, pad:], **call)
        outs.append(nn.functional.pad(out, (0, 0, 0, 0, skip, 0)))
    return torch.cat(outs)


def records(*tensors: Tensor) -> bool:
    """Return True if autograd records operations on the tensors."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


@dataclass(eq=False)
class ExtendedLayer:
    """How a layer attends: by a score method, by raw keys, or across ranks.

    score: None for plain RoPE. rotary: it has the frequencies of the layer's heads, of the kind
    layer_type; None if nothing is moved on. start: the first rotated dim. interleaved: the pairing
    of dims. sign: -1 if pairs are rotated backwards. raw: queries and keys come raw. scaled: False
    if a norm after the rotation undoes the attention factor (Llama 4). log_n: scales queries,
    unless None. scale_from: the length from which logits grow (`query_scale.qwen_1m`), or None.
    shared: the ranks that share tokens (`context_parallel.Shared`), or None.
    """

    score: Score | None = None
    rotary: RotaryForward | None = None
    layer_type: str | None = None
    start: int = 0
    interleaved: bool = False
    sign: int = 1
    raw: bool = False
    scaled: bool = True
    log_n: float | None = None
    scale_from: int | None = None
    shared: Any = None

    @property
    def layout(self) -> dict[str, Any]:
        """The arguments that tell the ops which dims rotate."""
        return {"interleaved": self.interleaved, "rotary_offset": self.start}

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        options: Mapping[str, Any],
    ) -> Tensor:
        """Attend in the layer's place: the arguments of `attention`."""
        refuse_dropout(module, options)
        # Under autocast, norms return q and k in a wider dtype than v's.
        q, k, v = (x.transpose(1, 2).to(value.dtype) for x in (query, key, value))
        call = softmax_options(module, options) | self._rotation(q)
        if self.shared is not None:
            return self.shared.attend(q, k, v, **call)
        if is_paged(options):
            return paged.attend(q, k, v, options, call)
        rows = read_rows(mask, query, key, options)
        if rows is None:
            raise ValueError(
                "extend: attention_mask must be causal with each row's tokens or packed sequence "
                "in one piece, got another, or a cache that does not return all keys, in "
                f"{type(module).__name__}"
            )
        if self.scale_from is not None:
            scale = scores.query_scale.qwen_1m(rows.positions(q, k), self.scale_from)
            q = (q * scale[..., None, None]).to(q.dtype)
        return attend_rows(q, k, v, rows, call)

    def _rotation(self, q: Tensor) -> dict[str, Any]:
        """Return the options of the ops that are not the layer's own."""
        if self.rotary is None:
            return no_rotation(q)
        freqs = self.rotary.freqs_on(self.layer_type, q.device)
        if self.sign < 0:
            freqs = replace(freqs, inv_freq=-freqs.inv_freq)
        if not self.scaled:
            freqs = replace(freqs, attention_factor=1.0)
        given = {"freqs": freqs, "score": self.score, "log_n": self.log_n, **self.layout}
        return given | {"rotated": None if self.raw else "qk"}


def refuse_dropout(module: nn.Module, options: Mapping[str, Any]) -> None:
    """Raise ValueError for dropout, which may be set at any time."""
    if options.get("dropout"):
        raise ValueError(
            "extend: a model in training must have attention_dropout 0, "
            f"got {options['dropout']} in {type(module).__name__}"
        )


class _Attending:
    """Mixed into a config's class: its attention is ours, whatever the config says."""

    @property
    def _attn_implementation(self) -> str:
        return INTERFACE

    @_attn_implementation.setter
    def _attn_implementation(self, value: Any) -> None:
        self._attn_implementation_internal = value

    def __reduce_ex__(self, protocol: Any) -> Any:
        plain = object.__new__(plain_class(self))
        plain.__dict__ = self.__dict__
        return attending, (plain,)


def attending(config: Any) -> Any:
    """Return a view of a config, by which layers call our attention; all else is in one dict.

    Other models may share the config, and other layers go on to the attention that it names.
    """
    kind = type(config)
    if not issubclass(kind, _Attending):
        names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
        kind = type(kind.__name__, (_Attending, kind), names)
    view = object.__new__(kind)
    view.__dict__ = config.__dict__
    return view


def plain_class(config: Any) -> type:
    """Return the class of a config, or of the one that it is a view of."""
    kind = type(config)
    return kind.__mro__[2] if issubclass(kind, _Attending) else kind


def attending_overrides(owner: nn.Module, layers: Iterable[nn.Module]) -> list[Override]:
    """Return the overrides by which an owner makes our masks, and layers call our attention."""
    views: dict[int, Any] = {}
    modules = [each for each in (owner, *layers) if hasattr(each, "config")]
    for module in modules:
        views.setdefault(id(vars(module.config)), attending(module.config))
    return [(module, "config", views[id(vars(module.config))]) for module in modules]
