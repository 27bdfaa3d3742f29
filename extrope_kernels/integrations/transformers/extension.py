"""`extend`: other frequencies or other relative positions for a loaded transformers model."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

from torch import nn

from .architecture import RotarySite, find_sites
from .layers import Layers, find_layers, switched
from .parameters import bind_method, own_freqs
from .passes import Passes, PlainLayer, keep_mask
from .requests import LengthDependence, OneRequest
from .rotary import FusedRotary, unwrap_apply, wrap_apply
from .score_rotary import ScoreRotary
from .scores import SCORES, bind_score


def extend(model: nn.Module, method: str, **parameters: Any) -> Extension:
    """Change the frequencies or the relative positions of a loaded model, in place.

    Weights, buffers and configuration stay as they are.

    A frequency method (`methods.METHODS`) takes the place of whatever scaling the model's
    configuration names: nothing is scaled twice. Every rotation goes through `apply_rope_qk`:
    frequencies stay float32 and positions integers in a model of any dtype. Where a model rotates
    its full attention and its sliding window layers differently (Gemma 3), the full attention
    layers alone are extended. A method that depends on the length (`dynamic_ntk`, `dynamic_yarn`,
    `longrope`) is frozen per request, so that cached keys stay valid: `generate` chooses for the
    prompt and max_new_tokens (or max_length) together, a forward with an empty cache for its own
    tokens, or for the largest of its position_ids where it is given them. A `seq_len` among the
    parameters fixes it for good.

    A score method keeps the frequencies in force, the model's or those of an extension before it,
    and changes which relative position a pair sees: "rerope" (window), "leaky_rerope" (window,
    factor), "self_extend" (window, factor) as in `rerope_attention`, "dual_chunk" (chunk_size,
    local_window) as in `dual_chunk_attention`, each with log_n if wanted. The layers attend by
    these ops, and a cache holds each key once. Layers with a sliding window are left alone: none of
    their distances is past it. Positions count from a row's first token, so batches padded on
    either side, and on the left to generate, give what their rows give alone. Every cache that
    returns all keys in order serves, static ones too. Refused: soft-capped logits, attention
    sinks, dropout, packed rows, weights to be returned (output_attentions).

    Nothing in a model clips at max_position_embeddings but the default length of `generate`: give
    it max_new_tokens for prompts beyond.

    model: a decoder of the Llama, Mistral, Qwen2, Qwen3, Gemma, Phi or GPT-NeoX families, or any
        other that rotates by `apply_rotary_pos_emb` in a way that is found to agree with the op;
        with or without its head.
    method: a name of `PARAMETERS`.
    parameters: the method's parameters. For a frequency method, of the model's configuration come
        dim, base (its rope_theta; `abf` has its own), original_max_position_embeddings
        (max_position_embeddings where there is none) and max_position_embeddings, unless given.

    Returns a handle whose `restore()` undoes everything; it is a context manager, too.
    Raises ValueError for an unknown method, a model that cannot be extended, a missing or
    impossible parameter; TypeError for one that the method does not have. The model is then as it
    was.
    """
    sites = find_sites(model)
    _refuse_second_score(sites, method)
    if method in SCORES:
        return _extend_scores(model, sites, method, parameters)
    bound = [bind_method(method, site, parameters) for site in sites]
    extension = Extension(method)
    for site, (function, takes_length) in zip(sites, bound, strict=True):
        extension._take_over(site, function, takes_length)
    if any(takes_length for _, takes_length in bound) and hasattr(model, "generate"):
        extension._override(model, "generate", OneRequest(model))
    return extension


def _extend_scores(
    model: nn.Module, sites: list[RotarySite], method: str, parameters: dict[str, Any]
) -> Extension:
    freqs = [_freqs_in_force(site, method) for site in sites]
    layers = [find_layers(site) for site in sites]
    scores = [bind_score(method, parameters, found.head_dim, found.dtype) for found in layers]
    extension = Extension(method)
    for site, inner, found, score in zip(sites, freqs, layers, scores, strict=True):
        extension._switch_attention(site, ScoreRotary(inner, score), found)
    if hasattr(model, "generate"):
        extension._override(model, "create_masks_for_generate", keep_mask)
    return extension


def _freqs_in_force(site: RotarySite, method: str) -> FusedRotary:
    """Those of an extension before this one, or the model's own."""
    inner = vars(site.rotary).get("forward")
    if not isinstance(inner, FusedRotary):
        freqs = {site.layer_type: own_freqs(site)}
        return FusedRotary(site.rotary, freqs, site.interleaved, site.modeling)
    if inner.freqs[site.layer_type].log_decay is not None:
        raise ValueError(f"extend: {method} must have frequencies without decay, got xpos")
    return inner


def _refuse_second_score(sites: list[RotarySite], method: str) -> None:
    for site in sites:
        if isinstance(rotary := vars(site.rotary).get("forward"), ScoreRotary):
            raise ValueError(
                f"extend: {method} must come before {rotary.score.name}, "
                "got a model that is extended by it; restore that one first"
            )


class Extension:
    """An extended model's way back: `restore()`, or the end of a `with` block."""

    def __init__(self, method: str) -> None:
        self.method = method
        self._overrides: list[tuple[nn.Module, str, Any, Any]] = []
        self._undo: list[Callable[[], None]] = []

    def restore(self) -> None:
        """Put the model back as it was before `extend`, to the bit. A second call does nothing.

        Raises RuntimeError, and changes nothing, where a later extension of the model is in place.
        """
        if any(vars(module).get(name) is not value for module, name, value, _ in self._overrides):
            raise RuntimeError(
                f"extend: the extension by {self.method} must be the model's last, "
                "got one after it; restore that one first"
            )
        while self._overrides:
            module, name, _, previous = self._overrides.pop()
            if previous is None:
                del vars(module)[name]
            else:
                vars(module)[name] = previous
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Extension:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.restore()

    def _take_over(self, site: RotarySite, method: Callable[..., Any], takes_length: bool) -> None:
        freqs = {site.layer_type: method(seq_len=1) if takes_length else method()}
        fused = FusedRotary(site.rotary, freqs, site.interleaved, site.modeling)
        wrap_apply(site.modeling, fused)
        self._undo.append(lambda: unwrap_apply(site.modeling, fused))
        self._override(site.rotary, "forward", fused)
        if takes_length:
            length = LengthDependence(site.owner, fused, site.layer_type, method)
            before = site.owner.register_forward_pre_hook(length.before_forward, with_kwargs=True)
            after = site.owner.register_forward_hook(length.after_forward)
            self._undo += [before.remove, after.remove]

    def _switch_attention(self, site: RotarySite, rotary: ScoreRotary, layers: Layers) -> None:
        wrap_apply(site.modeling, rotary)
        self._undo.append(lambda: unwrap_apply(site.modeling, rotary))
        self._override(site.rotary, "forward", rotary)
        for layer in layers.far:
            self._override(layer, "config", switched(layer.config))
        passes = Passes(site.owner, rotary, site.layer_type, all_layers=not layers.near)
        hooks = [(site.owner, passes)] + [(layer, PlainLayer(layer)) for layer in layers.near]
        for module, hook in hooks:
            handle = module.register_forward_pre_hook(hook.before_forward, with_kwargs=True)
            self._undo.append(handle.remove)
        self._undo.append(site.owner.register_forward_hook(passes.after_forward).remove)

    def _override(self, module: nn.Module, name: str, value: Any) -> None:
        """Give `module` an attribute of its own that hides its class's method."""
        self._overrides.append((module, name, value, vars(module).get(name)))
        vars(module)[name] = value
