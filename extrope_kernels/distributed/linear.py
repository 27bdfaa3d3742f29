"""PermuteFormer's linear attention over a sequence that ranks share: they exchange only states."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ..ops import permuteformer
from ..ops._shared.checks import refuse_flags
from ..ops.permuteformer import MAX_DIM, check, default_decay, seen, state_of
from .collectives import Group, gathered
from .layout import Mesh, group_of

_OP = "permuteformer_attention"


def permuteformer_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mesh: Mesh,
    permutations: Tensor,
    decay: Tensor | None = None,
    causal: bool = True,
    normalize: bool = True,
    positions: int = 0,
    backend: str | None = None,
) -> Tensor:
    """Attend over a sequence spread over ranks, as `extrope_kernels.permuteformer_attention` does.

    Each rank gathers the states that the others' tokens leave, (heads, head_dim, head_dim_v) each
    at any length: no keys are sent. Arithmetic is in float32; a rank's queries, keys and values are
    copied to float32.

    q, k, v: (batch, seqlen / P, heads, head_dim), one run of tokens a rank, as `shard` gives with
        balance=None; v of less than 256 dimensions.
    mesh: DeviceMesh of one dimension or ProcessGroup, the P ranks that share the sequence.
    positions: of the sequence's first token.
    permutations, decay, causal, normalize, backend: as on one device.

    Returns: (batch, seqlen / P, heads_q, head_dim_v) in q's dtype. Differentiable in q, k and v.
    Raises: as on one device; see `rope_attention` here for a rank that raises alone.
    """
    group = group_of(_OP, mesh)
    refuse_flags(_OP, causal=causal, normalize=normalize)
    check(_OP, q, k, v, decay, None, causal)
    if isinstance(positions, bool) or not isinstance(positions, (int, torch.SymInt)):
        raise TypeError(f"{_OP}: positions must be an int, got {type(positions).__name__}")
    farthest = positions + (group.size - 1) * q.shape[1]  # the last rank's, which others wait for
    if not -(2**63) <= positions <= farthest < 2**63:
        raise ValueError(f"{_OP}: positions of all ranks must fit in int64, got {positions}")
    wide = torch.promote_types(q.dtype, torch.float32)
    rows, keys, values = (x.to(wide) for x in (q, k, v))
    if normalize:  # a dim of ones becomes the denominator
        _check_room(v, backend)
        values = functional.pad(values, (0, 1), value=1.0)
    decays = default_decay(k) if decay is None and causal else decay
    at = {"positions": group.rank * q.shape[1] + positions, "backend": backend}
    out = permuteformer.permuteformer_attention(
        rows, keys, values,
        permutations=permutations, decay=decays, causal=causal, normalize=False, **at,
    )  # fmt: skip
    rows, keys = permuteformer.permute_qk(rows, keys, permutations, positions=at["positions"])
    others = _of_others(state_of(keys, values, decays), q.shape[1], decays, group, causal)
    out = out + seen(rows, others, decays)
    if normalize:
        out = out[..., :-1] / out[..., -1:]
    return out.to(q.dtype)


def _of_others(
    state: Tensor, tokens: int, decay: Tensor | None, group: Group, causal: bool
) -> Tensor:
    """Sum the states of the ranks before this one or, if not causal, of all others."""
    states = gathered(state[None].contiguous(), group)
    # The others are left out, not multiplied by 0: they may hold NaN or infinity.
    earlier, later = states[: group.rank], states[group.rank + 1 :]
    if decay is None:
        return earlier.sum(0) if causal else earlier.sum(0) + later.sum(0)
    between = torch.arange(group.rank - 1, -1, -1, device=state.device) * tokens
    weights = decay.to(state.dtype) ** between[:, None]
    return (earlier * weights[:, None, :, None, None]).sum(0)


def _check_room(v: Tensor, backend: str | None) -> None:
    """Refuse values without room for the denominator's dim."""
    if v.shape[-1] >= MAX_DIM and backend != "reference":
        raise ValueError(
            f"{_OP}: v's head_dim must be less than {MAX_DIM} with normalize=True "
            f"(backend='reference' takes any), got {v.shape[-1]}"
        )
