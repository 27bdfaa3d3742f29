"""From a scan of PyTorch tensors to launches of its kernels, planned once for each layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..._shared.triton.launch import chip_of, layouts_of, planned
from ..scan import Others, Scan, Scanned
from .plans import ScanPlans, scan_plans
from .rows import Numbers, Rows


def scan(q: Tensor, k: Tensor, v: Tensor, how: Scan) -> Scanned:
    """See ..scan; float32, bfloat16 or float16, accumulated in float32."""
    others = how.others
    key = (
        chip_of(q),
        layouts_of(q, k, v, *others),
        how.heads,
        how.causal,
        how.reverse,
        how.phi_scores,
        how.normalize,
        how.out_is_float,
        how.keep_state,
    )
    return _run(planned(scan_plans, key, q, k, v, how), q, k, v, others)


def scan_resolved(
    resolve: Callable[..., Scan],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    others: Others,
    options: dict[str, Any],
) -> Scanned:
    """The scan resolve(q, k, v, others, **options), which is asked once for each layout."""
    key = (resolve, chip_of(q), layouts_of(q, k, v, *others), *options.items())
    plans = planned(_resolved_plans, key, resolve, q, k, v, others, options)
    return _run(plans, q, k, v, others)


def _resolved_plans(
    resolve: Callable[..., Scan],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    others: Others,
    options: dict[str, Any],
) -> ScanPlans:
    return scan_plans(q, k, v, resolve(q, k, v, others, **options))


def _run(plans: ScanPlans, q: Tensor, k: Tensor, v: Tensor, of: Others) -> Scanned:
    device = q.device
    out = torch.empty(plans.out, dtype=plans.out_dtype, device=device)
    den, *last = (_numbers(shape, device) for shape in (plans.den, *plans.last))
    scanned = Scanned(out, den, *last)
    if plans.scan is not None:
        _launch(plans, q, k, v, of, scanned)
    elif plans.keeps_state:
        for state, first in zip(last, (of.first_state, of.first_sum)):
            state.zero_() if first is None else state.copy_(first)
    return scanned


def _launch(plans: ScanPlans, q: Tensor, k: Tensor, v: Tensor, of: Others, to: Scanned) -> None:
    rates = starts = None
    if plans.prepare is not None:
        if of.decay is not None:
            rates = _numbers(of.decay.shape, q.device)
        if of.cu_seqlens is not None:
            starts = torch.empty_like(of.cu_seqlens)
        plans.prepare(of.decay, rates, of.cu_seqlens, starts)
    keys = (Rows(k, *plans.k), Rows(v, *plans.v), _of_rows(of.k_scale), _of_rows(of.k_extra))
    sequences = (of.cu_seqlens, starts)
    first = (of.first_state, of.first_sum, None)
    states = None if of.first_state is None else first
    if plans.state is not None:
        states = tuple(None if x is None else _numbers(x, q.device) for x in plans.states)
        plans.state(*keys, rates, states, *sequences)
        for state, start, passing in zip(states, first, plans.passing):
            if passing is not None:
                passing(state, start, rates, starts)
    plans.scan(
        Rows(q, *plans.q), *keys[:2], Rows(to.out, *plans.out_rows), Rows(of.gate, *plans.gate),
        _of_rows(of.q_scale), _of_rows(of.q_extra), *keys[2:], to.den, rates, states,
        (to.state, to.sum, None) if plans.keeps_state else None, *sequences,
    )  # fmt: skip


def _numbers(shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=device)


def _of_rows(x: Tensor | None) -> Numbers:
    return Numbers(x, 1 if x is None else x.shape[-2])
