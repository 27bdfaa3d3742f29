"""The changes that `extend` makes for a score method, and for keys that are cached raw.

A hook checks the rows that a model reads. The attention counts a row's keys by the mask, and the
model's layers rotate by position_ids. Both must mean the same distances: positions count from a
row's first token, or slots with padding. Rows that pack several sequences, by positions that start
anew or by boundaries, get masks that say so.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...ops.attention import check_log_n
from ...scores import Score
from .._shared.choice import images_refused
from .._shared.parameters import DUAL_CHUNKS, SPARSE, bind_score, scale_from, score_values_in
from .attention import BOUNDARIES, ON_LAYER, attending_overrides, is_paged, numbers_in
from .generate import batching_patches, mask_patches
from .layers import LayerProbe, kind_of, refuse_without_weights
from .model import (
    argument_names,
    cache_of,
    exports_to_onnx,
    generation_config_owner,
    tokens_in,
    tokens_of,
    unsupported,
)
from .patches import Applied, Patches
from .rotary import (
    RotaryModule,
    find_rotary_modules,
    owners_of,
)
from .rotation import RotaryForward, Rotation, ThreadFrequencies, fingerprint

_OF_KEYS = "cu_seq_lens_k"
_TABLES = "position_embeddings"


class ScoreRequest(NamedTuple):
    """A score method with its parameters; score None for plain RoPE of raw keys.

    log_n: scales queries, unless None. scale_from: the length from which logits grow
        (`query_scale.qwen_1m`), or None.
    """

    score: Score | None = None
    log_n: float | None = None
    scale_from: int | None = None


def read_score(rotary_modules: list[RotaryModule], applied: Applied) -> ScoreRequest:
    """Return the score method of an extension; a model may add parameters of dual_chunk."""
    config, parameters = rotary_modules[0].module.config, applied.parameters
    if isinstance(applied.own, Score):
        check_log_n("extend", log_n := parameters.get("log_n"))
        return ScoreRequest(applied.own, log_n)
    if applied.method == "dual_chunk" and getattr(config, DUAL_CHUNKS, None):
        warnings.warn(f"extend: {SPARSE}", stacklevel=6)
        parameters = score_values_in(config, applied.method) | parameters
    score, log_n = bind_score("extend", applied.method, parameters)
    return ScoreRequest(score, log_n, scale_from("extend", parameters))


def score_patches(
    model: nn.Module, rotary_modules: list[RotaryModule], applied: Applied
) -> Patches:
    """Return the patches of a score method; the model is not changed yet."""
    request = read_score(rotary_modules, applied)
    if applied.layers == "all":
        raise ValueError(
            f"extend: layers must be 'full' for {applied.method}, got 'all': windows and chunks "
            "have no distances that training has not covered"
        )
    patches = attention_patches(model, rotary_modules, applied, request)
    if reason := why_no_images(model, rotary_modules):
        told = f"{applied.method} takes text without images: {reason}"
        warnings.warn(f"extend: {told}", stacklevel=5)
    return patches


def raw_key_patches(model: nn.Module, applied: Applied) -> Patches:
    """Return what lets layers rotate all cached keys anew, by frequencies that are in place."""
    rotary_modules = find_rotary_modules(model, applied.layers)
    patches = attention_patches(model, rotary_modules, applied, ScoreRequest())
    in_place = [vars(each.module)["forward"] for each in rotary_modules]
    changing = {kind for each in in_place if each.thread_freqs.by_length for kind in each.freqs}
    near = [each for each in patches.probe.near if changing & {None, kind_of(each)}]
    if near:
        raise unsupported(
            near[0],
            "it has a window, so it caches keys as they were rotated, but frequencies of "
            f"{applied.method} change with the length; give it a seq_len, or leave cache out",
        )
    return patches


def attention_patches(
    model: nn.Module, rotary_modules: list[RotaryModule], applied: Applied, request: ScoreRequest
) -> Patches:
    """Return the changes by which layers attend by a score, or by raw keys.

    Raises ValueError if parts of a model count different things, such as bytes and patches.
    """
    owner, *others = owners_of(rotary_modules)
    if others:
        names = ", ".join(sorted(type(each).__name__ for each in (owner, *others)))
        raise unsupported(
            model, f"each of {names} counts its own positions, but a window has one unit"
        )
    method, score = applied.method, request.score
    refuse_without_weights(owner, method)
    rotaries = [
        RotaryForward(each, _thread_frequencies(each, method, score), method)
        for each in rotary_modules
    ]
    freqs = [each for rotary in rotaries for each in rotary.freqs.values()]
    if score is not None and score.pair_maps is not None:
        given = score.pair_maps.shape[-1]
        for each in freqs:
            if (pairs := each.inv_freq.shape[-1]) != given:
                raise ValueError(
                    f"extend: {method} must have maps of {pairs} pairs of dims, got {given}"
                )
    probe = LayerProbe(model, owner, rotaries)
    raw = applied.cache is not None or any(each.log_decay is not None for each in freqs)
    if raw and any(each.attention_factor != 1 for each in freqs):
        probe.scale_by_themselves()
    for layer in probe.far.values():
        layer.score, layer.log_n, layer.scale_from = request
        layer.raw = raw
    used = {id(each.rotary): each.rotary for each in probe.far.values()}
    hooks = RowsOfOwner(owner, list(used.values()), probe.others_mix)
    patches = Patches(
        [override for each in used.values() for override in each.overrides()],
        [(owner, hooks.before_forward, None)],
        probe=probe,
        raw=raw,
    )
    patches.overrides += [(layer, ON_LAYER, found) for layer, found in probe.far.items()]
    patches.overrides += attending_overrides(owner, (*probe.far, *probe.still))
    patches.overrides += [*mask_patches(model), *batching_patches(model)]
    if raw:
        for layer in probe.far:
            if _TABLES not in argument_names(layer):
                raise unsupported(layer, "it makes its own tables, so its keys cannot stay raw")
            patches.hooks.append((layer, _leave_raw, None))
    return patches


def _leave_raw(layer: nn.Module, arguments: dict[str, Any]) -> None:
    """Keep a layer's queries and keys raw: hook before its forward."""
    arguments[_TABLES] = _unrotated(arguments[_TABLES])


def _unrotated(tables: Any) -> Any:
    """Return tables that rotate by nothing."""
    if isinstance(tables, (Rotation, Tensor)):  # a tensor: of complex numbers
        return tables.unrotated() if isinstance(tables, Rotation) else torch.ones_like(tables)
    if isinstance(tables[0], Rotation):
        return tuple(each.unrotated() for each in tables)
    return torch.ones_like(tables[0]), torch.zeros_like(tables[1])


def _thread_frequencies(
    rotary_module: RotaryModule, method: str, score: Score | None
) -> ThreadFrequencies:
    """Return the frequencies of an earlier extension, or the model's own."""
    before = vars(rotary_module.module).get("forward")
    if not isinstance(before, RotaryForward):
        own = {kind: rotary_module.own_freqs(kind) for kind in rotary_module.layer_types}
        return ThreadFrequencies(own, {kind: fingerprint(each) for kind, each in own.items()})
    # Positions that restart keep the amplitudes of the decay near 1.
    decays = any(freqs.log_decay is not None for freqs in before.freqs.values())
    if decays and score is not None and not score.stored.modulus:
        raise ValueError(
            f"extend: {method} must have frequencies without decay, got {before.method}"
        )
    return before.thread_freqs


def why_no_images(model: nn.Module, rotary_modules: list[RotaryModule]) -> str | None:
    """Return why a score method refuses the images that a model reads; None if it takes them."""
    generator = generation_config_owner(model)
    whole = getattr(generator, "config", None)
    text = None if whole is None else whole.get_text_config(decoder=True)
    if text is whole:
        return None
    kinds = [each.parameters(kind) for each in rotary_modules for kind in each.layer_types]
    both_ways = getattr(text, "use_bidirectional_attention", None)
    return images_refused(kinds, bool(both_ways) or "token_type_ids" in argument_names(generator))


class RowsOfOwner:
    """The hook of an owner whose layers attend by a score method, or by raw keys.

    rotaries: what its rotary embeddings do. others_mix: tokens mix outside of attention, too.
    """

    def __init__(
        self, owner: nn.Module, rotaries: Sequence[RotaryForward], others_mix: bool
    ) -> None:
        self.rotaries = rotaries
        self.method = rotaries[0].method
        self.by_length = any(each.thread_freqs.by_length for each in rotaries)
        self.others_mix = others_mix
        self.takes_use_cache = "use_cache" in argument_names(owner)

    def before_forward(self, module: nn.Module, arguments: dict[str, Any]) -> None:
        """Check a forward's arguments: hook before the owner's forward."""
        if arguments.get("output_attentions") or getattr(module.config, "output_attentions", False):
            raise ValueError(
                "extend: output_attentions must be False, since the ops return no weights, got True"
            )
        if self.by_length and module.training and torch.is_grad_enabled():
            _refuse_checkpoints(module, self.method)
        if exports_to_onnx():
            # The exporter would hide an error, retry in another way, and fail later.
            warnings.warn(
                f"extend: a model under {self.method} cannot be exported to ONNX, "
                "which has no such attention; torch.export and AOTInductor take it",
                stacklevel=2,
            )
        tokens, cache = tokens_of(arguments), cache_of(arguments)
        # Over a mesh another hook has looked.
        if self.rotaries[0].shared is not None or _is_left_alone(cache, arguments):
            return
        past = tokens_in(cache)
        mask = arguments.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            batch, all_tokens = tokens.shape[0], past + tokens.shape[1]
            if mask.shape[0] != batch or mask.shape[1] < all_tokens:
                raise ValueError(
                    f"extend: attention_mask must be ({batch}, {all_tokens}), cached tokens "
                    f"included, got {tuple(mask.shape)}"
                )
            # Convolutions and states take its last columns for the new tokens.
            arguments["attention_mask"] = mask[:, :all_tokens]
        positions = _packed_positions(tokens, past, arguments)
        if positions is None:
            return
        if self.others_mix:
            raise ValueError(
                "extend: a model must have no convolutions or states for packed rows, got "
                f"{type(module).__name__}; pad its rows instead"
            )
        if cache is not None:
            raise ValueError(
                "extend: packed rows must come without a cache, got one; pad rows to generate"
            )
        masks = packed_masks(module, tokens, positions)
        arguments |= {"position_ids": positions, "attention_mask": masks}
        if self.takes_use_cache:
            arguments["use_cache"] = False


def _refuse_checkpoints(owner: nn.Module, method: str) -> None:
    """Raise ValueError if layers are computed anew after the forward that chose frequencies."""
    if any(getattr(each, "gradient_checkpointing", False) for each in owner.modules()):
        raise ValueError(
            f"extend: gradient checkpointing under {method} must have frequencies that no length "
            "changes, got some that do; extend with a seq_len first"
        )


def _is_left_alone(cache: Any, arguments: Mapping[str, Any]) -> bool:
    """Return True for pages, which have their own rows, and where a graph must not read values."""
    if is_paged(arguments):
        return True
    if not torch.compiler.is_compiling():
        return False
    bounded = arguments.get(BOUNDARIES) is not None
    return cache is not None or bounded or arguments.get("position_ids") is None


def _packed_positions(tokens: Tensor, past: int, arguments: Mapping[str, Any]) -> Tensor | None:
    """Return the positions of packed rows, (batch, new); None for other rows.

    tokens: (batch, new, ...); only shape and device count. past: tokens in the cache.
    Raises ValueError for positions and boundaries that mean other distances than the mask.
    """
    given, mask = arguments.get("position_ids"), _full_mask(arguments.get("attention_mask"))
    batch, new = tokens.shape[:2]
    if arguments.get(BOUNDARIES) is not None:
        return _positions_by_boundaries(tokens, arguments)
    if given is None:
        return None
    if not (given != torch.arange(past, past + new, device=given.device)).any():  # slots
        return None
    real = None
    if isinstance(mask, Tensor) and (numbers := numbers_in(mask, batch, new)) is not None:
        index = torch.arange(numbers.shape[1], device=numbers.device)
        begins = numbers.diff(prepend=numbers[:, :1] - 1) != 0
        counted = index - (index * begins).cummax(-1)[0]
        counted, real = (x[:, past : past + new].to(given.device) for x in (counted, numbers > 0))
        if not ((given != counted) & real).any():
            return None
    packed = None
    if not past and given.dim() == 2 and (mask is None or mask.dim() == 2):
        packed = _positions_by_restarts(given.expand(batch, new), real)
    if packed is None:
        raise ValueError(
            "extend: position_ids must count 0, 1, 2, ... from the first token of each "
            "row or packed sequence, got others; mark padding by attention_mask, pack "
            "without a cache or a mask of pairs; score methods refuse tokens with several "
            "positions, as images have"
        )
    return packed


def _full_mask(mask: Any) -> Any:
    """Return the mask of layers that see all keys, if a model gets one per kind of layers."""
    if not isinstance(mask, Mapping):
        return mask
    return next((each for kind, each in mask.items() if kind.startswith("full")), None)


def _positions_by_restarts(given: Tensor, real: Tensor | None) -> Tensor | None:
    """Return the positions of rows that start anew with each sequence; None if they do not.

    given: (batch, new) position_ids. real: (batch, new) bool, False in padding; None without.
    """
    begins = given.diff(prepend=given[:, :1]) != 1  # the first of a row too
    if real is not None:
        changes = real != torch.cat((~real[:, :1], real[:, :-1]), 1)
        begins = begins & real | changes
    starts = begins.flatten().nonzero()[:, 0]
    index = torch.arange(given.numel(), device=given.device)
    positions = (index - starts[begins.flatten().cumsum(0) - 1]).view(given.shape)
    wrong = given != positions
    return None if (wrong if real is None else wrong & real).any() else positions


def _positions_by_boundaries(tokens: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """Return the positions of packed sequences by their boundaries; the host reads all at once.

    tokens: (1, new, ...). Tokens past the last boundary are padding.
    Raises ValueError for several rows, and for boundaries that do not rise, that differ for keys,
    or that contradict position_ids.
    """
    boundaries, of_keys = arguments[BOUNDARIES], arguments.get(_OF_KEYS)
    if not isinstance(boundaries, Tensor) or boundaries.dim() != 1 or len(tokens) != 1:
        got = tuple(boundaries.shape) if isinstance(boundaries, Tensor) else type(boundaries)
        raise ValueError(
            f"extend: {BOUNDARIES} must be a tensor (sequences + 1,) for tokens in one row, got "
            f"{got} for {len(tokens)} rows"
        )
    if of_keys is not None and of_keys.shape != boundaries.shape:
        raise ValueError(f"extend: {_OF_KEYS} must be {BOUNDARIES} in packed rows, got another")
    boundaries, new = boundaries.to(tokens.device), tokens.shape[1]
    index = torch.arange(new, device=tokens.device)
    sequence = torch.searchsorted(boundaries, index, right=True) - 1
    positions = (index - boundaries[sequence])[None]
    rises = (boundaries[0] == 0) & (boundaries.diff() >= 0).all() & (boundaries[-1] <= new)
    counts = torch.ones_like(rises)
    if (given := arguments.get("position_ids")) is not None:
        counts = ((given == positions) | (index >= boundaries[-1])).all()
    rises, counts = torch.stack((rises, counts)).tolist()
    if not rises:
        raise ValueError(
            f"extend: {BOUNDARIES} must rise from 0 to the row's {new} tokens at most, "
            f"got {boundaries.tolist()}"
        )
    if not counts:
        raise ValueError(
            "extend: position_ids must count 0, 1, 2, ... from the first token of each sequence in "
            f"{BOUNDARIES}, got others"
        )
    return positions


def packed_masks(module: nn.Module, tokens: Tensor, positions: Tensor) -> Any:
    """Return the masks of packed rows, by kind of layers, as `generate` prepares masks.

    Some models make their own without positions (GPT-OSS, AFMoE).
    """
    from transformers.masking_utils import create_masks_for_generate

    # Of the tokens only sizes, dtype and device count. Names differ between versions.
    like = torch.empty(*tokens.shape[:2], 0, dtype=module.dtype, device=tokens.device)
    arguments = {"config": module.config, "attention_mask": None, "position_ids": positions}
    arguments |= {"inputs_embeds": like, "input_embeds": like, "cache": None}
    arguments |= {
        "past_key_values": None,
        "cache_position": torch.arange(tokens.shape[1], device=tokens.device),
    }
    names = inspect.signature(create_masks_for_generate).parameters
    arguments = {name: value for name, value in arguments.items() if name in names}
    return create_masks_for_generate(**arguments)
