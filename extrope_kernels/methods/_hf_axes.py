"""Layouts of positions with several axes, by a transformers model's model_type.

Configurations do not say them: they stand in the models' code.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ._hf_source import NAME, Source, refuse_unread
from .axial import axial
from .base import RopeFreqs
from .sections import with_sections

# The axes of these models take turns even without mrope_interleaved in their parameters.
_IN_TURN = (
    "cohere_compass",
    "cosmos3_edge",
    "hy_v4_vl",
    "qwen3_5",
    "qwen3_omni_moe",
    "qwen3_vl",
    "qwen4_exp",
)
# Patches of these models have two axes, although their rope type is the default.
_AXIAL_BY_DEFAULT = ("llama4_vision_model", "pixtral")
_SHARED_LADDER = ("pixtral",)
_THREE_AXES = ("minimax_m3_vl_vision",)
_COLUMN_FIRST = ("inkling2_vision", "kimi_k25_vision", "llama4_vision_model", "step3p5_vision")
_PAIR_BY_PAIR = ("kimi_k25_vision",)  # the axes take turns
# Rotations that RopeFreqs cannot express, and why.
_REFUSED = {
    "gemma4_vision": "it pairs dims within the half of a head that an axis has: rotate x[..., :d/2]"
    " and x[..., d/2:] each by rope(d/2) and the positions of its axis",
    "eomt_dinov3": "it rotates by coordinates between -1 and 1, not by positions",
    "efficientloftr": "its frequencies run through all heads together",
}


def refuse_other_rotations(source: Source) -> None:
    """Raise ValueError if the model's code rotates otherwise than its parameters say."""
    refuse_unread(source.config)
    images = source.of_config("patch_size") is not None
    if images and not source.parameters:
        raise ValueError(
            f"{NAME}: rope_parameters must be given for a model of images (it has a patch_size), "
            "got none; where its transformers class knows them, pass a configuration of that class"
        )
    if (reason := _REFUSED.get(source.model_type)) is not None:
        raise ValueError(f"{NAME}: {source.model_type} cannot be read: {reason}")


def axial_by_default(source: Source) -> bool:
    """Return True if the default rope type means the rotation of patches."""
    return source.model_type in _AXIAL_BY_DEFAULT


def axial_freqs(source: Source) -> RopeFreqs:
    """Return the frequencies for the patches of an image or a video."""
    axes = 3 if source.model_type in _THREE_AXES else 2
    if axes == 2 and source.head_dim % 4:
        raise ValueError(
            f"{NAME}: head_dim must be a multiple of 4 for two axes, got {source.head_dim}"
        )
    ladder = "shared" if source.model_type in _SHARED_LADDER else "own"
    freqs = axial(source.head_dim, axes=axes, base=source.base, ladder=ladder)
    inv_freq, of_pairs = freqs.inv_freq.view(axes, -1), _axes(freqs).view(axes, -1)
    if source.model_type in _COLUMN_FIRST:
        of_pairs = of_pairs.flip(0)
    if source.model_type in _PAIR_BY_PAIR:
        inv_freq, of_pairs = inv_freq.T, of_pairs.T
    return replace(freqs, inv_freq=inv_freq.flatten(), axes=of_pairs.flatten())


def with_axes(freqs: RopeFreqs, source: Source) -> RopeFreqs:
    """Give every frequency its axis where the parameters have sections (mRoPE)."""
    if source.model_type.startswith("neomme"):  # rows and columns, not named in its parameters
        pairs = len(freqs.inv_freq)
        return with_sections(freqs, [pairs - pairs // 2, pairs // 2], interleaved=True)
    sections = source.get("mrope_section")
    if sections is None or source.model_type.startswith("hunyuan_vl"):
        # HunYuan VL's sections cut through pairs: with positions by axis its dims do not rotate.
        return freqs
    if source.model_type.startswith("ernie4_5_vl"):
        return _ernie(freqs, sections)
    in_turn = source.get("mrope_interleaved", source.model_type.startswith(_IN_TURN))
    return with_sections(freqs, sections, interleaved=in_turn)


def _ernie(freqs: RopeFreqs, sections: list[int]) -> RopeFreqs:
    """Interleave rows and columns, and give time the slowest frequencies."""
    height, width, _ = sections
    if height != width:
        raise ValueError(f"{NAME}: the first two of mrope_section must be equal, got {sections}")
    axes = _axes(with_sections(freqs, sections))
    axes[: height + width] = torch.arange(height + width, device="cpu") % 2 + 1
    axes[height + width :] = 0
    return replace(freqs, axes=axes)


def _axes(freqs: RopeFreqs) -> Tensor:
    assert freqs.axes is not None
    return freqs.axes
