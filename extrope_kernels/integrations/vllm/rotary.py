"""vLLM's rotary layers with an engine's frequencies, or without rotation.

vLLM replaces a layer's class if another one is registered under its name. In engines without a
method ours turn back into vLLM's before they are initialized. So they do in models with encoders:
there the language model gets ours after loading. So does a model that rotates by LongRoPE, whose
layer vLLM lets nobody register.
"""

from __future__ import annotations

from typing import Any

import vllm.model_executor.layers.rotary_embedding as rotary_layers
from torch import Tensor
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.custom_op import CustomOp, op_registry_oot

from ... import RopeFreqs, apply_rope, apply_rope_qk
from ...methods import with_sections
from .engine import Engine, engine_of
from .settings import NAME

_TABLES = ("cos_sin_cache", "long_short_cos_sin_cache")
# An attribute of Qwen3-Next's attention and its heirs: on a GPU one step with the table does norms
# and rotation, which are separate steps elsewhere.
_STEP_BY_TABLE = "use_fused_qk_norm_rope_gate"
# Classes that rotate (tokens, heads * head_dim) by positions (on one or more axes) x frequencies.
_REPLACED = (
    "RotaryEmbedding",
    "DeepseekScalingRotaryEmbedding",
    "DynamicNTKAlphaRotaryEmbedding",
    "DynamicNTKScalingRotaryEmbedding",
    "Gemma4RotaryEmbedding",
    "LinearScalingRotaryEmbedding",
    "Llama3RotaryEmbedding",
    "MRotaryEmbedding",
    "YaRNScalingRotaryEmbedding",
)
# All of vLLM's rotary classes by name, except those for images.
_LAYERS = {
    name: layer
    for name, layer in vars(rotary_layers).items()
    if isinstance(layer, type)
    and issubclass(layer, CustomOp)
    and not name.startswith("Llama4Vision")
}
_LONGROPE = rotary_layers.Phi3LongRoPEScaledRotaryEmbedding  # no CustomOp
_OURS: dict[type, type] = {}  # by the class that they replace


class _Replacing:
    """A rotary layer in place of vLLM's class `replaced`, its next base class."""

    replaced: type

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        engine, replaced = engine_of(get_current_vllm_config_or_none()), self.replaced
        stays = engine is None or engine.has_towers  # until the whole model is loaded
        if stays:
            self.__class__ = replaced
        replaced.__init__(self, *args, **kwargs)
        if not stays:
            self.rotate_for(engine)

    def rotate_for(self, engine: Engine) -> None:
        """Rotate by the engine's frequencies from now on.

        Raises ValueError for a layer that the model's configuration does not describe.
        """
        freqs = engine.of_rotary(self.base, self.rotary_dim).freqs
        if sections := getattr(self, "mrope_section", None):
            freqs = with_sections(freqs, list(sections), interleaved=self.mrope_interleaved)
        # Code that reads the table in place of calling the layer now fails, rather than go wrong.
        (table,) = (name for name in _TABLES if hasattr(self, name))
        device = getattr(self, table).device
        delattr(self, table)
        engine.heads.add((self.head_size, not self.is_neox_style))
        # Our attention rotates queries and keys itself, once it knows their slots.
        rotates = not engine.settings.attends
        self.freqs: RopeFreqs | None = freqs.to(device) if rotates else None
        if self.freqs is not None:
            # vLLM's sleep at level 2 keeps only a model's buffers.
            for name in ("inv_freq", "log_decay", "axes"):
                self.register_buffer(name, getattr(self.freqs, name), persistent=False)

    def forward_native(
        self, positions: Tensor, query: Tensor, key: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Rotate (tokens, heads * head_dim) in place; positions: (tokens,) or (axes, tokens)."""
        if self.freqs is None:
            return query, key
        options: dict[str, Any] = {
            "positions": positions if positions.dim() == 1 else positions[:, None],
            "interleaved": not self.is_neox_style,
            "inplace": True,
        }
        q = self._heads(query)
        if key is None:
            apply_rope(q, self.freqs, **options)
        else:
            apply_rope_qk(q, self._heads(key), self.freqs, **options)
        return query, key

    forward_cpu = forward_cuda = forward_hip = forward_xpu = forward_oot = forward_native

    def _heads(self, x: Tensor) -> Tensor:
        """Return a view (1, tokens, heads, head_dim)."""
        return (x if x.dim() == 3 else x.unflatten(-1, (-1, self.head_size)))[None]


class _ReplacingLongRope(_Replacing):
    """The same in place of a module without vLLM's choice of a forward."""

    is_neox_style = True
    forward = _Replacing.forward_native


class _Refusing:
    """A refusal in place of vLLM's other classes, whose angles are not position x frequency."""

    replaced: type

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        engine, replaced = engine_of(get_current_vllm_config_or_none()), self.replaced
        if engine is not None and not engine.has_towers:
            raise ValueError(
                f"{NAME}: the model must rotate by a layer of vLLM's that a plugin can replace, "
                f"got {replaced.__name__}"
            )
        self.__class__ = replaced
        replaced.__init__(self, *args, **kwargs)


def register_rotary_layers() -> None:
    """Register our class for each of vLLM's; a class of an earlier plugin stays."""
    for name, layer in _LAYERS.items():
        if name in op_registry_oot:
            continue
        base = _Replacing if name in _REPLACED else _Refusing
        ours = type(name, (base, layer), {"replaced": layer, "__module__": __name__})
        layer.register_oot(ours)
        if base is _Replacing:
            _OURS[layer] = ours
    ours = type(_LONGROPE.__name__, (_ReplacingLongRope, _LONGROPE), {"__module__": __name__})
    _OURS.setdefault(_LONGROPE, ours)


def extend_model(model: Any, engine: Engine) -> None:
    """Make a model, or the language model beside encoders, rotate by the engine's methods.

    Raises ValueError if some rotary layers cannot, or if there are none.
    """
    text = model.get_language_model() if engine.has_towers else model
    layers = _rotary_layers(text)
    if engine.has_towers:
        _refuse_shared(model, text, layers)
    for layer in layers:
        ours = _OURS.get(type(layer))
        if ours is not None and (engine.has_towers or isinstance(layer, _LONGROPE)):
            layer.__class__ = ours
            layer._forward_method = layer.forward_native
            layer.rotate_for(engine)
    others = {type(layer).__qualname__ for layer in layers if not isinstance(layer, _Replacing)}
    if others or not layers:
        raise ValueError(
            f"{NAME}: the model must rotate by vLLM's rotary layer, got "
            f"{', '.join(sorted(others)) or 'none'}"
        )
    for module in text.modules():
        if hasattr(module, _STEP_BY_TABLE):
            setattr(module, _STEP_BY_TABLE, False)


def _rotary_layers(model: Any) -> list[Any]:
    kinds = (*_LAYERS.values(), _LONGROPE)
    return [layer for layer in model.modules() if isinstance(layer, kinds)]


def _refuse_shared(model: Any, text: Any, layers: list[Any]) -> None:
    """Refuse rotary layers shared with encoders: vLLM makes one layer for equal arguments."""
    of_text = set(text.modules())
    for module in model.modules():
        if module not in of_text and any(child in layers for child in module.children()):
            raise ValueError(
                f"{NAME}: the language model must rotate by layers of its own, got one that "
                f"{type(module).__qualname__} rotates by as well"
            )


def forget_shared_layers() -> None:
    """Make the next model build its own rotary layers.

    vLLM shares layers with equal arguments among all models of a process, even if their engines
    have different methods.
    """
    rotary_layers._ROPE_DICT.clear()
