"""`extend`: other frequencies or other relative positions for a loaded transformers model."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...scores import FIRST_KEY, SCORES, UNROTATED, PositionMap, Region, Score
from .._shared.parameters import PARAMETERS
from .interface import register_interface
from .length import choose, factor_for, why_no_images
from .model import generation_config_owner, reprefix_error, shortened, unsupported
from .patch.frequencies import frequency_patches
from .patch.generate import forget_pages, generation_patches, length_patches
from .patch.hooks import (
    ON_OWNER,
    Applied,
    Patches,
    RegionGuard,
    TrainingGuard,
    route_forward_through_hooks,
)
from .patch.norms import norm_patches
from .patch.rotation import RotaryForward, unwrap_apply, wrap_apply
from .patch.score_forward import ScoreRotaryForward
from .patch.scores import ScoreRequest, read_score, score_patches
from .probe.layers import first_call, probe_layers, refuse_without_weights
from .probe.rotary import RotaryModule, find_rotary_modules, owners_of
from .saved import Saved, describe, read, save, save_beside_adapters, save_plain

if TYPE_CHECKING:
    from ...distributed.attention import Strategy
    from ...distributed.layout import Balance, Mesh


@torch.inference_mode(False)  # its tensors would have no part in a later backward
def extend(
    model: nn.Module,
    method: str | None = None,
    *,
    length: int | None = None,
    layers: str = "full",
    cache: str | None = None,
    mesh: Mesh | None = None,
    strategy: Strategy = "gather",
    balance: Balance = "zigzag",
    **parameters: Any,
) -> Extension:
    """Change the frequencies or the relative positions of a loaded model, in place.

        handle = extend(model, length=65536)  # what measured best: print(handle) says what and why
        handle = extend(model, "yarn", factor=4.0)

    **This runs the model on four tokens, several times**: for a score method, a mesh and raw
    keys, and where a model norms queries and keys. No list of models says how layers rotate and
    attend, so `extend` tries it: which dims rotate, in which pairs, what each attention gets, and
    if the op gives the same as the layer's own. It raises ValueError where that fails. The probe
    changes nothing; it needs the weights, and a model's hooks see it.

    Then rotary embeddings, attentions and `generate` of this model get other functions and hooks.
    Weights, buffers and configuration do not change. `generate` alone stops by default at
    max_position_embeddings: for longer prompts give it max_new_tokens.

    A frequency method (`methods.METHODS`) that scales starts from what the model was trained with
    (`methods.trained`): a linear, llama3 or longrope scaling of its configuration stays below it, a
    yarn or dynamic one is replaced. Nothing is scaled twice, nor is the softmax scale of latent
    attention (DeepSeek). If `apply_rope_qk` does what the model's layers do, every rotation goes
    through it, with a norm right before it: frequencies stay float32 and positions integers in a
    model of any dtype. Otherwise the model's own rotary embedding makes its tables.

    A method with a `seq_len` is frozen per request, so that cached keys stay valid: in `generate`
    for the prompt and max_new_tokens together, in a forward with an empty cache for its own tokens,
    or the largest of its position_ids. Rows of a batch have their own lengths, by attention_mask or
    position_ids; where `apply_rope_qk` cannot rotate each by its own frequencies (amplitudes that
    follow the length, packed rows, raw keys, a score method), lengths that differ raise ValueError.
    A `seq_len` among the parameters fixes it for good. With cache="raw" nothing is frozen: every
    forward rotates all keys anew, up to the trained length by the plain model's frequencies.

    The attention of other layers stays PyTorch's. After `model.set_attn_implementation("extrope")`
    this package computes it too, faster on a CPU.

    A score method (`scores.SCORES`) keeps the frequencies of the model, or of an extension before
    it, and changes the relative position that a pair sees; `log_n` scales queries too. Positions
    count from a row's first token: padded batches (on the left to generate) and packed rows (by
    position_ids that start anew, or by cu_seq_lens_q; they make no cache) give the same as their
    sequences alone. Refused: layers that do not see all keys before a query (indexers, compressed
    keys), logits that depend on more than distances (a norm with weights after the rotation),
    tokens with several positions (images), dropout, output_attentions, packed rows in models with
    convolutions or states, and xpos unless the method's positions start anew.

    With a mesh every rank runs the model on its own tokens of a sequence, as `distributed.shard`
    cuts it, and all layers attend across ranks; "rope" is the plain model. All ranks make the same
    call of `extend`. docs/guide/distributed.md has labels, FSDP, accelerate and what is refused.
    Without a mesh, a region of torch's `context_parallel` raises ValueError if the model would
    compute something else.

    model: any language model of transformers that rotates, with or without its head or a vision
        tower, which is left alone. docs/models.md lists them.
    method: a name of `PARAMETERS`. If None, one is chosen for `length`: ReRoPE with half the
        trained length as its window, the chunks of a dual_chunk_attention_config, or YaRN for
        models that no score method serves, or whose images none takes. A model that reaches the
        length stays as it is.
    length: tokens to reach. With a method that has a factor it stands in place of the factor, which
        becomes length / trained length. A warning says if the trained length has them already.
    layers: "full" extends the layers that see all keys. For a frequency method that is so if
        layers with a sliding window have their own rotation (Gemma 3); for a score method always,
        since distances in the others never exceed their window or chunk. "all" extends all layers
        that rotate.
    cache: "raw" caches unrotated keys; None lets the method decide. Raw keys may be cut, joined and
        read at other positions, by other frequencies.
    mesh: DeviceMesh of one dimension or ProcessGroup, the ranks that share a sequence.
    strategy, balance: as in `distributed.rope_attention`; cut the tokens with the same balance.
    parameters: the method's parameters. With resonance=True the wavelengths of a frequency method
        are rounded to whole tokens (`methods.resonance`); with by_axis=[0] it changes mRoPE's axis
        of time alone (`methods.by_axis`). By default the model's configuration gives dim, base (its
        rope_theta; `abf` has its own), original_max_position_embeddings (the length it was trained
        to), max_position_embeddings, and `over`. A base or a trained length given here means plain
        RoPE. For dual_chunk it gives its dual_chunk_attention_config (Qwen2.5-1M), with the scale
        of logits from original_max_position_embeddings on (`query_scale.qwen_1m`).

    Returns a handle whose `restore()` undoes everything; it is also a context manager.
    Raises ValueError for an unknown method, a model that cannot be extended, a missing or
    impossible parameter; TypeError for a parameter that the method does not have. The model is
    unchanged then.
    """
    options = {"cache": cache, "mesh": mesh, "strategy": strategy, "balance": balance}
    if method is not None:
        if length is not None and method in PARAMETERS:
            parameters |= {"factor": factor_for(model, method, length, layers, parameters)}
        return _extend(model, method, parameters, layers, **options)
    choice, layers = choose(model, length, layers, parameters)
    try:
        handle = _extend(model, choice.method, dict(choice.parameters), layers, **options)
    except (ValueError, NotImplementedError) as error:
        if choice.method not in SCORES:
            raise
        reason = shortened(error).removeprefix("extend: ").rpartition("architecture: ")[2]
        choice, layers = choose(model, length, layers, parameters, reason)
        handle = _extend(model, choice.method, dict(choice.parameters), layers, **options)
    handle.reason = choice.reason
    return handle


def _extend(
    model: nn.Module,
    method: str,
    parameters: dict[str, Any],
    layers: str,
    *,
    cache: str | None,
    mesh: Mesh | None,
    strategy: Strategy,
    balance: Balance,
) -> Extension:
    """Extend by a method whose parameters are all chosen."""
    rotary_modules = find_rotary_modules(model, layers)
    owners = owners_of(rotary_modules)
    if not isinstance(method, str):
        raise TypeError(
            "extend: method must be a name, with the method's parameters beside it, as in "
            f"extend(model, 'yarn', factor=4.0), got {type(method).__name__}"
        )
    if method not in PARAMETERS:
        plain = "".join(filter(str.isalnum, method)).lower()
        same = (name for name in PARAMETERS if name.replace("_", "") == plain)
        meant = next((f" (did you mean {name!r}?)" for name in same), "")
        raise ValueError(
            f"extend: method must be one of {', '.join(PARAMETERS)}, got {method!r}{meant}"
        )
    if cache not in (None, "raw") or (cache is not None and mesh is not None):
        raise ValueError(
            f"extend: cache must be None or 'raw', and None with a mesh, got {cache!r}"
        )
    _refuse_after(rotary_modules, method)
    is_score = method in SCORES
    if is_score or cache is not None or mesh is not None:
        for owner in owners:
            refuse_without_weights(owner, method)
    register_interface()
    if mesh is not None:  # imported late: it takes half a second, and not every torch has it
        from .context_parallel import Shared, share

        shared = Shared(mesh, strategy, balance)

    factor = parameters.get("factor")
    # In dynamic NTK the factor is the base's rate of growth, in Leaky ReRoPE InvLeaky is below 1.
    stretches = not is_score and method != "dynamic_ntk"
    if stretches and isinstance(factor, (int, float)) and 0 < factor < 1:
        warnings.warn(
            f"extend: factor {factor:g} of {method} is below 1: it shortens what a model reads",
            stacklevel=4,
        )

    # What changes in the model.
    if is_score:
        request = read_score(rotary_modules, method, parameters, cache)
        patches = score_patches(model, rotary_modules, method, request, layers)
        if reason := why_no_images(model, rotary_modules):
            warnings.warn(f"extend: {method} takes text without images: {reason}", stacklevel=4)
    else:
        patches = frequency_patches(rotary_modules, method, parameters, cache)
    has_hooks = bool(patches.hooks) or mesh is not None
    by_length = method if patches.hooks and not is_score else None
    patches.overrides += generation_patches(model, by_length, cache, is_score)
    before = vars(owners[0]).get(ON_OWNER)
    applied = Applied(method, parameters, layers, cache, before)
    patches.overrides.append((owners[0], ON_OWNER, applied))
    for each in dict.fromkeys((model, generation_config_owner(model))):
        if hasattr(each, "save_pretrained"):
            saving = partial(save_plain, each, model, applied)
            patches.overrides.append((each, "save_pretrained", saving))
    patches.hooks[:0] = [(owner, TrainingGuard().before_forward, None) for owner in owners[:1]]
    if mesh is None:
        guard = RegionGuard(method)
        patches.hooks[:0] = [(each.owner, guard.before_forward, None) for each in rotary_modules]
    else:
        share(model, owners, shared, patches)
    if has_hooks:
        route_forward_through_hooks(owners, patches)

    save_beside_adapters()

    # In place, and tried out.
    extension = Extension(model, patches, applied)
    try:
        if is_score or mesh is not None:
            _try_patched(model, owners, mesh is not None)
        if mesh is None and (is_score or cache is None):
            extension.add(norm_patches(rotary_modules))
        if cache is not None and not is_score:
            extension = _with_raw_keys(model, extension)
        length = None if by_length else extension.length
        if length is not None and parameters.get("factor", 1) > 1:
            extension.add(length_patches(model, owners[0], applied, length))
    except BaseException:
        extension.restore()
        raise
    return extension


def _with_raw_keys(model: nn.Module, before: Extension) -> Extension:
    """Let layers rotate queries and all cached keys by the frequencies of an extension."""
    applied = before.applied
    rotary_modules = find_rotary_modules(model, applied.layers)
    owners, own = owners_of(rotary_modules), PositionMap()
    request = ScoreRequest(Score(applied.method, (Region(FIRST_KEY, own, own),), stored=UNROTATED))
    patches = score_patches(model, rotary_modules, applied.method, request, applied.layers)
    patches.overrides += generation_patches(model, None, applied.cache, True)
    route_forward_through_hooks(owners, patches)
    extension = Extension(model, patches, applied)
    try:
        _try_patched(model, owners, False)
        extension.add(norm_patches(rotary_modules))
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
    return _extend_by_all(model, read(folder))


def _extend_by_all(model: nn.Module, extensions: Sequence[Saved] | Sequence[Applied]) -> Extension:
    """Extend a model by one after the other; the last one's handle restores all."""
    handle: Extension | None = None
    try:
        for each in extensions:
            where = {"layers": each.layers, "cache": each.cache}
            following = extend(model, each.method, **where, **each.parameters)
            following.first.before, handle = handle, following
    except BaseException:
        if handle is not None:
            handle.restore()
        raise
    if handle is None:
        raise ValueError("extend_from_saved: folder must hold an extension, got none")
    return handle


def _refuse_after(rotary_modules: Sequence[RotaryModule], method: str) -> None:
    """Raise ValueError if an extension is in place that must be the last."""
    for rotary_module in rotary_modules:
        before = vars(rotary_module.module).get("forward")
        if not isinstance(before, RotaryForward):
            continue
        if isinstance(before, ScoreRotaryForward):
            raise ValueError(
                f"extend: {method} must come before {before.method}, "
                "got a model that is extended by it; restore that one first"
            )
        if before.shared is not None:
            raise ValueError(
                f"extend: an extension over a mesh must be the last, got {method} after "
                f"{before.method}; restore that one first"
            )


def _try_patched(model: nn.Module, owners: Sequence[nn.Module], over_mesh: bool) -> None:
    """Run four tokens, to find what a model does between its rotary embedding and its layers."""
    for owner in owners:
        try:
            probe_layers(first_call(model, owner))
        except Exception as error:  # a foreign model may raise anything
            if over_mesh and isinstance(error, ValueError):
                raise reprefix_error(error) from None  # raised by the attention over the mesh
            raise unsupported(
                owner,
                "its code between the rotary embedding and the layers needs tables of cos and sin "
                f"({shortened(error)})",
            ) from error


class Extension:
    """An extension in place: `restore()`, or the end of a `with` block, undoes it.

    before: the extension that `restore` undoes too, if there is one.
    reason: why `extend` chose the method for a length; None if the user named it.
    """

    def __init__(self, model: nn.Module, patches: Patches, applied: Applied) -> None:
        self.model = model
        self.method = applied.method
        self.applied = applied
        self.before: Extension | None = None
        self.reason: str | None = None
        self._layers = len(patches.layers)
        self._overrides: list[tuple[nn.Module, str, Any, Any]] = []
        self._undo: list[Callable[[], None]] = []
        self.add(patches)
        forget_pages(model)

    def __repr__(self) -> str:
        layers = f", {self._layers} layers" if self._layers else ""
        reach = "any length" if self.length is None else f"{self.length:,} tokens"
        reason = f": {self.reason}" if self.reason else ""
        return f"{self.applied}{layers}, reaches {reach}{reason}"

    @property
    def length(self) -> int | None:
        """The tokens that the model reaches by a method that stretches its trained length.

        None if the method sets no end (ReRoPE, Dual Chunk Attention, dynamic methods) or does not
        say it (another base). `extend` leaves max_position_embeddings alone: tell `length` to
        clients that cut prompts there.
        """
        return describe(self.model, self.applied).length

    def extend(self, model: nn.Module) -> Extension:
        """Extend another model by all extensions of this one, such as a trainer's reference model.

        model: as for `extend`.

        Returns its own handle; a mesh is left out. Raises as `extend`.
        """
        return _extend_by_all(model, self.applied.all())

    @property
    def first(self) -> Extension:
        """The extension that `restore` undoes last."""
        return self if self.before is None else self.before.first

    def add(self, patches: Patches) -> None:
        """Apply more patches, as far as the first ones allow."""
        for module, name, value in patches.overrides:
            self._overrides.append((module, name, value, vars(module).get(name)))
            vars(module)[name] = value
            if isinstance(value, RotaryForward) and value.fused is not None:
                wrap_apply(value.fused.modeling, value)
        for module, before, after in patches.hooks:
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

        If something has wrapped the model's `generate` since (FSDP does), its wrapper stays.
        Raises RuntimeError, and changes nothing, if a later extension of the model is in place.
        """
        replaced = {
            name
            for module, name, value, _ in self._overrides
            if vars(module).get(name) is not value
        }
        if replaced - {"generate"}:
            raise RuntimeError(
                f"extend: the extension by {self.method} must be the model's last, "
                "got one after it; restore that one first"
            )
        forget_pages(self.model)
        while self._overrides:
            module, name, value, previous = self._overrides.pop()
            if vars(module).get(name) is not value:
                continue  # `generate` in a wrapper of FSDP: ours in it does nothing from now on
            if previous is None:
                del vars(module)[name]
            else:
                vars(module)[name] = previous
            if isinstance(value, RotaryForward) and value.fused is not None:
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
