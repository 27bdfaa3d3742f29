"""What tokens leave behind them and what later ones read of it, in PyTorch's own operations.

So states have gradients, of any order, which the kernels of a step have not.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from .._shared.dtypes import accumulator, without_autocast
from .scan import feature


@without_autocast
def state_of(k: Tensor, v: Tensor, decay: Tensor | None) -> Tensor:
    """(batch, heads, head_dim, head_dim_v): what these tokens leave behind their last one.

    k: (batch, seqlen, heads_k, head_dim), permuted; decay: (heads,).
    """
    heads = k.shape[2] if decay is None else decay.shape[0]
    k, v = (x.repeat_interleave(heads // x.shape[2], 2) for x in (feature(k), v))
    if decay is not None:
        age = torch.arange(k.shape[1] - 1, -1, -1, device=k.device)
        k = k * (decay.to(k.dtype) ** age[:, None])[..., None]
    return torch.einsum("bjhd,bjhe->bhde", k, v)


@without_autocast
def seen(q: Tensor, state: Tensor, decay: Tensor | None) -> Tensor:
    """(batch, seqlen, heads, head_dim_v): what queries read of a state before the first of them."""
    heads = max(q.shape[2], state.shape[1])
    q = feature(q).repeat_interleave(heads // q.shape[2], 2)
    if decay is not None:
        after = torch.arange(1, q.shape[1] + 1, device=q.device)
        decays = decay.to(q.dtype).repeat_interleave(heads // decay.shape[0])
        q = q * (decays ** after[:, None])[..., None]
    return torch.einsum("bihd,bhde->bihe", q, state.repeat_interleave(heads // state.shape[1], 1))


def step_with_gradients(
    attention: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv: Tensor | None,
    key_sum: Tensor | None,
    decay: Tensor,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """out, kv and key_sum after these tokens; q and k are permuted, v of less than 256 dims.

    attention: of q, k, v and decay, of these tokens alone and without a denominator.
    """
    wide = accumulator(q.dtype)
    rows, keys, values = (x.to(wide) for x in (q, k, v))
    values = functional.pad(values, (0, 1), value=1.0)  # its sums are those of the keys
    out, state = attention(rows, keys, values, decay), state_of(keys, values, decay)
    if kv is not None:
        first = torch.cat([kv, key_sum.unsqueeze(-1)], -1)
        out = out + seen(rows, first, decay)
        state = state + (decay.to(wide) ** q.shape[1])[:, None, None] * first
    out, total = out[..., :-1], out[..., -1:]
    out = (out / total if normalize else out).to(q.dtype)
    return out, state[..., :-1].contiguous(), state[..., -1].contiguous()
