"""The rotation after a norm as an op: schema, graphs, refusals, threads."""

import pytest
import torch
from test_rope_norm import by_autograd, call, norm_weights

from extrope_kernels import apply_rope_qk, methods
from extrope_kernels.testing import device, make_qk


@pytest.mark.parametrize("together", (False, True))
def test_opcheck(backend, together):
    suffix = "_triton" if backend == "triton" else ""
    q, k = make_qk(2, 5, 2, 2, head_dim=8)
    weights, inv_freq = norm_weights(2, 2, 8, together), methods.rope(6).inv_freq.to(device())
    ops = torch.ops.extrope
    for name, args in {
        "rope_norm_fwd": (q.requires_grad_(), k, *weights, inv_freq),
        "rope_norm_bwd": (q.detach(), k, q.detach(), k, *weights, inv_freq),
        "rope_norm_inplace": (q.detach().clone(), k.clone(), *weights, inv_freq),
    }.items():
        torch.library.opcheck(getattr(ops, name + suffix).default, args, {"offset": 3})


def test_compile_fullgraph(backend):
    q, k = make_qk(2, 5, 2, 2, head_dim=8)
    freqs = methods.rope(8).to(device())
    leaves = [x.requires_grad_() for x in (q, k, *norm_weights(2, 2, 8))]

    def loss(*x):
        return sum(out.pow(3).sum() for out in call(x, freqs, backend))

    graph = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*leaves), leaves)
    for got, want in zip(graph, torch.autograd.grad(loss(*leaves), leaves)):
        torch.testing.assert_close(got, want)


# -------------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize(
    "changes, error, message",
    (
        ({"q_norm_weight": torch.ones(7)}, ValueError, r"q_norm_weight must be \(8,\)"),
        ({"k_norm_weight": torch.ones(2, 8)}, ValueError, r"k_norm_weight must be \(8,\)"),
        ({"q_norm_weight": torch.ones(8).long()}, ValueError, "q_norm_weight must be float32"),
        ({"q_norm_weight": torch.ones(16)[::2]}, ValueError, "q_norm_weight must be contiguous"),
        ({"k_norm_weight": 1.0}, TypeError, "k_norm_weight must be a Tensor, got float"),
        ({"norm_eps": -1.0}, ValueError, "norm_eps must be >= 0, got -1.0"),
        ({"norm_eps": "small"}, TypeError, "norm_eps must be a number, got str"),
    ),
)
@pytest.mark.parametrize("named", (None, "reference"))
def test_refusals(named, changes, error, message):
    q, k = make_qk(1, 3, 2, 2, head_dim=8)
    weights = {"q_norm_weight": torch.ones(8), "k_norm_weight": torch.ones(8)} | changes
    weights = {n: w.to(device()) if isinstance(w, torch.Tensor) else w for n, w in weights.items()}
    with pytest.raises(error, match=f"rope: {message}"):
        apply_rope_qk(q, k, methods.rope(8).to(device()), backend=named, **weights)


def test_same_bits_with_any_number_of_threads():
    q, k = make_qk(1, 700, 3, 2)
    weights, freqs = norm_weights(3, 2, 64), methods.rope(64).to(device())
    douts = [torch.randn_like(x) for x in (q, k)]
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(by_autograd([q, k, *weights], freqs, None, douts))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other))
