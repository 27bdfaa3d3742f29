"""What the tests of attention share: a float64 closed form, the plain formula in low precision that
sets the error budget, and the comparison of both with `rope_attention`.

Nothing here knows of regions or position maps.
"""

from __future__ import annotations

import math

import torch
from score_examples import Example, Relative
from torch import Tensor, nn

from extrope_kernels import rope_attention
from extrope_kernels.methods import RopeFreqs, rope
from extrope_kernels.testing import assert_within_budget, device


def split(
    x: Tensor, half: int, interleaved: bool, rotary_offset: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """First and second dims of the pairs, and the dims beside them."""
    before, rotary, after = x.tensor_split((rotary_offset, rotary_offset + 2 * half), -1)
    rest = torch.cat((before, after), -1)
    if interleaved:
        return rotary[..., 0::2], rotary[..., 1::2], rest
    return rotary[..., :half], rotary[..., half:], rest


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
    distances=None,
) -> tuple[Tensor, Tensor]:
    """out and lse in float64: sum over pairs of Re(q conj(k) exp(1j * relative * theta)).

    inv_freq: (rotary_dim / 2,), (batch, rotary_dim / 2) or (batch or 1, heads, rotary_dim / 2), of
    k's or of q's heads. first: the position of row 0, where it is not what bottom-right alignment
    says. distances: (batch or 1, heads or 1, i, j, pairs or 1), where they are not relative's.
    Differentiable in q, k, v and sinks.
    """
    q, k, v = (x.double() for x in (q, k, v))
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    theta, pairs = freqs.inv_freq.double().to(q.device), freqs.inv_freq.shape[-1]
    theta = theta.unsqueeze(-2) if theta.dim() < 3 else theta  # (batch, heads, pairs)
    seen = relative.seen.to(q.device)
    distances = seen.nan_to_num()[..., None] if distances is None else distances.to(q.device)
    qa, qb, q_rest = split(q, pairs, interleaved, rotary_offset)
    ka, kb, k_rest = split(k, pairs, interleaved, rotary_offset)
    real = torch.einsum("bihp,bjhp->bhijp", qa, ka) + torch.einsum("bihp,bjhp->bhijp", qb, kb)
    imag = torch.einsum("bihp,bjhp->bhijp", qb, ka) - torch.einsum("bihp,bjhp->bhijp", qa, kb)
    angle = distances * theta[..., None, None, :]
    if angle.dim() == 5 and angle.shape[1] not in (1, q.shape[2]):
        angle = angle.repeat_interleave(groups, 1)
    rotated = real * angle.cos() - imag * angle.sin()
    if freqs.log_decay is not None:
        decay = freqs.log_decay.double().to(q.device)
        rotated = rotated * torch.exp(seen.nan_to_num()[..., None] * decay)
    scores = rotated.sum(-1) * freqs.attention_factor**2
    scores = scores + torch.einsum("bihr,bjhr->bhij", q_rest, k_rest)
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
) -> tuple[Tensor, Tensor]:
    """What one writes without kernels: rotate and multiply in the tensors' own dtype.

    The softmax alone is in float32, as in transformers' eager attention. `scale_first` scales q
    rather than the scores: another order of the same roundings.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dtype, groups = q.dtype, q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    scores = torch.full((), -torch.inf, dtype=dtype, device=q.device)
    gain = row_gain(q, k, log_n, query_scale, first)
    if gain is not None:
        q = q * gain[:, :, None, None].to(dtype)
    if scale_first:
        q, scale = q * scale, 1.0
    layout = (interleaved, rotary_offset)
    for mask, at_i, at_j in relative.branches:
        rotated_q = _rotate(q, at_i.reshape(-1), freqs, *layout, 1)
        rotated_k = _rotate(k, at_j.reshape(-1), freqs, *layout, -1)
        branch = torch.einsum("bihd,bjhd->bhij", rotated_q, rotated_k)
        scores = torch.where(mask.to(q.device), branch, scores)
    scores = scores * scale
    if softcap:
        scores = (softcap * torch.tanh(scores / softcap)).masked_fill(scores.isneginf(), -torch.inf)
    return _softmax(scores.float() if dtype != torch.float64 else scores, v, dtype, sinks)


def _rotate(x, positions, freqs, interleaved, rotary_offset, decay_sign):
    """Rotate x; the dims that do not rotate come last, for products over all dims."""
    positions = positions[:, None].to(x.device)
    angle = (positions * freqs.inv_freq.double().to(x.device))[:, None]
    amplitude = torch.full_like(angle, freqs.attention_factor)
    if freqs.log_decay is not None:
        decay = freqs.log_decay.double().to(x.device)
        amplitude = amplitude * torch.exp(decay_sign * positions * decay)[:, None]
    cos, sin = (angle.cos() * amplitude).to(x.dtype), (angle.sin() * amplitude).to(x.dtype)
    a, b, rest = split(x, freqs.inv_freq.shape[-1], interleaved, rotary_offset)
    a, b = a * cos - b * sin, b * cos + a * sin
    rotated = torch.stack((a, b), -1).flatten(-2) if interleaved else torch.cat((a, b), -1)
    return torch.cat((rotated, rest), -1)


def _softmax(
    scores: Tensor, v: Tensor, dtype: torch.dtype, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    if sinks is not None:  # as one more key, whose value is zero
        sink = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
        scores, v = torch.cat((scores, sink), -1), nn.functional.pad(v, (0, 0, 0, 0, 0, 1))
    empty = (scores == -torch.inf).all(-1)
    scores = scores.masked_fill(empty[..., None], 0.0)
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - lse[..., None]).masked_fill(empty[..., None], 0.0).to(dtype)
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


def both_orders(q, k, v, relative, freqs, exact, **known) -> tuple[Tensor, ...]:
    """`plain_formula` in the worse of its two orders."""
    return worse(
        exact,
        *(plain_formula(q, k, v, relative, freqs, **known, scale_first=x) for x in (False, True)),
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


def check_outputs(backend, q, found, plain, exact, noise: float = 0.0) -> None:
    """Compare (out, lse) with the closed form, within the error budget of the plain formula.

    noise: what out may be off beside.
    """
    seen = exact[1] > -torch.inf
    assert torch.equal(found[1] > -torch.inf, seen)
    outs, lses = zip(found, plain, exact)
    for name, got, low, want in (("out", *outs), ("lse", *(lse[seen] for lse in lses))):
        more = truncation(backend, q, low, want) + (noise if name == "out" else 0.0)
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


def definition(example: Example, q: Tensor, k: Tensor, options: dict) -> tuple[Relative, dict]:
    """What a call with these options means: relative positions, and what the formulas are told."""
    known = dict(options)
    known["scale"] = known.pop("softmax_scale", None)
    window, k_start = known.pop("sliding_window", None), known.pop("k_start", 0)
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    first = known.pop("q_start", k_start + seqlen_k - seqlen_q)
    known["first"] = first
    if k_start == 0 and first == seqlen_k - seqlen_q:
        return example.relative(seqlen_q, seqlen_k).within(window), known
    total = max(first + seqlen_q, k_start + seqlen_k)
    rows, keys = slice(first, first + seqlen_q), slice(k_start, k_start + seqlen_k)
    return example.relative(total, total).within(window).part(rows, keys), known


def check(backend, example: Example, tensors, freqs: RopeFreqs | None = None, **options) -> None:
    """Fail where out or lse is out of the error budget. options: of the call."""
    q, k, v = tensors
    freqs = freqs or frequencies(q.shape[-1])
    relative, known = definition(example, q, k, options)
    exact = closed_form(q, k, v, relative, freqs, **known)
    plain = both_orders(q, k, v, relative, freqs, exact, **known)
    noise = 0.0
    if q.dtype == torch.float32 and {"sinks", "softcap", "query_scale"} & options.keys():
        # Of weights that are exp2 of a logit less lse: both are rounded.
        noise = rounding_noise("dv", v, exact[1], None, q, k, v, 1.0)
    check_outputs(
        backend, q, attend(example, q, k, v, freqs, backend, **options), plain, exact, noise
    )


def gradients(function, leaves, dout: Tensor, dlse: Tensor | None = None) -> tuple[Tensor, ...]:
    """Of function(*leaves), which gives out and lse."""
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    out, lse = function(*leaves)
    loss = (out * dout.to(out.dtype)).sum()
    if dlse is not None:
        loss = loss + (lse * dlse.to(lse.dtype)).masked_fill(lse == -torch.inf, 0.0).sum()
    return torch.autograd.grad(loss, leaves)


def check_gradients(
    backend, example: Example, tensors, freqs=None, with_lse=True, **options
) -> None:
    """Fail where dq, dk, dv or dsinks is out of the error budget. options: of the call."""
    q, _, v = tensors
    freqs = freqs or frequencies(q.shape[-1])
    dout = q.new_empty(*q.shape[:-1], v.shape[-1]).normal_()
    dlse = torch.randn(q.shape[0], q.shape[2], q.shape[1], device=q.device) if with_lse else None
    inputs = [*tensors, *([options["sinks"]] if "sinks" in options else [])]

    def fused(q, k, v, *sinks):
        return attend(example, q, k, v, freqs, backend, **options, **_named(sinks))

    options = {name: x for name, x in options.items() if name != "sinks"}
    found = gradients(fused, inputs, dout, dlse)
    compare_gradients(found, example, inputs, freqs, dout, dlse, **options)


def check_both(backend, example: Example, tensors, freqs=None, with_lse=True, **options) -> None:
    """`check` and `check_gradients`."""
    check(backend, example, tensors, freqs, **options)
    check_gradients(backend, example, tensors, freqs, with_lse, **options)


def compare_gradients(
    found, example: Example, inputs, freqs: RopeFreqs, dout, dlse=None, **options
) -> None:
    """Against autograd through the formulas. inputs: q, k, v and maybe the sinks."""
    q, k, v = inputs[:3]
    relative, known = definition(example, q, k, options)

    def of(formula, **order):
        return lambda q, k, v, *sinks: formula(
            q, k, v, relative, freqs, **known, **order, **_named(sinks)
        )

    exact = gradients(of(closed_form), [x.double() for x in inputs], dout.double(), dlse)
    orders = (
        gradients(of(plain_formula, scale_first=x), inputs, dout, dlse) for x in (False, True)
    )
    plain = worse(exact, *orders)
    out, lse = of(closed_form)(*inputs)
    gain = row_gain(q, k, known.get("log_n"), known.get("query_scale"), known["first"])
    scale = (known["scale"] or q.shape[-1] ** -0.5) * freqs.attention_factor**2
    scale *= 1.0 if gain is None or not gain.numel() else gain.abs().max().item()
    for name, got, low, want in zip(
        ("dq", "dk", "dv", "dsinks"), found, plain, exact, strict=False
    ):
        noise = rounding_noise(name, want, lse, dout, q, k, v, scale)
        noise *= q.shape[0] * q.shape[1] if name == "dsinks" else 1
        noise = noise if got.dtype == torch.float32 == q.dtype else 0.0
        if name == "dsinks" and q.dtype in (torch.float16, torch.bfloat16):
            noise = _noise_of_rounded_out(out, lse, inputs[3], dout, q.dtype)
        assert_within_budget(name, got, low, want, noise=noise)


def _noise_of_rounded_out(
    out: Tensor, lse: Tensor, sinks: Tensor, dout: Tensor, dtype: torch.dtype
) -> float:
    """The error of dsinks, the sum of -share * (dout . out - dlse), by an out of 16 bits: half a
    unit in the last place of each of its elements.
    """
    share = torch.exp(sinks.double()[:, None] - lse.double())
    terms = torch.linalg.vecdot(dout.double().abs(), out.double().abs()).transpose(1, 2)
    largest = (share * terms).nan_to_num().sum((0, 2)).max().item()
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
