"""`extend`: other frequencies or other relative positions for a loaded transformers model."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

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

    Weights, buffers and configuration stay as they are. Nothing in a model clips at
    max_position_embeddings but the default length of `generate`: give it max_new_tokens for prompts
    beyond.

    A frequency method (`methods.METHODS`) replaces the scaling that the model's configuration
    names: nothing is scaled twice, the softmax scale of latent attention (DeepSeek) included. Where
    `apply_rope_qk` does what the model's layers do, every rotation goes through it, with a norm of
    queries and keys right before it (Qwen3, Gemma 3, OLMo 2): frequencies stay float32 and
    positions integers in a model of any dtype. Elsewhere the model's own rotary embedding makes its
    tables.

    A method that depends on the length (one with a `seq_len`) is frozen per request, so that cached
    keys stay valid: for the prompt and max_new_tokens together in `generate`, in a forward with an
    empty cache for its own tokens, or the largest of its position_ids. A `seq_len` among the
    parameters fixes it for good. With cache="raw" nothing is frozen: caches hold keys unrotated,
    and every forward rotates all of them by the frequencies of its own length, that of the longest
    row: up to the trained length those of the plain model. The states of earlier tokens, of which
    keys and values above the first layer are made, stay as they were computed.

    A score method (`scores.SCORES`) keeps the frequencies in force, the model's or those of an
    extension before it, and changes which relative position a pair sees; `log_n` scales queries,
    too. A cache holds each key once. Positions count from a row's first token, so batches padded on
    either side, and on the left to generate, give what their rows give alone. So do packed rows:
    position_ids that start anew (TRL's packing and padding_free), or transformers' cu_seq_lens_q;
    no cache is made of them. Refused are layers whose keys are not all those before a query
    (indexers, compressed keys), logits that depend on more than distances (a norm with weights
    after the rotation), tokens with several positions (images), dropout, output_attentions, packed
    rows beside convolutions or states, and xpos but for methods whose positions start anew.

    With a mesh every rank runs the model on its own tokens of a sequence, as `distributed.shard`
    cuts it, and all layers attend round the group: logits, losses and gradients are those of one
    device, to rounding. All ranks call `extend` alike. Labels are shifted before they are cut:
    `shift_labels` beside `labels`. "rope" is the model as it is. Refused are padding, caches
    (restore the model to generate), chunks (Llama 4) and models that mix tokens in another way
    (state spaces). FSDP's `fully_shard` comes before or after `extend`, accelerate and Trainer
    after it. Without a mesh a region of torch's `context_parallel` raises ValueError where it would
    give something else.

    model: any language model of transformers that rotates, with or without its head or a vision
        tower, which is left alone. docs/models.md has them all.
    method: a name of `PARAMETERS`.
    layers: "full" extends the layers that see all keys: by a frequency method where those with a
        sliding window have a rotation of their own (Gemma 3), by a score method always, as no
        distance in the others is past their window or chunk. "all" extends all that rotate.
    cache: "raw" keeps keys in caches as they come; None where the method has them. Raw ones may be
        cut, joined and read at other positions, by other frequencies.
    mesh: DeviceMesh of one dimension or ProcessGroup, the ranks that share a sequence.
    strategy, balance: as in `distributed.rope_attention`; the tokens must have been cut with the
        same balance.
    parameters: the method's parameters; with resonance=True the wavelengths of a frequency method
        are rounded to whole tokens (`methods.resonance`). Of the model's configuration come dim,
        base (its rope_theta; `abf` has its own), original_max_position_embeddings
        (max_position_embeddings where there is none) and max_position_embeddings, unless given;
        for dual_chunk what a dual_chunk_attention_config says (Qwen2.5-1M), the scale of logits
        from original_max_position_embeddings on (`query_scale.qwen_1m`) included.

    Returns a handle whose `restore()` undoes everything; it is a context manager, too.
    Raises ValueError for an unknown method, a model that cannot be extended, a missing or
    impossible parameter; TypeError for one that the method does not have. The model is then as it
    was.
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
    """Have calls of a `forward` come through its module's hooks."""
    for entry in map(Entry, owners_of(sites)):
        changes.overrides.append((entry.module, "forward", entry))
        changes.hooks.append((entry.module, entry.before_forward, None))


def _with_raw_keys(model: nn.Module, before: Extension, saved: Saved) -> Extension:
    """Let layers rotate queries and all cached keys, by the frequencies of an extension."""
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
    """Extend a model as that was which a folder was saved of, with all its extensions.

    model: loaded from the folder, or the plain model. folder: written by a handle's
        `save_pretrained`, or by the extended model's own.

    Returns a handle as `extend` does, whose `restore()` undoes all of them.
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
    """Raise ValueError where an extension is in place that must be the last."""
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
    """Run four tokens: what a model does between its rotary embedding and its layers shows then."""
    for owner in owners_of(sites):
        try:
            run_on_trial(entrance(model, owner))
        except Exception as error:  # whatever a foreign model leads to
            if shared is not None and isinstance(error, ValueError):
                raise said_by_extend(error) from None  # it is the attention's over the mesh
            raise unsupported(
                owner,
                "what it does between its rotary embedding and its layers takes tables alone "
                f"({shortened(error)})",
            ) from error


class Extension:
    """An extended model's way back: `restore()`, or the end of a `with` block.

    length: the tokens that the model reaches by a method that stretches what it was trained on;
        None where the method sets no end (ReRoPE, Dual Chunk Attention, dynamic methods), or does
        not say where it is (another base). Clients that cut prompts at max_position_embeddings,
        which `extend` leaves alone, have to be told.
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
        """The one that `restore` undoes last."""
        return self if self.before is None else self.before.first

    def add(self, changes: Changes) -> None:
        """Change more, as far as the first changes allow."""
        for module, name, value in changes.overrides:
            self._overrides.append((module, name, value, vars(module).get(name)))
            vars(module)[name] = value
            if isinstance(value, Rotary) and value.fused is not None:
                wrap_apply(value.fused.modeling, value)
        for module, before, after in changes.hooks:
            handle = module.register_forward_pre_hook(before, with_kwargs=True)
            self._undo.append(handle.remove)
            if after is not None:
                self._undo.append(module.register_forward_hook(after).remove)

    def save_pretrained(
        self, folder: str | os.PathLike, *, length: int | None = None, **options: Any
    ) -> None:
        """Save the model with all extensions that are in place.

        Plain transformers, vLLM and GGUF converters read the folder where a config can name the
        frequency method: rope, abf, ntk_aware, pi, dynamic_ntk, yarn, llama3 and longrope become
        its rope_parameters, with the new max_position_embeddings. For others and for score methods
        config.json is without them, and a warning says so. extrope.json, beside it, has all for
        `extend_from_saved`, but no mesh.

        length: max_position_embeddings of the config; the handle's own `length`, or what the model
            had if that is longer.
        options: for the model's own `save_pretrained`.

        Raises ValueError after `restore`, TypeError for what is no model of transformers.
        """
        if not self._overrides:
            raise ValueError("extend: save_pretrained must come before restore, got it after")
        save(self.model, folder, length, options)

    def restore(self) -> None:
        """Put the model back as it was before `extend`, to the bit. A second call does nothing.

        Raises RuntimeError, and changes nothing, where a later extension of the model is in place.
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
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.restore()
