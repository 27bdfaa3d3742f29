"""A rotary call: its checks, and its one form, a `Rotation`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from ...methods import RopeFreqs
from ...scores.base import FARTHEST_POSITION
from .._math import positions as _positions
from .._math.pairs import PairDims
from .._math.positions import position_kind as position_kind_of_one_axis
from .._tables import specs
from .._tables.checks import (
    REFUSALS,
    check_boundaries,
    check_real,
    check_rotary_offset,
    has_values,
    overlaps_itself,
    share_memory,
)
from .._tables.decay import reach
from .._tables.fields import fields_of
from .._tables.specs import ANY, DENSE, FLOAT32, FLOATS, INT32, ROWS, Spec

# What a rotation is told besides tensors, as arguments of an op's schema. Integers have no default,
# which AOTInductor of PyTorch 2.13 could not leave out: None means 0.
OPTIONS = {
    "attention_factor": "float attention_factor=1.0",
    "offset": "SymInt? offset=None",
    "interleaved": "bool interleaved=False",
    "rotary_offset": "int? rotary_offset=None",
    "inverse": "bool inverse=False",
    "decay_origin": "float decay_origin=0.0",
}


class RopeTensors(NamedTuple):
    """The tensors that decide how far tokens rotate, as ops take them.

    Schemas and checks follow from it. Shapes are those of a batch, and of packed sequences by
    `specs.for_rows`.
    """

    inv_freq: Annotated[  # None: of an append that rotates nothing
        Tensor | None,
        Spec("inv_freq", "pairs or 1|batch pairs or 1|batch 1|heads_q pairs", FLOATS),
    ]
    positions: Annotated[  # with axes also (axes, 1 or batch, seqlen)
        Tensor | None,
        Spec(
            "positions",
            "seqlen or 1|batch seqlen or batch or batch 1",
            (torch.int32, torch.int64, *FLOATS),
            strides=ANY,
        ),
    ] = None
    cu_seqlens: Annotated[
        Tensor | None, Spec("cu_seqlens", "sequences+1", INT32, strides=DENSE)
    ] = None
    log_decay: Annotated[Tensor | None, Spec("log_decay", "pairs", FLOAT32, strides=DENSE)] = None
    axes: Annotated[Tensor | None, Spec("axes", "pairs", INT32, strides=DENSE)] = None


TENSORS = fields_of(RopeTensors)


@dataclass(frozen=True)
class Rotation:
    """Frequencies, positions and options of a rotation, as in csrc/common/rope_params.h."""

    inv_freq: Tensor  # (sequences or 1, heads or 1, rotary_dim / 2)
    # (batch or 1, seqlen), with positions_are_offsets (sequences,), with axes (axes, batch or 1,
    # seqlen)
    positions: Tensor | None
    positions_are_offsets: bool
    offset: int
    cu_seqlens: Tensor | None
    log_decay: Tensor | None
    decay_signs: tuple[float, float]  # of q and k
    amplitude: float
    conjugate: bool
    interleaved: bool
    axes: Tensor | None = None  # (rotary_dim / 2,) int32: the row of positions of each pair
    decay_origin: float = 0.0  # the position at which log_decay changes nothing
    rotary_offset: int = 0  # the first rotated dim

    @property
    def rotary_dim(self) -> int:
        return 2 * self.inv_freq.shape[-1]

    @property
    def pair_dims(self) -> PairDims:
        return PairDims(self.rotary_dim, self.interleaved, self.rotary_offset)

    @property
    def per_head(self) -> bool:
        return self.inv_freq.shape[1] > 1


def resolve(
    q: Tensor,
    k: Tensor | None,
    *rope_args: Tensor | None,
    adjoint: bool,
    offset: int | None = None,
    **options,
) -> tuple[list[Tensor], Rotation]:
    """Check an op's arguments; return q and k as (batch, seqlen, heads, head_dim) and the Rotation.

    rope_args: RopeTensors; options: of `rotation_of`.
    """
    rope = RopeTensors(*rope_args)
    check(q, k, rope, **options)
    check_values(rope, offset, q.shape[0])
    tensors = [q] if k is None else [q, k]
    if rope.cu_seqlens is not None:
        tensors = [x.unsqueeze(0) for x in tensors]
    return tensors, rotation_of(
        rope, tensors[0].shape, adjoint=adjoint, offset=offset or 0, **options
    )


def rotation_of(
    rope: RopeTensors,
    shape: torch.Size,
    *,
    adjoint: bool = False,
    attention_factor: float = 1.0,
    offset: int = 0,
    interleaved: bool = False,
    rotary_offset: int | None = None,
    inverse: bool = False,
    decay_origin: float = 0.0,
) -> Rotation:
    """Return the Rotation of checked arguments; shape: (batch, seqlen, ...) of q or k.

    `adjoint` asks for the transposed linear map, which a backward applies: the angle is negated,
    the amplitude stays. `inverse` undoes the map: minus the angle, one over the amplitude.
    """
    inv_freq, positions, cu_seqlens, log_decay, axes = rope
    if inv_freq.dim() < 3:
        inv_freq = inv_freq[None, None] if inv_freq.dim() == 1 else inv_freq.unsqueeze(1)
    kind = None
    if positions is not None:
        sequences = shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        kind = position_kind(positions, shape, sequences)
        if kind == "offsets":
            positions = positions.reshape(-1)
        elif positions.dim() == 1:
            positions = positions.unsqueeze(0)
    sign = -1.0 if inverse else 1.0
    return Rotation(
        inv_freq=inv_freq,
        positions=positions,
        positions_are_offsets=kind == "offsets",
        offset=offset,
        cu_seqlens=cu_seqlens,
        log_decay=log_decay,
        decay_signs=(sign, -sign),
        amplitude=1.0 / attention_factor if inverse else attention_factor,
        conjugate=adjoint != inverse,
        interleaved=interleaved,
        axes=axes if kind == "positions by axis" else None,  # else all axes are alike
        decay_origin=decay_origin,
        rotary_offset=rotary_offset or 0,
    )


def pair_dims_of(
    inv_freq: Tensor, interleaved: bool = False, rotary_offset: int | None = None, **others: Any
) -> PairDims:
    """Return the pairs' dims of an op's arguments; others: its other options."""
    return PairDims(2 * inv_freq.shape[-1], interleaved, rotary_offset or 0)


def token_positions(rotation: Rotation, batch: int, seqlen: int) -> Tensor:
    """Return positions by token and pair: (batch or 1, seqlen, 1 or rotary_dim / 2) float64."""
    if rotation.axes is not None:
        # Clamped as in a GPU's kernels: reading if an axis is out of range would wait for it.
        axes = rotation.axes.clamp(0, rotation.positions.shape[0] - 1)
        positions = rotation.positions[axes].permute(1, 2, 0)
    else:
        given = (rotation.positions, rotation.positions_are_offsets, rotation.cu_seqlens)
        positions = _positions.token_positions(*given, seqlen, rotation.inv_freq.device)[..., None]
    return positions.double() + rotation.offset


# -------------------------------------------------------------------------------------------------
# What is refused, before anything runs

INPLACE = "rope: inplace=True is for inference, got tensors that require grad"


def not_differentiable(name: str) -> str:
    """Return the error for an argument that has no gradient."""
    return f"rope: {name} must not require grad, got one that does"


_CALL = sorted(TENSORS, key=lambda x: x.name != "cu_seqlens")  # all sizes are known after it
_TABLE = (
    Spec("q", "batch seqlen heads_q head_dim", ROWS),
    Spec("k", "batch seqlen heads_k head_dim", optional=True),
    *(x.spec._replace(optional=x.name != "inv_freq") for x in _CALL),
)
_TABLE_BY_AXES = tuple(
    x._replace(dims=f"{x.dims} or axes 1|batch seqlen") if x.name == "positions" else x
    for x in _TABLE
)


def check(
    q: Tensor,
    k: Tensor | None,
    rope: RopeTensors,
    *,
    attention_factor: float = 1.0,
    rotary_offset: int | None = None,
    decay_origin: float = 0.0,
    **others: Any,
) -> None:
    """Raise ValueError or TypeError that names the argument, for calls that kernels cannot run.

    others: options of which all values are right, or that `check_values` reads.
    """
    inv_freq, positions, cu_seqlens, log_decay, axes = rope
    table = specs.for_rows(_TABLE if axes is None else _TABLE_BY_AXES, cu_seqlens is not None)
    tensors = (q, k, cu_seqlens, inv_freq, positions, log_decay, axes)
    sizes = specs.check("rope", table, tensors)
    pairs, heads, most = sizes["pairs"], sizes["heads_q"], sizes["head_dim"] // 2
    if not 1 <= pairs <= most:
        raise ValueError(
            f"rope: inv_freq must hold between 1 and head_dim/2 = {most} frequencies, got {pairs}"
        )
    if sizes.get("axes") == 0:
        raise ValueError(
            f"rope: positions must have an axis at least, got {tuple(positions.shape)}"
        )
    if inv_freq.dim() == 3 and inv_freq.shape[1] == 0:
        raise ValueError(f"rope: inv_freq must be of a head at least, got {tuple(inv_freq.shape)}")
    if inv_freq.dim() == 3 and inv_freq.shape[1] > 1 and sizes.get("heads_k", heads) != heads:
        raise ValueError(
            f"rope: frequencies per head need as many k heads as q heads ({heads}), "
            f"got {sizes['heads_k']}; rotate q and k in two calls"
        )
    check_rotary_offset("rope", rotary_offset or 0, 2 * pairs, sizes["head_dim"])
    check_real("rope", "attention_factor", attention_factor)
    if not 0 < attention_factor < math.inf:
        raise ValueError(f"rope: attention_factor must be > 0 and finite, got {attention_factor}")
    if not abs(decay_origin) < math.inf:
        raise ValueError(f"rope: decay_origin must be finite, got {decay_origin}")


def check_values(rope: RopeTensors, offset: int | None, tokens: int) -> None:
    """Check values, after `check`: those of tensors only if reading them waits for no device."""
    _, positions, cu_seqlens, _, axes = rope
    check_boundaries("rope", cu_seqlens, tokens)
    if type(offset) is int and abs(offset) > FARTHEST_POSITION:
        raise ValueError(f"rope: an offset of positions must be within 2**53, got {offset}")
    check_positions("rope", positions)
    if axes is None or positions is None or positions.dim() != 3 or not has_values(axes):
        return
    count = positions.shape[0]
    for axis in axes.tolist():
        if not 0 <= axis < count:
            raise ValueError(
                f"rope: axes must be from 0 to {count - 1} for positions of {count} axes, "
                f"got {axis}"
            )


def check_positions(op: str, positions: Tensor | None) -> None:
    """Check the values of positions, on a CPU, where reading them costs nothing; NaN is NaN."""
    if positions is None or positions.dtype == torch.int32 or not has_values(positions):
        return
    far = (positions > FARTHEST_POSITION) | (positions < -FARTHEST_POSITION)
    if far.any():
        raise ValueError(f"{op}: positions must be within 2**53, got {positions[far].tolist()}")


def check_saved(
    grad_q: Tensor, grad_k: Tensor | None, q: Tensor | None, k: Tensor | None, *, packed: bool
) -> None:
    """Check a forward's inputs, if a backward is given any, after `check` of their gradients."""
    if (k is None) != (q is None or grad_k is None):
        raise ValueError("rope: k must be given with grad_k and q, or not at all")
    dims = "total heads head_dim" if packed else "batch seqlen heads head_dim"
    for name, x, grad in (("q", q, grad_q), ("k", k, grad_k)):
        if x is not None:
            sizes = {word: (n, "its gradient") for word, n in zip(dims.split(), grad.shape)}
            specs.check("rope", [Spec(name, dims)], [x], sizes, ("its gradient", grad))


def check_norm(
    q: Tensor,
    k: Tensor | None,
    q_norm_weight: Tensor | None,
    k_norm_weight: Tensor | None,
    norm_eps: float,
) -> None:
    """Check a norm before the rotation, after `check` of q and k."""
    if k is None and k_norm_weight is not None:
        raise ValueError("rope: k_norm_weight needs a k, got None")
    for name, x, weight in (("q", q, q_norm_weight), ("k", k, k_norm_weight)):
        if weight is not None:  # of each head, or of all together
            heads, head_dim = x.shape[-2:]
            all_dims = f"heads_{name}*head_dim"
            sizes = {"head_dim": (head_dim, name), all_dims: (heads * head_dim, name)}
            spec = Spec(f"{name}_norm_weight", f"head_dim or {all_dims}", ROWS, strides=DENSE)
            specs.check("rope", [spec], [weight], sizes, (name, x))
    check_norm_eps(norm_eps)


def check_norm_eps(norm_eps: float) -> None:
    """Check the epsilon of a norm."""
    check_real("rope", "norm_eps", norm_eps)
    if not norm_eps >= 0:
        raise ValueError(f"rope: norm_eps must be >= 0, got {norm_eps}")


def position_kind(positions: Tensor, shape: torch.Size, sequences: int) -> str | None:
    """Return the kind of positions of one axis, or 'positions by axis'."""
    kind = position_kind_of_one_axis(positions, shape, sequences)
    if kind is None and positions.dim() == 3 and positions.shape[0] >= 1:
        fits = tuple(positions.shape[1:]) in ((shape[0], shape[1]), (1, shape[1]))
        return "positions by axis" if fits else None
    return kind


def refuse_shared(q: Tensor, k: Tensor | None) -> None:
    """Raise ValueError for tensors that are to be overwritten and share memory with each other."""
    if k is not None and share_memory(q, k):
        raise ValueError("rope: inplace=True needs q and k of their own, got two that share memory")


def refuse_expanded(q: Tensor, k: Tensor | None) -> None:
    """Raise ValueError for a tensor whose elements share memory: it cannot be overwritten."""
    for name, x in (("q", q), ("k", k)):
        if x is not None and overlaps_itself(x):
            raise ValueError(
                f"rope: {name} must not be expanded to be rotated in place, "
                f"got strides {x.stride()}"
            )


# -------------------------------------------------------------------------------------------------
# XPOS


def check_decay(
    freqs: RopeFreqs,
    q: Tensor,
    positions: Tensor | None,
    offset: int,
    cu_seqlens: Tensor | None,
) -> None:
    """Raise ValueError if a position is so far from decay_origin that its amplitude overflows.

    Only positions known to the host are checked: those on the CPU, or none given.
    """
    if not freqs.steepest_decay or not isinstance(q, Tensor) or torch.compiler.is_compiling():
        return
    try:
        ends = _ends_of(q, positions, offset, cu_seqlens)
    except REFUSALS:  # the op names what is wrong
        return
    if ends is None:
        return
    most = reach(freqs, q.dtype)
    low, high = ends
    if max(high - freqs.decay_origin, freqs.decay_origin - low) <= most:
        return
    middle = (low + high) // 2
    cure = (
        f"decay_origin={middle:.0f} covers them"
        if high - middle <= most
        else "no origin covers them: use scores.blockwise_causal or a dtype with more range"
    )
    raise ValueError(
        f"rope: positions must be within {most} of decay_origin={freqs.decay_origin:.0f} for XPOS "
        f"in {q.dtype}, got {low:.0f} to {high:.0f}; {cure}"
    )


def _ends_of(q: Tensor, positions: Tensor | None, offset: int, cu_seqlens: Tensor | None):
    """Return the lowest and the highest position, or None if the host does not know them."""
    packed = cu_seqlens is not None
    if q.dim() != (3 if packed else 4) or not q.is_floating_point() or q.numel() == 0:
        return None
    shape, sequences = q.shape, q.shape[0]
    lengths: int | Tensor = q.shape[1]
    if packed:
        if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2 or not has_values(cu_seqlens):
            return None
        shape, sequences = torch.Size((1, *q.shape)), cu_seqlens.shape[0] - 1
        lengths = cu_seqlens.diff()
    if positions is None:
        return offset, offset + int(lengths.max() if packed else lengths) - 1
    if not has_values(positions):
        return None
    kind = position_kind(positions, shape, sequences)
    if kind is None or positions.numel() == 0:
        return None
    last = positions.flatten().double() + lengths - 1 if kind == "offsets" else positions
    return positions.min().item() + offset, last.max().item() + offset
