"""vLLM's rotary layers with the frequencies of an engine's method, or with no rotation at all.

vLLM makes a layer of another class where one is registered under the name of the class that a
model asks for. Ours become those again, before they are initialized, in engines that ask for
nothing.
"""

from __future__ import annotations

import inspect
from typing import Any

import vllm.model_executor.layers.rotary_embedding as rotary_layers
from torch import Tensor
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.custom_op import CustomOp, op_registry_oot

from ... import RopeFreqs, apply_rope, apply_rope_qk
from .engine import engine_of
from .settings import NAME

_TABLE = "cos_sin_cache"
# What rotates (tokens, heads * head_dim) by one position a token.
_REPLACED = (
    "RotaryEmbedding",
    "DynamicNTKAlphaRotaryEmbedding",
    "DynamicNTKScalingRotaryEmbedding",
    "Gemma4RotaryEmbedding",
    "LinearScalingRotaryEmbedding",
    "Llama3RotaryEmbedding",
    "YaRNScalingRotaryEmbedding",
)
# All of vLLM's by their names; not those of images.
_LAYERS = {
    name: layer
    for name, layer in vars(rotary_layers).items()
    if isinstance(layer, type)
    and issubclass(layer, CustomOp)
    and not name.startswith("Llama4Vision")
}


class _Replacing:
    """A rotary layer in place of vLLM's class `replaced`, which is its next base."""

    replaced: type

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        engine, replaced = engine_of(get_current_vllm_config_or_none()), self.replaced
        if engine is None:
            self.__class__ = replaced
        replaced.__init__(self, *args, **kwargs)
        if engine is None:
            return
        said = inspect.signature(replaced.__init__).bind(self, *args, **kwargs).arguments
        full = "Gemma4" in replaced.__name__  # rotates dims of frequency 0 as well
        rotated = engine.of_rotary(said["base"], said["head_size" if full else "rotary_dim"])
        # Whoever reads the table in place of calling the layer fails, and is not served wrongly.
        table = getattr(self, _TABLE)
        delattr(self, _TABLE)
        engine.heads.add((said["head_size"], not said["is_neox_style"]))
        # A score method rotates queries and keys itself, when it knows where they are kept.
        rotates = engine.settings.score is None
        self.freqs: RopeFreqs | None = rotated.freqs.to(table.device) if rotates else None

    def forward_native(
        self, positions: Tensor, query: Tensor, key: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Rotate (tokens, heads * head_dim) in place; positions: (tokens,)."""
        if self.freqs is None:
            return query, key
        options: dict[str, Any] = {
            "positions": positions,
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
        """(1, tokens, heads, head_dim), a view."""
        return (x if x.dim() == 3 else x.unflatten(-1, (-1, self.head_size)))[None]


class _Refusing:
    """In place of vLLM's other classes: rotations that are not one position times frequencies."""

    replaced: type

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        engine, replaced = engine_of(get_current_vllm_config_or_none()), self.replaced
        if engine is not None:
            raise ValueError(
                f"{NAME}: the model must rotate by a layer of vLLM's that a plugin can replace, "
                f"got {replaced.__name__}"
            )
        self.__class__ = replaced
        replaced.__init__(self, *args, **kwargs)


def register_rotary_layers() -> None:
    """Register a class of ours for each of vLLM's; where another plugin was first, its stays."""
    for name, layer in _LAYERS.items():
        if name in op_registry_oot:
            continue
        base = _Replacing if name in _REPLACED else _Refusing
        layer.register_oot(type(name, (base, layer), {"replaced": layer, "__module__": __name__}))


def others_layers(model: Any) -> list[str]:
    """Return the classes of a model's rotary layers that are not ours, but of other plugins."""
    rotary = [layer for layer in model.modules() if isinstance(layer, tuple(_LAYERS.values()))]
    others = {type(layer).__qualname__ for layer in rotary if not isinstance(layer, _Replacing)}
    return sorted(others)


def forget_shared_layers() -> None:
    """Have the next model make its rotary layers.

    vLLM shares those of equal arguments among all models of a process, whatever their engines ask
    for.
    """
    rotary_layers._ROPE_DICT.clear()
