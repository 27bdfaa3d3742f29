"""A call of the rotation, after a norm or not, and the formula that it is compared with."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from support.generated import randn
from support.truncation import truncation
from torch import Tensor

from extrope_kernels import RopeFreqs, apply_rope_qk
from extrope_kernels.testing import assert_within_budget

NORMS = ("q_norm_weight", "k_norm_weight")


@dataclass(frozen=True)
class Case:
    q: Tensor
    k: Tensor
    freqs: RopeFreqs
    options: dict = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)  # of norms

    def run(self, **changes) -> tuple[Tensor, Tensor]:
        options = {**self.options, **self.weights, **changes}
        return apply_rope_qk(self.q, self.k, self.freqs, **options)

    def leaves(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """What has a gradient: q, k, and the frequencies or the weights of norms."""
        leaves = {"q": self.q, "k": self.k, **self.weights}
        if not self.weights:
            leaves["inv_freq"] = self.freqs.inv_freq
        return {
            n: x.detach().to(dtype or x.dtype).clone().requires_grad_() for n, x in leaves.items()
        }

    def of(self, leaves: dict[str, Tensor]) -> Case:
        """The same with these leaves."""
        freqs = replace(self.freqs, inv_freq=leaves.get("inv_freq", self.freqs.inv_freq))
        weights = {name: leaves[name] for name in self.weights}
        return replace(self, q=leaves["q"], k=leaves["k"], freqs=freqs, weights=weights)

    def exact(self) -> tuple[Tensor, Tensor]:
        """By the formula in float64, of angles in long double; differentiable."""
        sequence, at = self.places()
        inv_freq, per_head = self.freqs.inv_freq.double().cpu(), self.freqs.inv_freq.dim() == 3
        if inv_freq.dim() == 1:
            rows = inv_freq
        else:
            rows = inv_freq[sequence if len(inv_freq) > 1 else torch.zeros_like(sequence)]
        rows = rows if per_head else rows.unsqueeze(-2)  # (batch, seqlen, heads or 1, pairs)
        angle = at[..., None, :] * rows.detach().numpy().astype(np.longdouble)
        cos, sin = (torch.from_numpy(f(angle).astype(np.float64)) for f in (np.cos, np.sin))
        # As the angle moves, so do they.
        moved = torch.from_numpy(at.astype(np.float64))[..., None, :] * (rows - rows.detach())
        cos, sin = cos - sin * moved, sin + cos * moved
        sign = -1 if self.options.get("inverse") else 1
        outs = []
        for which, x in enumerate((self.q, self.k)):
            amplitude = torch.full((1,), self.freqs.attention_factor, dtype=torch.float64)
            if self.freqs.log_decay is not None:
                decay = (1, -1)[which] * self.freqs.log_decay.double().cpu()
                at_origin = at.astype(np.float64)[..., None, :] - self.freqs.decay_origin
                amplitude = amplitude * torch.exp(torch.from_numpy(at_origin) * decay)
            amplitude = amplitude**sign
            normed = self.normed(x.double(), self.weights.get(NORMS[which])).cpu()
            outs.append(self.rotated(normed, cos * amplitude, sign * sin * amplitude).to(x.device))
        return tuple(outs)

    def rotated(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first = self.options.get("rotary_offset", 0)
        before, rotary, after = x.tensor_split((first, first + 2 * cos.shape[-1]), -1)
        interleaved = self.options.get("interleaved")
        a, b = (rotary[..., 0::2], rotary[..., 1::2]) if interleaved else rotary.chunk(2, -1)
        if "cu_seqlens" in self.options:
            cos, sin = cos[0], sin[0]
        a, b = a * cos - b * sin, b * cos + a * sin
        rotary = torch.stack((a, b), -1).flatten(-2) if interleaved else torch.cat((a, b), -1)
        return torch.cat((before, rotary, after), -1)

    def normed(self, x: Tensor, weight: Tensor | None) -> Tensor:
        if weight is None:
            return x
        rows = x.flatten(-2) if len(weight) > x.shape[-1] else x
        scale = (rows.square().mean(-1, keepdim=True) + self.options.get("norm_eps", 1e-6)).rsqrt()
        return (rows * scale * weight.double()).view(x.shape)

    def places(self) -> tuple[Tensor, np.ndarray]:
        """Each token's sequence (batch, seqlen), and its positions (batch, seqlen, pairs or 1)."""
        given = self.options.get("positions")
        if "cu_seqlens" in self.options:
            sizes = self.options["cu_seqlens"].diff().long().cpu()
            sequence = torch.arange(len(sizes)).repeat_interleave(sizes)[None]
            index = torch.cat([torch.arange(n) for n in sizes.tolist()])[None]
            sequences = len(sizes)
        else:
            sequences, seqlen = self.q.shape[:2]
            index = torch.arange(seqlen).expand(sequences, seqlen)
            sequence = torch.arange(sequences)[:, None].expand(sequences, seqlen)
        at = index.double()
        if isinstance(given, int):
            at = at + given
        elif given is not None:
            given = given.double().cpu()
            if given.dim() == 3:
                at = given[self.freqs.axes.long().cpu()].permute(1, 2, 0)
                return sequence, at.numpy().astype(np.longdouble)
            offsets = given.shape == (sequences, 1)
            at = at + given[:, 0][sequence] if offsets else given.expand(index.shape)
        return sequence, at[..., None].numpy().astype(np.longdouble)


def check(case: Case, backend: str) -> tuple[Tensor, Tensor]:
    """Within the budget; nothing that was given changes. Returns the rotated q and k."""
    before = [x.clone() for x in (case.q, case.k)]
    outs, sames, exacts = case.run(backend=backend), case.run(backend="reference"), case.exact()
    for name, x, out, same, exact in zip("qk", (case.q, case.k), outs, sames, exacts):
        assert out.dtype == x.dtype
        if x.dtype == torch.float64:  # its angles are no better than the formula's
            furthest = np.abs(case.places()[1]).max(initial=0)
            noise = torch.finfo(x.dtype).eps * furthest * case.freqs.inv_freq.abs().max().item()
            torch.testing.assert_close(same, exact, rtol=1e-12 + noise, atol=1e-12 + 9 * noise)
            exact = same
        noise = norm_noise(case, exact)
        assert_within_budget(name, out, same, exact, truncation(backend, x.dtype), noise)
    assert torch.equal(case.q, before[0]) and torch.equal(case.k, before[1])
    return outs


def check_gradients(case: Case, backend: str, seed: int = 1) -> None:
    """Of all that has one."""
    douts = [randn(seed + n, *x.shape, dtype=x.dtype) for n, x in enumerate((case.q, case.k))]

    def gradients(leaves, run):
        outs = run(case.of(leaves))
        return torch.autograd.grad(
            outs, list(leaves.values()), [d.to(x) for d, x in zip(douts, outs)]
        )

    exact = gradients(case.leaves(torch.float64), Case.exact)
    found, same = (
        gradients(case.leaves(), lambda one, name=name: one.run(backend=name))
        for name in (backend, "reference")
    )
    for name, *values in zip(case.leaves(), found, same, exact):
        noise = norm_noise(case, exact[-1] if name == "k" else values[2])
        if name == "inv_freq":
            noise = frequency_noise(case, values[2])
        elif name in NORMS:  # each of so many additions rounds a running sum
            heads = case.q.shape[-2] if name == "q_norm_weight" else case.k.shape[-2]
            terms = case.q.shape[:-2].numel() * heads
            noise *= (10 + terms**0.5) / 10
        assert_within_budget(name, *values, truncation(backend, case.q.dtype), noise)


def norm_noise(case: Case, exact: Tensor) -> float:
    """Mean squares, products, means and differences: ten roundings that a rotation has not."""
    if not case.weights or not exact.numel():
        return 0.0
    ulp = min(torch.finfo(torch.float32).eps, torch.finfo(case.q.dtype).eps)
    return 5 * ulp * exact.abs().max().item()


def frequency_noise(case: Case, exact: Tensor) -> float:
    """d inv_freq sums position * x dx, whose terms may cancel: float32's error of each adds up."""
    if exact.numel() == 0 or case.q.numel() == 0:
        return 0.0
    at = case.options.get("positions")
    furthest = case.q.shape[-3] + (
        abs(at) if isinstance(at, int) else 0 if at is None else at.abs().max().item()
    )
    rows = case.q.numel() // case.q.shape[-1] + case.k.numel() // case.k.shape[-1]
    loudest = case.freqs.attention_factor
    if case.freqs.log_decay is not None:
        loudest *= torch.exp(furthest * case.freqs.log_decay.abs().max()).item()
    loudest = max(loudest, 1 / case.freqs.attention_factor)
    wide = torch.float64 if case.q.dtype == torch.float64 else torch.float32
    terms = case.q.double().abs().max() * 5.0 * loudest * furthest  # |dout| < 5
    return 8 * torch.finfo(wide).eps * rows**0.5 * terms.item()
