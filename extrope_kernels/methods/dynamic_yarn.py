"""Dynamic YaRN: YaRN by the current length."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._checks import check_base, check_bool, check_dim, check_length, check_real, check_seq_len
from .._names import explains_wrong_calls
from ._ramp import check_yarn_ramp, yarn_amplitude, yarn_inv_freq
from .base import RopeFreqs, copy_to, trained_inv_freq, with_trained


@explains_wrong_calls
def dynamic_yarn(
    dim: int,
    *,
    seq_len: int | Tensor,
    original_max_position_embeddings: int,
    max_position_embeddings: int | None = None,
    finetuned: bool = False,
    base: float = 10000.0,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
    attention_factor: float | None = None,
    mscale: float | None = None,
    mscale_all_dim: float | None = None,
    ramp: str = "index",
    over: RopeFreqs | None = None,
) -> RopeFreqs:
    """Dynamic YaRN: YaRN by the length of the sequence.

    seq_len > M: `yarn` with factor seq_len / L.  Otherwise plain RoPE with A = 1, or for a model
    fine-tuned with YaRN up to M, `yarn` with factor M / L

    A pure function of seq_len: no state is kept between calls. Keys that were rotated and cached at
    another length do not fit.

    dim: rotary dimension of one head, even.
    seq_len: tokens in the sequence, > 0; or an integer tensor of shape () or (batch,), whose values
        are not read on the host. inv_freq is then (dim/2,) or (batch, dim/2) on its device. One
        float cannot hold the A of every sequence, so a tensor needs attention_factor: give 1.0
        and put A squared, (0.1 * ln(factor) + 1) ** 2, into the scale of the softmax.
    original_max_position_embeddings: L, the trained length in tokens.
    max_position_embeddings: M, the length in tokens from which the factor grows; L if None.
    finetuned: True if the model was fine-tuned with YaRN up to M; M must then be given.
    base, beta_fast, beta_slow, truncate, mscale, mscale_all_dim, ramp, over: as in `yarn`.
    attention_factor: A, > 0, used unchanged at every length if given.

    Raises ValueError for a value outside these, TypeError for an argument of the wrong kind.
    Paper: https://arxiv.org/abs/2309.00071
    """
    name = "dynamic_yarn"
    dim = check_dim(name, dim)
    seq_len = check_seq_len(name, seq_len)
    trained = check_length(
        name, "original_max_position_embeddings", original_max_position_embeddings
    )
    start = _start(trained, max_position_embeddings, finetuned)
    ends: dict[str, Any] = {
        "beta_fast": beta_fast,
        "beta_slow": beta_slow,
        "truncate": truncate,
        "ramp": ramp,
    }
    check_yarn_ramp(name, **ends)
    settings = {"base": check_base(name, base), "length": trained, "over": over, **ends}
    if isinstance(seq_len, Tensor):
        amplitude = _fixed_amplitude(attention_factor)
        inv_freq = _per_sequence(dim, seq_len, start, finetuned, settings)
        return with_trained(over, inv_freq, amplitude)
    extended = finetuned or seq_len > start
    scale = max(seq_len, start) / trained if extended else 1.0
    amplitude = yarn_amplitude(name, scale, attention_factor, mscale, mscale_all_dim)
    if not extended:
        inv_freq = trained_inv_freq(name, dim, settings["base"], over)
        return with_trained(over, inv_freq, amplitude)
    return with_trained(over, yarn_inv_freq(name, dim, scale, **settings), amplitude)


def _start(trained: int, max_position_embeddings: int | None, finetuned: bool) -> int:
    check_bool("dynamic_yarn", "finetuned", finetuned)
    if max_position_embeddings is not None:
        return check_length("dynamic_yarn", "max_position_embeddings", max_position_embeddings)
    if finetuned:
        raise ValueError(
            "dynamic_yarn: max_position_embeddings must be given when finetuned, got None"
        )
    return trained


def _fixed_amplitude(attention_factor: float | None) -> float:
    if attention_factor is None:
        raise ValueError(
            "dynamic_yarn: attention_factor must be given when seq_len is a tensor, since its "
            "default depends on each sequence's length, got None"
        )
    return check_real("dynamic_yarn", "attention_factor", attention_factor, above=0)


def _per_sequence(
    dim: int, seq_len: Tensor, start: int, finetuned: bool, settings: dict[str, Any]
) -> Tensor:
    length = seq_len.unsqueeze(-1)
    scale = length.clamp(min=start).to(torch.float64) / settings["length"]
    inv_freq = yarn_inv_freq("dynamic_yarn", dim, scale, **settings)
    if finetuned:
        return inv_freq
    trained = trained_inv_freq("dynamic_yarn", dim, settings["base"], settings["over"])
    plain = copy_to(trained, seq_len.device)
    return torch.where(length > start, inv_freq, plain)
