"""`extend`: other frequencies or other relative positions for a loaded transformers model."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ... import RopeFreqs
from ..._usage import shortened
from ...scores import SCORES, Score
from .._shared.saved import Saved, read
from .attention import register_interface
from .caches import cache_hooks
from .frequencies import frequency_patches
from .guards import Guard
from .handle import Extension
from .model import Override, generation_config_owner
from .patches import ON_OWNER, Applied
from .request import (
    as_tokens,
    by_length_as_stated,
    choose,
    read_method,
    warn_of_nothing,
    why_no_region,
    with_stated,
)
from .rotary import (
    RotaryModule,
    find_rotary_modules,
    owners_of,
)
from .rotation import RotaryForward
from .saved import save_beside_adapters, save_plain
from .scores import score_patches

if TYPE_CHECKING:
    from ...distributed.attention import Strategy
    from ...distributed.layout import Balance, Mesh
    from .context_parallel import Shared

_HANDLE = "_extrope_handle"  # the attribute that has the handle of an owner's last extension


@torch.inference_mode(False)  # its tensors would have no part in a later backward
def extend(
    model: nn.Module,
    method: str | Score | RopeFreqs | None = None,
    *,
    length: int | str | None = None,
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

    **A score method, raw keys or a mesh run the model on four tokens.** No list of models says how
    layers rotate and attend, so `extend` tries it: at position 0 and at 0, 1, 5, 11, which tells
    the dims that rotate and their pairs, if tokens mix elsewhere, and if the op attends as a layer
    does. It raises ValueError where that fails. The probe changes nothing; it needs the weights,
    and a model's hooks see it. A frequency method alone runs nothing.

    Then rotary embeddings, attentions and `generate` of this model get other functions and hooks.
    Weights, buffers and configuration do not change. `generate` alone stops by default at
    max_position_embeddings: for longer prompts give it max_new_tokens.

    A frequency method (`methods.METHODS`) that scales starts from what the model was trained with
    (`methods.trained`): a linear, llama3 or longrope scaling of its configuration stays below it, a
    yarn or dynamic one is replaced. Nothing is scaled twice, nor is the softmax scale of latent
    attention (DeepSeek). If `apply_rope_qk` does what the model's layers do, every rotation goes
    through it: frequencies stay float32 and positions integers in a model of any dtype. Otherwise
    the model's own rotary embedding makes its tables.

    A method with a `seq_len` is frozen per request, so that cached keys stay valid: in `generate`
    for the prompt and max_new_tokens together, in a forward with an empty cache for its own tokens,
    or the largest of its position_ids. Rows of a batch have their own lengths, by attention_mask or
    position_ids; where `apply_rope_qk` cannot rotate each by its own frequencies (amplitudes that
    follow the length, packed rows, raw keys, a score method), lengths that differ raise ValueError.
    A `seq_len` among the parameters fixes it for good. With cache="raw" nothing is frozen: every
    forward rotates all keys anew, up to the trained length by the plain model's frequencies. Models
    whose layers with a window share such frequencies (Gemma 2) are refused then.

    The attention of other layers stays PyTorch's. After `model.set_attn_implementation("extrope")`
    this package computes it too, faster on a CPU.

    A score method (`scores.SCORES`) keeps the frequencies of the model, or of an extension before
    it (LongRoPE's and dynamic ones of a request's length), and changes the relative position that a
    pair sees; `log_n` scales queries too. Positions
    count from a row's first token: padded batches (on the left to generate) and packed rows (by
    position_ids that start anew, or by cu_seq_lens_q; they make no cache) give the same as their
    sequences alone. Refused: layers that do not see all keys before a query (indexers, compressed
    keys), logits that depend on more than distances (a norm with weights after the rotation),
    tokens with several positions (images), dropout, output_attentions, packed rows in models with
    convolutions or states, gradient checkpointing while frequencies follow the length, and xpos
    unless the method's positions start anew; it has raw keys then. Keys are cached as the plain
    model caches them, so a cache goes on under any score method, and after `restore`.

    With a mesh every rank runs the model on its own tokens of a sequence, as `distributed.shard`
    cuts it, and all layers attend across ranks; "rope" is the plain model. All ranks make the same
    call of `extend`. docs/guide/distributed.md has labels, FSDP, accelerate and what is refused.
    Without a mesh, a region of torch's `context_parallel` raises ValueError if the model would
    compute something else.

    model: any language model of transformers that rotates, with or without its head or a vision
        tower, which is left alone. docs/models.md lists them.
    method: a name of `PARAMETERS` (or "default", "linear", "dynamic", "su", transformers' names of
        rope types), or a `Score` or `RopeFreqs` of your own. If None, one is chosen for `length`:
        ReRoPE with half the trained length as its window, the chunks of a
        dual_chunk_attention_config, or YaRN for models that no score method serves, or whose images
        none takes. A model that reaches the length stays as it is.
    length: tokens to reach, also as "16k" (16 x 1,024). With a method that has a factor it stands
        in place of the factor, which becomes length / trained length, or of ReRoPE's window, half
        the trained length. A warning says if the trained length has them already, or if they are
        more than twice as far past it as was measured.
    layers: "full" extends the layers that see all keys. For a frequency method that is so if
        layers with a sliding window have their own rotation (Gemma 3); for a score method always,
        since distances in the others never exceed their window or chunk: "all", which extends all
        layers that rotate, is for frequency methods.
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
    ranks = None
    if mesh is not None:  # imported late: it takes half a second, and not every torch has it
        from .context_parallel import Shared

        ranks = Shared(mesh, strategy, balance)
    if cache not in (None, "raw") or (cache is not None and mesh is not None):
        raise ValueError(
            f"extend: cache must be None or 'raw', and None with a mesh, got {cache!r}"
        )
    length = as_tokens(length)
    if method is not None:
        name, parameters, own = read_method(model, method, length, layers, parameters)
        handle = _extend(model, Applied(name, parameters, layers, cache, own), ranks)
        if isinstance(method, str) and method != name:
            handle.reason = f"{method!r} of transformers"
        return handle
    choice, layers = choose(model, length, layers, parameters)
    try:
        applied = Applied(choice.method, dict(choice.parameters), layers, cache)
        handle = _extend(model, applied, ranks)
    except (ValueError, NotImplementedError) as error:
        if choice.method not in SCORES:
            raise
        reason = shortened(error).removeprefix("extend: ").rpartition("architecture: ")[2]
        choice, layers = choose(model, length, layers, parameters, reason)
        applied = Applied(choice.method, dict(choice.parameters), layers, cache)
        handle = _extend(model, applied, ranks)
    handle.reason, handle.changes = choice.reason, choice.changes
    return handle


def _extend(model: nn.Module, asked: Applied, ranks: Shared | None = None) -> Extension:
    """Extend by a method whose parameters are all chosen.

    ranks: those that share a sequence, over a mesh.
    """
    rotary_modules = find_rotary_modules(model, asked.layers)
    owners = owners_of(rotary_modules)
    _refuse_after(rotary_modules, asked.method)
    before = None
    stated = by_length_as_stated(rotary_modules) if asked.is_score and ranks is None else None
    if stated is not None:
        method, parameters = stated  # a score method keeps the frequencies that the model has
        before = _extend(model, Applied(method, parameters, asked.layers))
    try:
        register_interface()
        asked = with_stated(rotary_modules, asked)
        applied = replace(asked, before=vars(owners[0]).get(ON_OWNER))
        warn_of_nothing(rotary_modules, applied)
        make = score_patches if asked.is_score else frequency_patches
        patches = make(model, rotary_modules, applied)
        if ranks is not None:
            ranks.share(model, owners, patches)
        if ranks is None:
            patches.hooks += cache_hooks(rotary_modules, patches, applied)
        for each in owners:
            guard = Guard(None if ranks else why_no_region(applied), each is owners[0])
            patches.hooks.insert(0, (each, guard.before_forward, None))
        patches.overrides += _on_model(model, owners[0], applied)
        if "peft" in sys.modules:
            save_beside_adapters()
        handle = Extension(model, patches, applied)
        patches.overrides.append((owners[0], _HANDLE, handle))
        patches.then.append(partial(handle.warn_past, owners[0]))
        try:
            handle.complete(patches)
        except BaseException:
            handle.restore()
            raise
    except BaseException:
        if before is not None:
            before.restore()
        raise
    handle.before = before
    return handle


def restore(model: nn.Module) -> None:
    """Undo all extensions of a model, without their handles; none is fine.

    model: as it was given to `extend`, or one around it.

    Raises RuntimeError as a handle's `restore`.
    """
    for module in list(model.modules()):
        while ON_OWNER in vars(module):
            vars(module)[_HANDLE].restore()


def _on_model(model: nn.Module, owner: nn.Module, applied: Applied) -> list[Override]:
    """Return the overrides that tell of an extension: on its owner, and where it is saved."""
    overrides: list[Override] = [(owner, ON_OWNER, applied)]
    for each in dict.fromkeys((model, generation_config_owner(model))):
        if hasattr(each, "save_pretrained"):
            overrides.append((each, "save_pretrained", partial(save_plain, each, model, applied)))
    return overrides


def extend_from_saved(model: nn.Module, folder: str | os.PathLike) -> Extension:
    """Extend a model by all extensions that a folder was saved with.

    model: loaded from the folder, or the plain model.
    folder: written by a handle's `save_pretrained`, or by the extended model's own.

    Returns a handle as `extend` does; its `restore()` undoes all of them.
    Raises ValueError for a folder without an extension, and as `extend`.
    """
    return extend_by_all(model, read(folder))


def extend_by_all(model: nn.Module, extensions: Sequence[Saved] | Sequence[Applied]) -> Extension:
    """Extend a model by one after the other; the last one's handle restores all."""
    handle: Extension | None = None
    try:
        for each in extensions:
            where = {"layers": each.layers, "cache": each.cache}
            own = getattr(each, "own", None)
            following = extend(model, own or each.method, **where, **each.parameters)
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
        last = vars(rotary_module.owner).get(ON_OWNER)
        if last is not None and (last.is_score or last.cache is not None):
            raise ValueError(
                f"extend: {method} must come before {last.method}, "
                "got a model that is extended by it; restore that one first"
            )
        before = vars(rotary_module.module).get("forward")
        if isinstance(before, RotaryForward) and before.shared is not None:
            raise ValueError(
                f"extend: an extension over a mesh must be the last, got {method} after "
                f"{before.method}; restore that one first"
            )
