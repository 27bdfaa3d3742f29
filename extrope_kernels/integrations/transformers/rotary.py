"""Find a model's rotations and their form by trying them, not by the names of models.

`find_rotary_modules` returns a `RotaryModule` for each rotary embedding of the language model. A
rotary embedding makes tables (cosines and sines, or complex numbers). A copy of it, given other
frequencies, makes tables of those and keeps all else that it does: axes of positions, orders of the
dims. If the op rotates as the layers do by these tables, it takes over.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ... import RopeFreqs, apply_rope_qk, methods
from ..._rope_types import rope_type
from .._shared.parameters import is_bounded, lengths_in
from .attention import plain_class
from .model import BOUNDED, argument_names, forward_of, no_model, unsupported

APPLY = "apply_rotary_pos_emb"  # the function by which most modeling modules rotate
_POSITIONS = [[0, 1, 5, 11]]  # of a probe


@dataclass(frozen=True)
class Fused:
    """The op in place of `apply_rotary_pos_emb`, a global of a modeling module.

    modeling: the module's name.
    interleaved: pairs are dims (2i, 2i+1), not (i, i + dim/2).
    """

    modeling: str
    interleaved: bool


@dataclass(frozen=True, eq=False)
class RotaryModule:
    """One rotary embedding and its surroundings.

    owner: the module whose forward takes the tokens and calls the rotary embedding.
    module: the rotary embedding.
    orders: by kind of layers to extend (None if all layers have one rotation): the pair of each
        frequency, if they are not in the order of the pairs; else None.
    fused: the op's options to do what the layers do with tables; None if it cannot.
    single: True if the rotary embedding yields one tensor of complex numbers, not (cos, sin).
    """

    owner: nn.Module
    module: nn.Module
    orders: Mapping[str | None, Tensor | None]
    fused: Fused | None
    single: bool

    @property
    def layer_types(self) -> tuple[str | None, ...]:
        """The kinds of layers to extend."""
        return tuple(self.orders)

    def parameters(self, layer_type: str | None) -> Mapping[str, Any]:
        """Return the entries of config.rope_parameters for a kind of layers."""
        return _parameters(self.module, layer_type)

    def dim(self, layer_type: str | None) -> int:
        """Return the number of dims of a head that a kind of layers rotates."""
        return 2 * attribute_of(self.module, layer_type, "inv_freq").shape[-1]

    def tables(self, layer_type: str | None, freqs: RopeFreqs) -> Tables:
        """Return the rotary embedding's tables for other frequencies."""
        return Tables(self.module, layer_type, freqs, self.orders[layer_type])

    @property
    def learned(self) -> bool:
        """True if frequencies are weights, which no configuration states (Mistral Large 4)."""
        return bool(self.module._parameters)

    @property
    def reach(self) -> int | None:
        """The tokens that the model reaches as it is; None if that is not known."""
        if (known := lengths_in(self.module.config, self.layer_types[0])) is None:
            return None
        stated = self.parameters(self.layer_types[0]).get("rope_type", "default")
        return known.unscaled if stated == "default" else known.reach  # a saved config says more

    def own_freqs(self, layer_type: str | None) -> RopeFreqs:
        """Return the model's own frequencies, on its device.

        Raises ValueError if they change with the length.
        """
        rotary, kind = self.module, self.module.rope_type
        if layer_type is not None:
            kind = kind[layer_type]
        if rope_type(kind).by_length:
            raise unsupported(
                self.owner,
                f"its frequencies ({kind}) change with the length; "
                "extend it by a method of that name first",
            )
        inv_freq = attribute_of(rotary, layer_type, "inv_freq")
        if inv_freq.dtype != torch.float32:
            # A cast of the whole model rounded them; the config still has the exact values.
            with torch.device("cpu"):
                fresh = type(rotary)(rotary.config)
            inv_freq = attribute_of(fresh, layer_type, "inv_freq").to(inv_freq.device)
        if self.learned:
            if set(self.module._parameters) != {"alpha"}:
                raise unsupported(self.owner, "its frequencies depend on weights not known here")
            inv_freq = inv_freq.float() * self.module.alpha.detach().float().exp()
        if (order := self.orders[layer_type]) is not None:
            inv_freq = inv_freq[order.argsort().to(inv_freq.device)]
        factor = float(attribute_of(rotary, layer_type, "attention_scaling", 1.0))
        return RopeFreqs(inv_freq.detach().float().clone(), factor)


def find_rotary_modules(model: nn.Module, layers: str = "full") -> list[RotaryModule]:
    """Return every rotary embedding of `model`; raise ValueError if one cannot be replaced."""
    if not isinstance(model, nn.Module):
        raise no_model("extend", model)
    if layers not in ("full", "all"):
        raise ValueError(f"extend: layers must be full or all, got {layers!r}")
    rotary_modules = [
        _rotary_module(owner, rotary, layers) for owner, rotary in rotary_embeddings(model)
    ]
    if not rotary_modules:
        raise ValueError(
            "extend: model must have a rotary embedding configured by rope_parameters, "
            f"got a {type(model).__name__} without"
        )
    return rotary_modules


def owners_of(rotary_modules: Sequence[RotaryModule]) -> list[nn.Module]:
    """Return the owners of rotary embeddings, each once."""
    return list(dict.fromkeys(each.owner for each in rotary_modules))


def rotary_embeddings(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Yield the language model's rotary embeddings, not those of a vision tower's patches."""
    for path, module in model.named_modules():
        parameters = getattr(getattr(module, "config", None), "rope_parameters", None)
        if not hasattr(module, "rope_type") or not isinstance(parameters, Mapping):
            continue
        names = path.split(".")[:-1]
        around = [model.get_submodule(".".join(names[:end])) for end in range(len(names), -1, -1)]
        if isinstance(module.config, _language_configs(around)):
            # The innermost module around it that takes tokens.
            takers = (each for each in around if "inputs_embeds" in argument_names(each))
            yield next(takers, around[0]), module


def _language_configs(around: list[nn.Module]) -> tuple[type, ...]:
    """Return the classes of the language model's config and of its parts' (Blt).

    The config is the outermost one of transformers: a wrapper may have none, or another.
    """
    from transformers import PreTrainedModel

    whole = next((each for each in reversed(around) if isinstance(each, PreTrainedModel)), None)
    if whole is None:
        return (object,)
    text = whole.config.get_text_config(decoder=True)
    parts = [
        getattr(text, name, None)
        for name in getattr(text, "sub_configs", ())
        if not name.startswith(("vision", "audio"))
    ]
    return (plain_class(text), *(type(part) for part in parts if part is not None))


def _rotary_module(owner: nn.Module, rotary: nn.Module, layers: str) -> RotaryModule:
    if getattr(rotary.config, "alibi", False):
        raise unsupported(owner, "its layers have ALiBi in place of a rotation")
    layer_types: list[str | None] = [None]
    if isinstance(rotary.rope_type, Mapping):
        kinds = [kind for kind in rotary.rope_type if hasattr(rotary, f"{kind}_inv_freq")]
        layer_types = [kind for kind in kinds if layers == "all" or not is_bounded(kind)]
        if not layer_types:
            raise unsupported(owner, BOUNDED)
    try:
        # Built anew: the buffers and the history of the model's own are not touched.
        with torch.device("cpu"):
            fresh = type(rotary)(rotary.config)
        single = any([_change_tables(fresh, layer_type) for layer_type in layer_types])
    except Exception as error:  # a foreign signature may raise anything
        raise unsupported(owner, f"its rotation cannot be tried out ({error})") from error
    orders = {layer_type: _order(owner, fresh, layer_type) for layer_type in layer_types}
    usual = not single and all(order is None for order in orders.values())
    fused = _find_fused(owner, fresh, layer_types) if usual else None
    return RotaryModule(owner, rotary, orders, fused, single)


def _parameters(rotary: nn.Module, layer_type: str | None) -> Mapping[str, Any]:
    parameters = rotary.config.rope_parameters
    if layer_type is not None:
        return parameters[layer_type]
    return {name: value for name, value in parameters.items() if not isinstance(value, Mapping)}


def attribute_of(rotary: nn.Module, layer_type: str | None, name: str, *default: Any) -> Any:
    """Return a rotary embedding's inv_freq or attention_scaling for a kind of layers."""
    return getattr(rotary, _prefixed(layer_type, name), *default)


def _prefixed(layer_type: str | None, name: str) -> str:
    return name if layer_type is None else f"{layer_type}_{name}"


def _order(owner: nn.Module, rotary: nn.Module, layer_type: str | None) -> Tensor | None:
    """Return the order in which the model holds its frequencies; None for the usual one.

    Raises ValueError if they are not the powers of the configuration's base.
    """
    parameters = _parameters(rotary, layer_type)
    if parameters.get("rope_type", "default") != "default" or "rope_theta" not in parameters:
        return None
    own = attribute_of(rotary, layer_type, "inv_freq").float()
    ladder = methods.rope(2 * own.numel(), base=parameters["rope_theta"]).inv_freq
    if torch.allclose(own, ladder, rtol=1e-4):
        return None
    if not torch.allclose(own.sort().values, ladder.sort().values, rtol=1e-4):
        raise unsupported(owner, "its frequencies are not the powers of its rope_theta")
    order = torch.empty_like(own, dtype=torch.int64)
    order[own.argsort()] = ladder.argsort()
    return order


class Tables:
    """A rotary embedding with other frequencies, in float32: call it like the model's own."""

    def __init__(
        self,
        rotary: nn.Module,
        layer_type: str | None,
        freqs: RopeFreqs,
        order: Tensor | None = None,
    ) -> None:
        self.freqs = freqs
        if order is not None:
            freqs = replace(freqs, inv_freq=freqs.inv_freq[..., order.to(freqs.inv_freq.device)])
        self.options = {} if layer_type is None else {"layer_type": layer_type}
        self.reference = reference_copy(rotary, layer_type, freqs)

    def __call__(self, x: Tensor, position_ids: Tensor) -> Any:
        try:
            return type(self.reference).forward(self.reference, x, position_ids, **self.options)
        except IndexError:
            # Before transformers 5.19, embeddings with three axes take no positions of one.
            if position_ids.dim() != 2:
                raise
            return self(x, position_ids.expand(3, -1, -1))


def reference_copy(rotary: nn.Module, layer_type: str | None, freqs: RopeFreqs) -> nn.Module:
    """Return the rotary embedding with other frequencies, independent of the length."""
    reference = copy.copy(rotary)
    attributes = vars(reference)
    attributes.pop("forward", None)
    attributes["_buffers"] = dict(rotary._buffers)
    name = _prefixed(layer_type, "inv_freq")
    holder = attributes["_buffers"] if name in rotary._buffers else attributes
    holder[name] = freqs.inv_freq
    attributes[_prefixed(layer_type, "attention_scaling")] = freqs.attention_factor
    # What multiplies frequencies by exp(a weight) is to leave these as they are.
    attributes["_parameters"] = {k: torch.zeros_like(v) for k, v in rotary._parameters.items()}
    # Some compute their frequencies again in every forward.
    attributes["rope_init_fn"] = lambda *_, **__: (freqs.inv_freq, freqs.attention_factor)
    if layer_type is None:
        attributes["rope_type"] = "default"
        attributes["config"] = config = copy.copy(rotary.config)
        config.rope_parameters = {**config.rope_parameters, "rope_type": "default"}
    else:
        attributes["rope_type"] = {**rotary.rope_type, layer_type: "default"}
    return reference


def probe_numbers(first: float, last: float, count: int) -> Tensor:
    """Return evenly spaced numbers, independent of torch's default dtype and device."""
    return torch.linspace(first, last, count, dtype=torch.float32, device="cpu")


def _change_tables(rotary: nn.Module, layer_type: str | None) -> bool:
    """Try other frequencies; return True if the tables are one tensor, not (cos, sin).

    Doubled frequencies must give the same tables as doubled positions. Raises ValueError if they
    do not: the angle then depends on more.
    """
    inv_freq = probe_numbers(0.2, 1.1, attribute_of(rotary, layer_type, "inv_freq").shape[-1])
    positions = torch.tensor(_POSITIONS, device="cpu")
    x = inv_freq.new_zeros(1, 4, 2 * inv_freq.numel())

    def tables(inv_freq: Tensor, positions: Tensor, factor: float = 1.0) -> list[Tensor]:
        made = Tables(rotary, layer_type, RopeFreqs(inv_freq, factor))(x, positions)
        return [made] if isinstance(made, Tensor) else list(made)

    with torch.no_grad():
        far, fast = tables(inv_freq, 2 * positions), tables(2 * inv_freq, positions)
        loud, near = tables(inv_freq, 2 * positions, 3.0), tables(inv_freq, positions)
    for a, b, c, d in zip(far, fast, loud, near, strict=True):
        as_expected = torch.allclose(a, b, atol=1e-4) and torch.allclose(c, 3 * a, atol=1e-4)
        if not as_expected or torch.allclose(a, d, atol=1e-4):
            raise ValueError("its angles are not its frequencies times the positions")
    return len(far) == 1


def _find_fused(
    owner: nn.Module, rotary: nn.Module, layer_types: Sequence[str | None]
) -> Fused | None:
    """Return the op's options to rotate like the owner's layers; None if it cannot.

    rotary: like the model's own, on the CPU.
    """
    modules, layers = set(), set(rotating_layers(owner))
    for layer in owner.modules():
        forward = forward_of(layer)
        names = forward.__code__.co_names if forward else ()
        functions = {each for each in names if each.startswith("apply") and "rotary" in each}
        if layer in layers:
            if functions != {APPLY}:
                return None
            modules.add(forward.__globals__["__name__"])
        elif functions:  # an indexer, which may rotate differently
            return None
    if len(modules) != 1:
        return None
    (modeling,) = modules
    try:
        pairings = {_pairing(rotary, layer_type, modeling) for layer_type in layer_types}
    except Exception:  # a foreign signature may raise anything
        return None
    if len(pairings) != 1 or None in pairings:
        return None
    return Fused(modeling, pairings.pop())


def _pairing(rotary: nn.Module, layer_type: str | None, modeling: str) -> bool | None:
    """Return True if dims are paired (2i, 2i+1), by comparing the model's functions with ours.

    This catches differences that names do not show: orders of the dims, signs, axes of position.
    """
    positions = torch.tensor(_POSITIONS, device="cpu")
    kwargs = {} if layer_type is None else {"layer_type": layer_type}
    inv_freq = attribute_of(rotary, layer_type, "inv_freq").float()
    freqs = RopeFreqs(inv_freq, float(attribute_of(rotary, layer_type, "attention_scaling", 1.0)))
    q = probe_numbers(-1, 1, 4 * 2 * inv_freq.numel()).view(1, 1, 4, -1)
    cos, sin = type(rotary).forward(rotary, q, positions, **kwargs)
    apply = getattr(importlib.import_module(modeling), APPLY)
    apply = getattr(apply, "original", apply)  # of a model that is extended already
    expected = apply(q, q.flip(-1), cos, sin)
    options = {"positions": positions, "backend": "reference"}
    for interleaved in (False, True):
        got = apply_rope_qk(
            *(x.transpose(1, 2) for x in (q, q.flip(-1))), freqs, interleaved=interleaved, **options
        )
        if all(
            isinstance(theirs, Tensor)
            and theirs.shape == q.shape
            and torch.allclose(theirs, ours.transpose(1, 2), atol=1e-3)
            for theirs, ours in zip(expected, got, strict=True)
        ):
            return interleaved
    return None


def rotating_layers(owner: nn.Module) -> Iterator[nn.Module]:
    """Yield the layers that rotate their queries and keys by given (cos, sin)."""
    for module in owner.modules():
        forward = forward_of(module)
        if forward and {"position_embeddings", "cos", "sin"} <= set(forward.__code__.co_varnames):
            yield module
