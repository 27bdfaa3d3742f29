"""Which layers of a model can attend by a score method: each is tried out with one token."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .apply import unwrap_apply, wrap_apply
from .architecture import RotarySite, rotating_layers, unsupported
from .rotation import ATTENTION, KEYWORD, refuse_options, register_attention

_QUERY, _KEY = 2.0, 3.0
# What layers tell their attention and what changes nothing for one that is causal over all keys.
_HARMLESS = {"scaling", "dropout", "is_causal", "use_cache"}


class Layers:
    """The attention layers of one rotary embedding; takes a `Rotation`'s place to try them out.

    far: those that see all keys, to be extended.
    near: those with a sliding window, to be left alone: no distance in them is past the window,
        which training has covered.
    head_dim, dtype: of the queries in all of them.

    Raises ValueError where a layer does what the ops do not.
    """

    def __init__(self, site: RotarySite) -> None:
        self.dim = site.dim
        self.far: list[nn.Module] = []
        self.near: list[nn.Module] = []
        self.head_dim = 0
        self.dtype = torch.float32
        self._options: dict[str, Any] = {}
        register_attention()
        wrap_apply(site.modeling, self)
        try:
            for layer in rotating_layers(site.owner):
                self._try_out(site.owner, layer)
                _check(site.owner, layer, self._options)
                (self.near if self._options.get("sliding_window") else self.far).append(layer)
        finally:
            unwrap_apply(site.modeling, self)
        if not self.far:
            raise unsupported(
                site.owner, "all its layers have a sliding window, so none sees distances past it"
            )

    def rotate(self, q: Tensor, k: Tensor, unsqueeze_dim: int) -> tuple[Tensor, Tensor]:
        """Mark the dims that the layer has rotated."""
        q, k = q.clone(), k.clone()
        q[..., : self.dim], k[..., : self.dim] = _QUERY, _KEY
        return q, k

    def attend(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]
    ) -> Tensor:
        """Keep what the layer says of its attention, if it is one of queries and keys as marked."""
        marked = torch.arange(q.shape[-1], device=q.device) < self.dim
        for label, x, mark in (("queries", q, _QUERY), ("keys", k, _KEY)):
            if not torch.equal(x == mark, marked.expand_as(x)):
                raise ValueError(f"its {label} are not rotated in their first {self.dim} dims")
        if q.shape[-1] != v.shape[-1] or q.shape[1] % k.shape[1]:
            raise ValueError("its values are not of the shape of its keys")
        self._options, self.head_dim, self.dtype = options, q.shape[-1], v.dtype
        return q.transpose(1, 2)

    @torch.no_grad()
    def _try_out(self, owner: nn.Module, layer: nn.Module) -> None:
        """Run the module around the layer, since it must hand its keyword arguments on."""
        self._options = {}
        parameters = [*layer.parameters(), *owner.parameters()]
        dtype = next(p.dtype for p in parameters if p.is_floating_point())
        own = vars(layer)["config"]
        token = torch.zeros(1, 1, own.hidden_size, dtype=dtype, device=parameters[0].device)
        around = next(module for module in owner.modules() if layer in module.children())
        vars(layer)["config"] = switched(own)
        try:
            around.forward(
                hidden_states=token,
                position_embeddings=(self, None),
                attention_mask=None,
                **{KEYWORD: self},
            )
        except Exception as error:  # whatever a foreign layer leads to
            raise unsupported(
                owner, f"{type(layer).__name__} cannot be tried out ({error})"
            ) from error
        finally:
            vars(layer)["config"] = own


def switched(config: Any) -> Any:
    """Return a layer's config with the attention replaced; everything in it is shared."""
    config = copy.copy(config)
    config._attn_implementation_internal = ATTENTION
    return config


def _check(owner: nn.Module, layer: nn.Module, options: dict[str, Any]) -> None:
    """options: what the layer told its attention."""
    name = type(layer).__name__
    if not options:
        raise unsupported(owner, f"{name} does not attend through transformers' interface")
    if options.get("sliding_window"):
        return
    options = {key: value for key, value in options.items() if value is not None}
    refuse_options(layer, options)
    if not getattr(layer, "is_causal", True) or options.get("is_causal") is False:
        raise unsupported(owner, f"{name} is not causal")
    if options.get("softcap") is not None:
        raise unsupported(owner, f"{name} caps its logits (softcap {options['softcap']})")
    if others := [key for key in options if key not in _HARMLESS]:
        raise unsupported(owner, f"{name} attends with {' and '.join(sorted(others))}")
