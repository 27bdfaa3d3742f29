"""What the tests of attention share: a float64 closed form, the plain formula in low precision that
sets the error budget, and the comparison of both with `rope_attention`.

Nothing here knows of regions or position maps.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import torch
from support.rounding import Rounding, norm
from support.score_examples import Example, Relative
from torch import Tensor, nn

from extrope_kernels import rope_attention
from extrope_kernels.methods import RopeFreqs, rope
from extrope_kernels.testing import assert_within_budget, device


def split(x: Tensor, half: int, interleaved: bool, rotary_offset: int = 0) -> tuple[Tensor, ...]:
    """First and second dims of the pairs, the dims before them and those behind them."""
    before, rotary, after = x.tensor_split((rotary_offset, rotary_offset + 2 * half), -1)
    if interleaved:
        return rotary[..., 0::2], rotary[..., 1::2], before, after
    return rotary[..., :half], rotary[..., half:], before, after


def row_gain(q, k, log_n, query_scale, first) -> Tensor | None:
    """(batch or 1, seqlen_q) float64: log-n and a given temperature; first: position of row 0."""
    gain = None
    if log_n is not None:
        i = torch.arange(q.shape[1], device=q.device).double()
        i = i + (k.shape[1] - q.shape[1] if first is None else first)
        gain = (torch.log(i.clamp(min=0) + 1) / math.log(log_n)).clamp(min=1.0)[None]
    if query_scale is not None:
        gain = query_scale.double().expand(1 if query_scale.dim() == 1 else -1, -1) * (
            1.0 if gain is None else gain
        )
    return gain


def closed_form(
    q,
    k,
    v,
    relative: Relative,
    freqs: RopeFreqs,
    *,
    scale=None,
    log_n=None,
    interleaved=False,
    rotary_offset=0,
    query_scale=None,
    softcap=0.0,
    sinks=None,
    first=None,
) -> tuple[Tensor, Tensor]:
    """out and lse in float64: sum over pairs of Re(q conj(k) exp(1j * relative * theta)).

    inv_freq: (rotary_dim / 2,), (batch, rotary_dim / 2) or (batch or 1, heads_k, rotary_dim / 2).
    first: the position of row 0, where it is not what bottom-right alignment says. Differentiable
    in q, k, v and sinks.
    """
    q, k, v = (x.double() for x in (q, k, v))
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    theta, pairs = freqs.inv_freq.double().to(q.device), freqs.inv_freq.shape[-1]
    theta = theta.unsqueeze(-2) if theta.dim() < 3 else theta  # (batch, heads, pairs)
    seen = relative.seen.to(q.device)
    of_pairs = relative.by_pair
    distances = seen.nan_to_num()[..., None] if of_pairs is None else of_pairs.to(q.device)
    qa, qb, *q_rest = split(q, pairs, interleaved, rotary_offset)
    ka, kb, *k_rest = split(k, pairs, interleaved, rotary_offset)
    real = torch.einsum("bihp,bjhp->bhijp", qa, ka) + torch.einsum("bihp,bjhp->bhijp", qb, kb)
    imag = torch.einsum("bihp,bjhp->bhijp", qb, ka) - torch.einsum("bihp,bjhp->bhijp", qa, kb)
    theta, distances = (
        x if x.dim() < dims or x.shape[1] in (1, q.shape[2]) else x.repeat_interleave(groups, 1)
        for x, dims in ((theta, 3), (distances, 5))
    )
    angle = distances * theta[..., None, None, :]
    rotated = real * angle.cos() - imag * angle.sin()
    if freqs.log_decay is not None:
        decay = freqs.log_decay.double().to(q.device)
        rotated = rotated * torch.exp(seen.nan_to_num()[..., None] * decay)
    scores = rotated.sum(-1) * freqs.attention_factor**2
    scores = scores + torch.einsum("bihr,bjhr->bhij", torch.cat(q_rest, -1), torch.cat(k_rest, -1))
    scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
    gain = row_gain(q, k, log_n, query_scale, first)
    if gain is not None:
        scores = scores * gain[:, None, :, None]
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    return _softmax(scores.masked_fill(seen.isnan(), -torch.inf), v, torch.float64, sinks)


def plain_formula(
    q,
    k,
    v,
    relative: Relative,
    freqs: RopeFreqs,
    *,
    scale=None,
    log_n=None,
    interleaved=False,
    rotary_offset=0,
    query_scale=None,
    softcap=0.0,
    sinks=None,
    first=None,
    scale_first=False,
    dtype=None,
) -> tuple[Tensor, Tensor]:
    """What one writes without kernels: rotate and multiply in the tensors' own dtype.

    The softmax alone is in float32, as in transformers' eager attention. `scale_first` scales q
    rather than the scores: another order of the same roundings. dtype: that of rotated rows and
    weights, where sums are in v's wider one.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dtype, groups = dtype or q.dtype, q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    scores = torch.full((), -torch.inf, dtype=v.dtype, device=q.device)
    gain = row_gain(q, k, log_n, query_scale, first)
    if gain is not None:
        q = q * gain[:, :, None, None].to(q.dtype)
    if scale_first:
        q, scale = q * scale, 1.0
    layout = (interleaved, rotary_offset)
    for mask, at_i, at_j in relative.branches:
        rotated = rotate(q, at_i, freqs, *layout, 1), rotate(k, at_j.T, freqs, *layout, -1)
        rotated = [x.to(dtype).to(v.dtype) for x in rotated]
        branch = torch.einsum("bihd,bjhd->bhij", *rotated)
        scores = torch.where(mask.to(q.device), branch, scores)
    scores = scores * scale
    if softcap:
        scores = (softcap * torch.tanh(scores / softcap)).masked_fill(scores.isneginf(), -torch.inf)
    return _softmax(scores if v.dtype == torch.float64 else scores.float(), v, dtype, sinks)


def rotate(x, positions, freqs, interleaved, rotary_offset, decay_sign):
    """Rotate x (..., rows, heads, head_dim) to positions (rows, 1) or (rows, heads or 1, pairs)."""
    positions = positions if positions.dim() == 3 else positions[..., None]
    positions = positions.to(x.device)
    angle = positions * freqs.inv_freq.double().to(x.device)
    amplitude = torch.full_like(angle, freqs.attention_factor)
    if freqs.log_decay is not None:
        decay = freqs.log_decay.double().to(x.device)
        amplitude = amplitude * torch.exp(decay_sign * positions * decay)
    cos, sin = (angle.cos() * amplitude).to(x.dtype), (angle.sin() * amplitude).to(x.dtype)
    a, b, before, after = split(x, freqs.inv_freq.shape[-1], interleaved, rotary_offset)
    a, b = a * cos - b * sin, b * cos + a * sin
    rotated = torch.stack((a, b), -1).flatten(-2) if interleaved else torch.cat((a, b), -1)
    return torch.cat((before, rotated, after), -1)


def _softmax(
    scores: Tensor, v: Tensor, dtype: torch.dtype, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    if sinks is not None:  # as one more key, whose value is zero
        sink = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
        scores, v = torch.cat((scores, sink), -1), nn.functional.pad(v, (0, 0, 0, 0, 0, 1))
    empty = (scores == -torch.inf).all(-1)
    scores = scores.masked_fill(empty[..., None], 0.0)
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - lse[..., None]).masked_fill(empty[..., None], 0.0)
    weights = weights.to(dtype).to(v.dtype)
    return torch.einsum("bhij,bjhd->bihd", weights, v), lse.masked_fill(empty, -torch.inf)


def worse(exact, *spellings) -> tuple[Tensor, ...]:
    """Of several ways to compute the same tensors in low precision, that with the largest error.

    A maximum over few elements says little about rounding; two orders of rounding say more.
    """
    return tuple(
        max(found, key=lambda x: (x.double() - want).abs().nan_to_num().max().item())
        if want.numel()
        else found[0]
        for want, *found in zip(exact, *spellings)
    )


def rounding_noise(name, exact, lse, dout, q, k, v, scale) -> float:
    """The error of a gradient that float32 cannot avoid.

    Weights are exp2 of a logit less lse: the rounding of these is their relative error. It comes
    with dout . v - delta, whose two terms are as large as |dout| |v| and may cancel.

    name: starts with dq, dk or dv. q, k: a tensor, or a list of frames. scale: of the logits.
    """
    finite = lse[lse.isfinite()]
    if exact.numel() == 0 or finite.numel() == 0:
        return 0.0
    relative = torch.finfo(torch.float32).eps * (1 + finite.abs().max().item() / math.log(2.0))
    if name == "dv":
        return relative * exact.abs().max().item()
    others = k if name.startswith("dq") else q
    largest = max(x.abs().max().item() for x in (others if isinstance(others, list) else [others]))
    terms = 2 * dout.double().norm(dim=-1).max() * v.double().norm(dim=-1).max()
    return relative * terms.item() * scale * largest


def check_outputs(backend, q, found, plain, exact, noise=(0.0, 0.0)) -> None:
    """Compare (out, lse) with the closed form, within the error budget of the plain formula.

    noise: what each may be off beside.
    """
    seen = exact[1] > -torch.inf
    assert torch.equal(found[1] > -torch.inf, seen)
    outs, lses = zip(found, plain, exact)
    for name, more, got, low, want in (
        ("out", noise[0], *outs),
        ("lse", noise[1], *(lse[seen] for lse in lses)),
    ):
        more += truncation(backend, q, low, want)
        assert_within_budget(name, got, low, want, noise=more)


def truncation(backend: str, q: Tensor, plain: Tensor, exact: Tensor) -> float:
    """What Triton's interpreter may add to the error budget in bfloat16.

    It truncates rotated rows where torch rounds them: an error of up to a unit, not half of one, so
    that the plain formula's own error, and with it the budget, would be twice as large.
    """
    if backend != "triton" or q.dtype != torch.bfloat16 or torch.cuda.is_available():
        return 0.0
    return 2 * (plain.double() - exact).abs().max().item() if exact.numel() else 0.0


# -------------------------------------------------------------------------------------------------
# rope_attention against the formulas


def attend(example: Example, q, k, v, freqs, backend=None, **options) -> tuple[Tensor, Tensor]:
    """out and lse of the public function."""
    return rope_attention(
        q, k, v, freqs, example.score, return_lse=True, backend=backend, **options
    )


def sequences(example: Example, tensors, freqs: RopeFreqs, options: dict):
    """Of each sequence: where it lies in the tensors, and the formulas' other arguments."""
    q, k = tensors[:2]
    bounds = options.get("cu_seqlens")
    packed = bounds is not None
    bounds = bounds.tolist() if packed else range(len(q) + 1)
    for n, part in enumerate(slice(*pair) for pair in pairwise(bounds)):
        known = {name: x for name, x in options.items() if name in FORMULA}
        known["scale"] = options.get("softmax_scale")
        if (scale := options.get("query_scale")) is not None:
            known["query_scale"] = scale[part] if packed or scale.dim() == 2 else scale
            known["query_scale"] = known["query_scale"].view(1, -1)
        seqlen_q, seqlen_k = (part.stop - part.start if packed else x.shape[1] for x in (q, k))
        starts = {name: options[name] for name in ("q_start", "k_start") if name in options}
        starts = {name: int(x[n] if isinstance(x, Tensor) else x) for name, x in starts.items()}
        k_start = starts.get("k_start", 0)
        first = known["first"] = starts.get("q_start", k_start + seqlen_k - seqlen_q)
        window = options.get("sliding_window")
        if k_start == 0 and first == seqlen_k - seqlen_q:
            relative = example.relative(seqlen_q, seqlen_k).within(window)
        else:
            total = max(first + seqlen_q, k_start + seqlen_k)
            rows, keys = slice(first, first + seqlen_q), slice(k_start, k_start + seqlen_k)
            relative = example.relative(total, total).within(window).part(rows, keys)
        inv_freq, by_pair = freqs.inv_freq, relative.by_pair
        if inv_freq.dim() > 1 and len(inv_freq) > 1:
            inv_freq = inv_freq[n : n + 1]
        if by_pair is not None and len(by_pair) > 1:
            relative = replace(relative, by_pair=by_pair[n : n + 1])
        known["freqs"] = replace(freqs, inv_freq=inv_freq)
        yield part, known | {"relative": relative}


NAMES = ("dq", "dk", "dv", "dsinks")
FORMULA = ("log_n", "interleaved", "rotary_offset", "softcap", "sinks")


def by_formula(formula, example: Example, tensors, freqs, options: dict, **order):
    """out and lse of `closed_form` or `plain_formula`, for each sequence by itself."""
    outs, lses, packed = [], [], "cu_seqlens" in options
    for part, known in sequences(example, tensors, freqs, options):
        own = (x[part][None] if packed else x[part] for x in tensors)
        out, lse = formula(*own, **known, **order)
        outs.append(out)
        lses.append(lse)
    if packed:
        return torch.cat(outs, 1)[0], torch.cat(lses, 2)[0]
    if not outs:  # empty, but with a gradient
        q, v, nothing = tensors[0], tensors[2], sum(x.sum() for x in tensors)
        shapes = (*q.shape[:-1], v.shape[-1]), (0, q.shape[2], q.shape[1])
        return tuple(nothing * q.new_zeros(shape) for shape in shapes)
    return torch.cat(outs), torch.cat(lses)


def plain_formulas(example: Example, freqs: RopeFreqs, options: dict) -> list:
    """Functions of q, k, v (and sinks) that set the budget: two orders of the plain formula.

    It knows no pairs or heads that differ: then the reference in the tensors' own dtype.
    """
    if example.by_pair or freqs.inv_freq.dim() == 3:
        return [lambda *x: attend(example, *x[:3], freqs, "reference", **options, **_named(x[3:]))]
    return [
        lambda *x, order=order: by_formula(
            plain_formula, example, x[:3], freqs, options | _named(x[3:]), scale_first=order
        )
        for order in (False, True)
    ]


def check(
    backend,
    example: Example,
    tensors,
    freqs: RopeFreqs | None = None,
    error: Rounding | None = None,
    **options,
) -> None:
    """Fail where out or lse is out of the error budget.

    error: what sets the budget, in place of the plain formula. options: of the call, packed or not.
    """
    q, k, v = tensors
    freqs = freqs or frequencies(q.shape[-1])
    exact = by_formula(closed_form, example, tensors, freqs, options)
    if error is None:
        noise = (0.0, 0.0)
        plain = worse(exact, *(of(*tensors) for of in plain_formulas(example, freqs, options)))
        if q.dtype == torch.float32 and {"sinks", "softcap", "query_scale"} & options.keys():
            # Of weights that are exp2 of a logit less lse: both are rounded.
            noise = rounding_noise("dv", v, exact[1], None, q, k, v, 1.0), 0.0
    else:
        noise = error.weight(k.shape[-3]) * norm(v), error.logit
        plain = [x.to(dtype) for x, dtype in zip(exact, (q.dtype, torch.float32))]
    found = attend(example, q, k, v, freqs, backend, **options)
    check_outputs(backend, q, found, plain, exact, noise)


def gradients(function, leaves, dout: Tensor, dlse: Tensor | None = None) -> tuple[Tensor, ...]:
    """Of function(*leaves), which gives out and lse."""
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    out, lse = function(*leaves)
    loss = (out * dout.to(out.dtype)).sum()
    if dlse is not None:
        loss = loss + (lse * dlse.to(lse.dtype)).masked_fill(lse == -torch.inf, 0.0).sum()
    return torch.autograd.grad(loss, leaves, materialize_grads=True)


def check_gradients(
    backend, example: Example, tensors, freqs=None, with_lse=True, error=None, **options
) -> None:
    """Fail where dq, dk, dv or dsinks is out of the error budget; arguments as of `check`."""
    q, k, v = tensors
    freqs = freqs or frequencies(q.shape[-1])
    dout = q.new_empty(*q.shape[:-1], v.shape[-1]).normal_()
    dlse = (
        torch.randn(*q.shape[:-3], q.shape[-2], q.shape[-3], device=q.device) if with_lse else None
    )
    inputs = [*tensors, *([options["sinks"]] if options.get("sinks") is not None else [])]
    options = {name: x for name, x in options.items() if name != "sinks"}

    def fused(*x):
        return attend(example, *x[:3], freqs, backend, **options, **_named(x[3:]))

    def exactly(*x):
        return by_formula(closed_form, example, x[:3], freqs, options | _named(x[3:]))

    found = gradients(fused, inputs, dout, dlse)
    exact = gradients(exactly, [x.double() for x in inputs], dout.double(), dlse)
    if error is not None:
        weight, score = error.weight(k.shape[-3]), 2 * norm(dout) * norm(v) * error.logit_scale
        rows = q.shape[-3] * q.shape[-2] / k.shape[-2]  # how many queries add to one key
        noise = (
            weight * score * norm(k),
            weight * score * norm(q) * rows,
            weight * norm(dout) * rows,
            weight * norm(dout) * norm(v) * q.shape[:-2].numel(),
        )
        for name, got, want, own in zip(NAMES, found, exact, noise):
            assert_within_budget(name, got, want.to(got.dtype), want, noise=own)
        return
    plain = (gradients(of, inputs, dout, dlse) for of in plain_formulas(example, freqs, options))
    plain = worse(exact, *plain)
    out, lse = exactly(*inputs)
    scale = (options.get("softmax_scale") or q.shape[-1] ** -0.5) * freqs.attention_factor**2
    scale *= largest_gain(example, tensors, freqs, options)
    for name, got, low, want in zip(NAMES, found, plain, exact):
        own = rounding_noise(name, want, lse, dout, q, k, v, scale)
        own *= q.shape[:-2].numel() if name == "dsinks" else 1
        own = own if got.dtype == torch.float32 == q.dtype else truncation(backend, q, low, want)
        if name == "dsinks" and q.dtype in (torch.float16, torch.bfloat16):
            own = _noise_of_rounded_out(out, lse, inputs[3], dout, q.dtype)
        assert_within_budget(name, got, low, want, noise=own)


def largest_gain(example: Example, tensors, freqs: RopeFreqs, options: dict) -> float:
    """The largest factor of a row's logits, of log-n and a given temperature."""
    found, packed = [], "cu_seqlens" in options
    for part, known in sequences(example, tensors, freqs, options):
        q, k = (x[part][None] if packed else x[part] for x in tensors[:2])
        gain = row_gain(q, k, known.get("log_n"), known.get("query_scale"), known["first"])
        if gain is not None and gain.numel():
            found.append(gain.abs().max().item())
    return max(found, default=1.0)


def check_both(backend, example: Example, tensors, freqs=None, with_lse=True, **options) -> None:
    """`check` and `check_gradients`."""
    check(backend, example, tensors, freqs, **options)
    check_gradients(backend, example, tensors, freqs, with_lse, **options)


def _noise_of_rounded_out(
    out: Tensor, lse: Tensor, sinks: Tensor, dout: Tensor, dtype: torch.dtype
) -> float:
    """The error of dsinks, the sum of -share * (dout . out - dlse), by an out of 16 bits: half a
    unit in the last place of each of its elements.
    """
    share = torch.exp(sinks.double()[:, None] - lse.double())  # (..., heads, rows)
    terms = torch.linalg.vecdot(dout.double().abs(), out.double().abs()).mT
    largest = (share * terms).nan_to_num().movedim(-2, 0).flatten(1).sum(1).max().item()
    return torch.finfo(dtype).eps / 2 * largest


def _named(sinks: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return {"sinks": sinks[0]} if sinks else {}


def make_qkv(
    batch=1,
    seqlen_q=33,
    seqlen_k=None,
    heads_q=2,
    heads_k=1,
    head_dim=32,
    dtype=torch.float32,
    head_dim_v=None,
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seqlen_q * 1000 + head_dim)
    keys = (batch, seqlen_k or seqlen_q, heads_k)
    shapes = [
        (batch, seqlen_q, heads_q, head_dim),
        (*keys, head_dim),
        (*keys, head_dim_v or head_dim),
    ]
    return tuple(torch.randn(*x, generator=generator).to(device(), dtype) for x in shapes)


def frequencies(head_dim: int, **changes) -> RopeFreqs:
    freqs = rope(changes.pop("rotary_dim", head_dim))
    return RopeFreqs(freqs.inv_freq.to(device()), **changes)
