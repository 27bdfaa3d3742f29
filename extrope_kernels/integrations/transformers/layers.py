"""Which layers of a model can attend by a score method: each is tried out with one token."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .architecture import RotarySite, rotating_layers, unsupported
from .attention import NAME, PASS, refuse_options, register_attention
from .rotary import Rotation, unwrap_apply, wrap_apply

_QUERY, _KEY = 2.0, 3.0
# What layers tell their attention and what changes nothing for one that is causal over all keys.
_HARMLESS = {"scaling", "dropout", "is_causal", "use_cache"}


@dataclass
class Layers:
    """The attention layers of one rotary embedding.

    far: those that see all keys, to be extended.
    near: those with a sliding window, to be left alone: no distance in them is past the window,
        which training has covered.
    head_dim, dtype: of the queries in all of them.
    """

    head_dim: int = 0
    dtype: torch.dtype = torch.float32
    far: list[nn.Module] = field(default_factory=list)
    near: list[nn.Module] = field(default_factory=list)


def find_layers(site: RotarySite) -> Layers:
    """Return a site's layers; raise ValueError where one does what the ops do not."""
    register_attention()
    layers = Layers()
    probe = _Probe(site.dim)
    wrap_apply(site.modeling, probe)
    try:
        for layer in rotating_layers(site.owner):
            options = probe.try_out(site.owner, layer)
            (layers.near if options.get("sliding_window") else layers.far).append(layer)
            layers.head_dim, layers.dtype = probe.head_dim, probe.dtype
    finally:
        unwrap_apply(site.modeling, probe)
    if not layers.far:
        raise unsupported(
            site.owner, "all its layers have a sliding window, so none sees distances past it"
        )
    return layers


def switched(config: Any) -> Any:
    """Return a layer's config with the attention replaced; everything in it is shared."""
    config = copy.copy(config)
    config._attn_implementation_internal = NAME
    return config


def _around(owner: nn.Module, layer: nn.Module) -> nn.Module:
    return next(module for module in owner.modules() if layer in module.children())


class _Probe(Rotation):
    """Takes the place of cos, and of a `Pass`, in the forward of one layer on one token."""

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self.head_dim = 0
        self.dtype = torch.float32
        self.options: dict[str, Any] = {}

    def rotate(self, q: Tensor, k: Tensor, unsqueeze_dim: int) -> tuple[Tensor, Tensor]:
        """Mark the lanes that the layer has rotated."""
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
                raise ValueError(f"its {label} are not rotated in their first {self.dim} lanes")
        if q.shape[-1] != v.shape[-1] or q.shape[1] % k.shape[1]:
            raise ValueError("its values are not of the shape of its keys")
        self.options, self.head_dim, self.dtype = options, q.shape[-1], v.dtype
        return q.transpose(1, 2)

    @torch.no_grad()
    def try_out(self, owner: nn.Module, layer: nn.Module) -> dict[str, Any]:
        """Return the arguments of a layer's attention, which are checked.

        The module around the layer runs, since it must hand its keyword arguments on.
        """
        self.options = {}
        parameters = [*layer.parameters(), *owner.parameters()]
        dtype = next(p.dtype for p in parameters if p.is_floating_point())
        own = vars(layer)["config"]
        token = torch.zeros(1, 1, own.hidden_size, dtype=dtype, device=parameters[0].device)
        vars(layer)["config"] = switched(own)
        try:
            _around(owner, layer).forward(
                hidden_states=token,
                position_embeddings=(self, None),
                attention_mask=None,
                **{PASS: self},
            )
        except Exception as error:  # whatever a foreign layer leads to
            raise unsupported(
                owner, f"{type(layer).__name__} cannot be tried out ({error})"
            ) from error
        finally:
            vars(layer)["config"] = own
        self._check(owner, layer)
        return self.options

    def _check(self, owner: nn.Module, layer: nn.Module) -> None:
        name = type(layer).__name__
        if not self.options:
            raise unsupported(owner, f"{name} does not attend through transformers' interface")
        if self.options.get("sliding_window"):
            return
        options = {key: value for key, value in self.options.items() if value is not None}
        refuse_options(layer, options)
        if not getattr(layer, "is_causal", True) or options.get("is_causal") is False:
            raise unsupported(owner, f"{name} is not causal")
        if options.get("softcap") is not None:
            raise unsupported(owner, f"{name} caps its logits (softcap {options['softcap']})")
        if others := [key for key in options if key not in _HARMLESS]:
            raise unsupported(owner, f"{name} attends with {' and '.join(sorted(others))}")
