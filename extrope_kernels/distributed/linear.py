"""PermuteFormer's linear attention over a sequence that ranks share: they exchange states alone."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ..ops import permuteformer
from ..ops._shared.checks import refuse_flags
from ..ops.permuteformer import MAX_DIM, check, default_decay, seen, state_of
from .agreement import Settings, agreed, contents
from .collectives import gathered
from .layout import Devices, Mesh, devices_of


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
    """`extrope_kernels.permuteformer_attention` of a sequence whose tokens are spread over ranks.

    Each rank gathers the states that the others' tokens leave, (heads, head_dim, head_dim_v) each,
    whatever the length: no keys are sent. Arithmetic is in float32, and a rank's keys, queries and
    values are copied to it.

    q, k, v: (batch, seqlen / P, heads, head_dim), one run of tokens a rank, as `shard` gives with
        balance=None; v of less than 256 dimensions.
    mesh: DeviceMesh or ProcessGroup, the P ranks that share the sequence.
    positions: of the sequence's first token.
    permutations, decay, causal, normalize, backend: as on one device.

    Returns: (batch, seqlen / P, heads_q, head_dim_v) in q's dtype. Differentiable in q, k and v.
    Raises: as on one device; see `rerope_attention` here for what is wrong on one rank alone.
    """
    op = "permuteformer_attention"
    devices = devices_of(op, mesh)

    def own_part() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        refuse_flags(op, causal=causal, normalize=normalize)
        check(op, q, k, v, decay, None, causal)
        if isinstance(positions, bool) or not isinstance(positions, (int, torch.SymInt)):
            raise TypeError(f"{op}: positions must be an int, got {type(positions).__name__}")
        wide = torch.promote_types(q.dtype, torch.float32)
        rows, keys, values = (x.to(wide) for x in (q, k, v))
        if normalize:  # a dim of ones becomes the denominator
            _check_room(op, v, backend)
            values = functional.pad(values, (0, 1), value=1.0)
        decays = default_decay(k) if decay is None and causal else decay
        at = {"positions": devices.rank * q.shape[1] + positions, "backend": backend}
        out = permuteformer.permuteformer_attention(
            rows, keys, values,
            permutations=permutations, decay=decays, causal=causal, normalize=False, **at,
        )  # fmt: skip
        rows, keys = permuteformer.permute_qk(rows, keys, permutations, positions=at["positions"])
        return out, rows, keys, values, decays

    def settings(parts: tuple[Tensor, ...]) -> Settings:
        asks = [x.requires_grad for x in (q, k, v)] * torch.is_grad_enabled()
        rows = (("q", q), ("k", k), ("v", v))
        return {
            **{f"the shape and dtype of {n}": (tuple(x.shape), x.dtype) for n, x in rows},
            "what requires grad": asks,
            "the contents of permutations and decay": contents(permutations, decay),
            "causal": causal,
            "normalize": normalize,
            "positions": positions,
            "backend": backend,
        }

    out, rows, keys, values, decays = agreed(op, mesh, own_part, settings)
    others = _of_others(state_of(keys, values, decays), q.shape[1], decays, devices, causal)
    out = out + seen(rows, others, decays)
    if normalize:
        out = out[..., :-1] / out[..., -1:]
    return out.to(q.dtype)


def _of_others(
    state: Tensor, tokens: int, decay: Tensor | None, devices: Devices, causal: bool
) -> Tensor:
    """The state that the tokens of ranks before this one leave, or, not causal, of all others."""
    states = state[None].contiguous()
    for group in (devices.inner, devices.outer):
        states = gathered(states, group)
    # The others are left out, not multiplied by 0: what they hold may not be finite.
    earlier, later = states[: devices.rank], states[devices.rank + 1 :]
    if decay is None:
        return earlier.sum(0) if causal else earlier.sum(0) + later.sum(0)
    between = torch.arange(devices.rank - 1, -1, -1, device=state.device) * tokens
    weights = decay.to(state.dtype) ** between[:, None]
    return (earlier * weights[:, None, :, None, None]).sum(0)


def _check_room(op: str, v: Tensor, backend: str | None) -> None:
    """For the denominator's dim."""
    if v.shape[-1] >= MAX_DIM and backend != "reference":
        raise ValueError(
            f"{op}: v's head_dim must be less than {MAX_DIM} with normalize=True "
            f"(backend='reference' takes any), got {v.shape[-1]}"
        )
