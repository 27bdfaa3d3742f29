"""Temperatures of queries: factors of the logits that grow with the query's position.

Later queries share their softmax among more keys; a growing factor keeps attention from spreading.
Each function takes positions of any shape and returns float32 factors of that shape, for
`query_scale` of the attention functions. All factors are 1 at the first positions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._checks import check_length, check_real


def log_n(positions: Tensor, length: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Su's log n: max(1, ln(p + 1) / ln(length)) for the query at position p.

    positions: absolute positions of queries, integers or floats.
    length: the trained length in tokens, > 1.
    dtype: of the result.

    Returns: factors like positions, computed in float64 and rounded once.
    Raises ValueError for a value outside these, TypeError for an argument of the wrong kind.
    Source: https://kexue.fm/archives/8823
    """
    length = check_real("log_n", "length", length, above=1)
    positions = _checked("log_n", positions, torch.float64).double()
    return (torch.log(positions.clamp(min=0) + 1.0) / math.log(length)).clamp(min=1.0).to(dtype)


def llama4(positions: Tensor, floor_scale: float = 8192, attn_scale: float = 0.1) -> Tensor:
    """Llama 4: 1 + attn_scale * ln(1 + floor((p + 1) / floor_scale)), in layers without rotation.

    positions: absolute positions of queries, integers or floats.
    floor_scale, attn_scale: from the model's configuration; floor_scale in tokens, > 0.

    Returns: float32, like positions.
    Raises ValueError for a value outside these, TypeError for an argument of the wrong kind.
    Paper: https://arxiv.org/abs/2501.19399
    """
    floor_scale = check_real("llama4", "floor_scale", floor_scale, above=0)
    attn_scale = check_real("llama4", "attn_scale", attn_scale, at_least=0)
    steps = torch.floor((_checked("llama4", positions).float() + 1.0) / floor_scale).clamp(min=0)
    return torch.log1p(steps) * attn_scale + 1.0


def ministral3(
    positions: Tensor, original_max_position_embeddings: int, beta: float = 0.1
) -> Tensor:
    """Ministral 3: 1 + beta * ln(1 + floor(p / original_max_position_embeddings)).

    Steps begin at other positions than Llama 4's, and all layers use it (Mistral 4's too).

    positions: absolute positions of queries, integers or floats.
    original_max_position_embeddings: the trained length in tokens.
    beta: llama_4_scaling_beta in the model's rope parameters, >= 0.

    Returns: float32, like positions.
    Raises ValueError for a value outside these, TypeError for an argument of the wrong kind.
    Paper: https://arxiv.org/abs/2501.19399
    """
    name = "original_max_position_embeddings"
    length = check_length("ministral3", name, original_max_position_embeddings)
    beta = check_real("ministral3", "beta", beta, at_least=0)
    steps = torch.floor(_checked("ministral3", positions) / length).clamp(min=0)
    return (1 + beta * torch.log(1 + steps)).float()


def qwen_1m(positions: Tensor, original_max_position_embeddings: int) -> Tensor:
    """Qwen's models of 1M tokens: max(1, 0.1 * ln((p + 1) / trained length) + 1) ** 2.

    The authors' code splits the factor in two roots. One multiplies keys, with the length of the
    sequence when they were added; the other multiplies the softmax's scale, with the present
    length. All tokens of a prompt get the prompt's length in both. Here both use the length at the
    query, its position + 1. So a token does not depend on later ones: cached prefixes hold and a
    prompt may be cut anywhere. The last token of a prompt gets the authors' factor.

    positions: absolute positions of queries, integers or floats.
    original_max_position_embeddings: the trained length in tokens.

    Returns: float32, like positions, computed in float64 and rounded once.
    Raises ValueError for a value outside these, TypeError for an argument of the wrong kind.
    Paper: https://arxiv.org/abs/2501.15383 ; code: dual_chunk_flash_attn.py of vLLM 0.9
    """
    name = "original_max_position_embeddings"
    length = check_length("qwen_1m", name, original_max_position_embeddings)
    ratio = (_checked("qwen_1m", positions, torch.float64).double() + 1.0) / length
    return (0.1 * torch.log(ratio.clamp(min=1.0)) + 1.0).square().float()


def _checked(function: str, positions: Tensor, whole: torch.dtype = torch.float32) -> Tensor:
    """Return positions as floating-point numbers, whole ones in the dtype `whole`."""
    if not isinstance(positions, Tensor):
        kind = type(positions).__name__
        raise TypeError(f"{function}: positions must be a Tensor, got {kind}")
    if positions.is_complex() or positions.dtype == torch.bool:
        raise TypeError(f"{function}: positions must hold numbers, got a {positions.dtype} tensor")
    # Integer division would give torch's default dtype, possibly a 16-bit one.
    return positions if positions.is_floating_point() else positions.to(whole)
