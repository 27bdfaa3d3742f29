"""`extend`: other frequencies or other relative positions for a loaded transformers model."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...scores import FIRST_KEY, SCORES, UNROTATED, PositionMap, Region, Score
from .._shared.parameters import PARAMETERS
from .context_parallel import RegionGuard, Shared, share
from .entry import Entry
from .find import (
    Changes,
    RotarySite,
    find_sites,
    owners_of,
    said_by_extend,
    shortened,
    unsupported,
)
from .frequencies import Rotary, frequency_changes
from .interface import register_interface
from .norms import norm_changes
from .paged import batching_overrides, forget_pages
from .rotation import unwrap_apply, wrap_apply
from .saved import Saved, describe, read, save, saving_overrides
from .scores import Asked, ScoreRotary, read_score, score_changes
from .trial import entrance, refuse_without_weights, run_on_trial

if TYPE_CHECKING:
    from ...distributed.attention import Strategy
    from ...distributed.layout import Balance, Mesh


@torch.inference_mode(False)  # its tensors would have no part in a later backward
def extend(
    model: nn.Module,
    method: str,
    *,
    layers: str = "full",
    cache: str | None = None,
    mesh: Mesh | None = None,
    strategy: Strategy = "gather",
    balance: Balance = "zigzag",
    **parameters: Any,
) -> Extension:
    """Change the frequencies or the relative positions of a loaded model, in place.

    Weights, buffers and configuration do not change. `generate` alone stops by default at
    max_position_embeddings: for longer prompts give it max_new_tokens.

    A frequency method (`methods.METHODS`) replaces the scaling in the model's configuration.
    Nothing is scaled twice, nor is the softmax scale of latent attention (DeepSeek). If
    `apply_rope_qk` does what the model's layers do, every rotation goes through it, with a norm of
    queries and keys right before it (Qwen3, Gemma 3, OLMo 2): frequencies stay float32 and
    positions integers in a model of any dtype. Otherwise the model's own rotary embedding makes its
    tables.

    A method with a `seq_len` depends on the length. It is frozen per request, so that cached keys
    stay valid: in `generate` for the prompt and max_new_tokens together, in a forward with an empty
    cache for its own tokens, or the largest of its position_ids. A `seq_len` among the parameters
    fixes it for good. With cache="raw" nothing is frozen: caches hold unrotated keys, and every
    forward rotates all of them by the frequencies for its own longest row. Up to the trained length
    those are the plain model's. The states of earlier tokens stay as they were computed; keys and
    values above the first layer are made of them.

    A score method (`scores.SCORES`) keeps the frequencies of the model, or of an extension before
    it, and changes the relative position that a pair sees; `log_n` scales queries too. A cache
    holds each key once. Positions count from a row's first token: batches padded on either side (on
    the left to generate) give the same as their rows alone. So do packed rows, marked by
    position_ids that start anew (TRL's packing and padding_free) or by transformers' cu_seq_lens_q;
    they make no cache. Refused: layers that do not see all keys before a query (indexers,
    compressed keys), logits that depend on more than distances (a norm with weights after the
    rotation), tokens with several positions (images), dropout, output_attentions, packed rows in
    models with convolutions or states, and xpos unless the method's positions start anew.

    With a mesh every rank runs the model on its own tokens of a sequence, as `distributed.shard`
    cuts it, and all layers attend across ranks: logits, losses and gradients are those of one
    device, to rounding. All ranks make the same call of `extend`. Shift labels before they are cut:
    pass `shift_labels` beside `labels`. "rope" is the plain model. Refused: padding, caches
    (restore the model to generate), chunks (Llama 4) and models that mix tokens in another way
    (state spaces). Call FSDP's `fully_shard` before or after `extend`, accelerate and Trainer after
    it. Without a mesh, a region of torch's `context_parallel` raises ValueError if the model would
    compute something else.

    model: any language model of transformers that rotates, with or without its head or a vision
        tower, which is left alone. docs/models.md lists them.
    method: a name of `PARAMETERS`.
    layers: "full" extends the layers that see all keys. For a frequency method that is so if
        layers with a sliding window have their own rotation (Gemma 3); for a score method always,
        since distances in the others never exceed their window or chunk. "all" extends all layers
        that rotate.
    cache: "raw" caches unrotated keys; None lets the method decide. Raw keys may be cut, joined and
        read at other positions, by other frequencies.
    mesh: DeviceMesh of one dimension or ProcessGroup, the ranks that share a sequence.
    strategy, balance: as in `distributed.rope_attention`; cut the tokens with the same balance.
    parameters: the method's parameters. With resonance=True the wavelengths of a frequency method
        are rounded to whole tokens (`methods.resonance`). By default the model's configuration
        gives dim, base (its rope_theta; `abf` has its own), original_max_position_embeddings (or
        else max_position_embeddings) and max_position_embeddings. For dual_chunk it gives its
        dual_chunk_attention_config (Qwen2.5-1M), with the scale of logits from
        original_max_position_embeddings on (`query_scale.qwen_1m`).

    Returns a handle whose `restore()` undoes everything; it is also a context manager.
    Raises ValueError for an unknown method, a model that cannot be extended, a missing or
    impossible parameter; TypeError for a parameter that the method does not have. The model is
    unchanged then.
    """
    sites = find_sites(model, layers)
    if method not in PARAMETERS:
        raise ValueError(f"extend: method must be one of {', '.join(PARAMETERS)}, got {method!r}")
    if cache not in (None, "raw") or (cache is not None and mesh is not None):
        raise ValueError(
            f"extend: cache must be None or 'raw', and None with a mesh, got {cache!r}"
        )
    _refuse_after(sites, method)
    if method in SCORES or cache is not None or mesh is not None:
        for owner in owners_of(sites):
            refuse_without_weights(owner, method)
    register_interface()
    shared = None if mesh is None else Shared(mesh, strategy, balance)
    if method in SCORES:
        asked = read_score(sites, method, parameters, cache)
        changes = score_changes(model, sites, method, asked, layers)
    else:
        changes = frequency_changes(model, sites, method, parameters, cache)
    by_length = method if method not in SCORES and changes.hooks else None
    changes.overrides += batching_overrides(model, by_length)
    has_hooks = bool(changes.hooks) or shared is not None
    saved = describe(sites, method, parameters, layers, cache)
    changes.overrides += saving_overrides(model, sites, saved)
    if shared is None:
        guard = RegionGuard(method)
        changes.hooks[:0] = [(site.owner, guard.before_forward, None) for site in sites]
    else:
        share(model, sites, shared, changes)
    if has_hooks:
        _let_none_pass_by(sites, changes)
    extension = Extension(model, changes, saved)
    try:
        if method in SCORES or shared is not None:
            _rehearse(model, sites, shared)
        if shared is None and (method in SCORES or cache is None):
            extension.add(norm_changes(sites))
        if cache is not None and method not in SCORES:
            extension = _with_raw_keys(model, extension, saved)
    except BaseException:
        extension.restore()
        raise
    return extension


def _let_none_pass_by(sites: list[RotarySite], changes: Changes) -> None:
    """Send direct calls of `forward` through the modules' hooks."""
    for entry in map(Entry, owners_of(sites)):
        changes.overrides.append((entry.module, "forward", entry))
        changes.hooks.append((entry.module, entry.before_forward, None))


def _with_raw_keys(model: nn.Module, before: Extension, saved: Saved) -> Extension:
    """Let layers rotate queries and all cached keys by the frequencies of an extension."""
    sites = find_sites(model, saved.layers)
    own = PositionMap()
    score = Score(saved.method, (Region(FIRST_KEY, own, own),), stored=UNROTATED)
    changes = score_changes(model, sites, saved.method, Asked(score), saved.layers)
    _let_none_pass_by(sites, changes)
    extension = Extension(model, changes, saved)
    try:
        _rehearse(model, sites, None)
        extension.add(norm_changes(sites))
    except BaseException:
        extension.restore()
        raise
    extension.before = before
    return extension


def extend_from_saved(model: nn.Module, folder: str | os.PathLike) -> Extension:
    """Extend a model by all extensions that a folder was saved with.

    model: loaded from the folder, or the plain model.
    folder: written by a handle's `save_pretrained`, or by the extended model's own.

    Returns a handle as `extend` does; its `restore()` undoes all of them.
    Raises ValueError for a folder without an extension, and as `extend`.
    """
    handle: Extension | None = None
    try:
        for saved in read(folder):
            where = {"layers": saved.layers, "cache": saved.cache}
            following = extend(model, saved.method, **where, **saved.parameters)
            following.first.before, handle = handle, following
    except BaseException:
        if handle is not None:
            handle.restore()
        raise
    if handle is None:
        raise ValueError(f"extend_from_saved: folder must hold an extension, got {folder}")
    return handle


def _refuse_after(sites: list[RotarySite], method: str) -> None:
    """Raise ValueError if an extension is in place that must be the last."""
    for site in sites:
        before = vars(site.rotary).get("forward")
        if not isinstance(before, Rotary):
            continue
        if isinstance(before, ScoreRotary):
            raise ValueError(
                f"extend: {method} must come before {before.method}, "
                "got a model that is extended by it; restore that one first"
            )
        if before.shared is not None:
            raise ValueError(
                f"extend: an extension over a mesh must be the last, got {method} after "
                f"{before.method}; restore that one first"
            )


def _rehearse(model: nn.Module, sites: list[RotarySite], shared: Shared | None) -> None:
    """Run four tokens, to find what a model does between its rotary embedding and its layers."""
    for owner in owners_of(sites):
        try:
            run_on_trial(entrance(model, owner))
        except Exception as error:  # a foreign model may raise anything
            if shared is not None and isinstance(error, ValueError):
                raise said_by_extend(error) from None  # raised by the attention over the mesh
            raise unsupported(
                owner,
                "its code between the rotary embedding and the layers needs tables of cos and sin "
                f"({shortened(error)})",
            ) from error


class Extension:
    """An extension in place: `restore()`, or the end of a `with` block, undoes it.

    length: the tokens that the model reaches by a method that stretches its trained length; None
        if the method sets no end (ReRoPE, Dual Chunk Attention, dynamic methods) or does not say
        it (another base). `extend` leaves max_position_embeddings alone: tell `length` to clients
        that cut prompts there.
    before: the extension that `restore` undoes too, if there is one.
    """

    def __init__(self, model: nn.Module, changes: Changes, saved: Saved) -> None:
        self.model = model
        self.method = saved.method
        self.length = saved.length
        self.before: Extension | None = None
        forget_pages(model)
        self._overrides: list[tuple[nn.Module, str, Any, Any]] = []
        self._undo: list[Callable[[], None]] = []
        self.add(changes)

    @property
    def first(self) -> Extension:
        """The extension that `restore` undoes last."""
        return self if self.before is None else self.before.first

    def add(self, changes: Changes) -> None:
        """Apply more changes, as far as the first changes allow."""
        for module, name, value in changes.overrides:
            self._overrides.append((module, name, value, vars(module).get(name)))
            vars(module)[name] = value
            if isinstance(value, Rotary) and value.fused is not None:
                wrap_apply(value.fused.modeling, value)
        for module, before, after in changes.hooks:
            handle = module.register_forward_pre_hook(before, with_kwargs=True)
            self._undo.append(handle.remove)
            if after is not None:
                # After an error too, so that no part of the model waits for this forward's end.
                self._undo.append(module.register_forward_hook(after, always_call=True).remove)

    def save_pretrained(
        self, folder: str | os.PathLike, *, length: int | None = None, **options: Any
    ) -> None:
        """Save the model with all extensions that are in place.

        Other programs read its config: rope_parameters by the names rope, abf, ntk_aware, pi,
        dynamic_ntk, yarn and llama3 have there, other frequencies as longrope, and the new
        max_position_embeddings. config.json leaves out score methods, XPOS, methods that follow
        the length and what the model's class does not take, with a warning. extrope.json beside it
        has everything for `extend_from_saved`, except a mesh.

        length: max_position_embeddings of the config; by default the length that its frequencies
            reach, or the model's own if that is longer.
        options: for the model's own `save_pretrained`; without push_to_hub, which would upload the
            plain model's config.

        Raises ValueError after `restore`, TypeError if it is not a model of transformers.
        """
        if not self._overrides:
            raise ValueError("extend: save_pretrained must come before restore, got it after")
        save(self.model, folder, length, options)

    def restore(self) -> None:
        """Restore the model as it was before `extend`, to the bit. A second call does nothing.

        Raises RuntimeError, and changes nothing, if a later extension of the model is in place.
        """
        if any(vars(module).get(name) is not value for module, name, value, _ in self._overrides):
            raise RuntimeError(
                f"extend: the extension by {self.method} must be the model's last, "
                "got one after it; restore that one first"
            )
        forget_pages(self.model)
        while self._overrides:
            module, name, value, previous = self._overrides.pop()
            if previous is None:
                del vars(module)[name]
            else:
                vars(module)[name] = previous
            if isinstance(value, Rotary) and value.fused is not None:
                unwrap_apply(value.fused.modeling, value)
        while self._undo:
            self._undo.pop()()
        if self.before is not None:
            self.before.restore()

    def __enter__(self) -> Extension:
        if not self._overrides:  # the block would run the plain model
            raise ValueError("extend: a handle must be entered before restore, got it after")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.restore()
