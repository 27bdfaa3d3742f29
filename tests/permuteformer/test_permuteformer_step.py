"""permuteformer_step: from state to state, a token or more at a time."""

from __future__ import annotations

import itertools

import pytest
import torch
from test_permuteformer import make

from extrope_kernels import PermuteFormerState, permuteformer_attention, permuteformer_step
from extrope_kernels.testing import assert_within_budget, device

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
FEW = 8  # on a CPU, more make up a chunk
ON_CPU = pytest.mark.skipif(device() != "cpu", reason="a GPU rounds more, and at infinity")


@pytest.mark.parametrize("normalize", [True, False])
def test_steps_of_the_reference_give_what_the_whole_does(normalize):
    """Others are compared with it, in test_properties_permuteformer.py."""
    (q, k, v), permutations = make(2, 40, dtype=torch.float64)
    arguments = {"permutations": permutations, "normalize": normalize, "backend": "reference"}
    arguments["decay"] = torch.tensor([0.9, 0.99]).to(device())
    whole = permuteformer_attention(q, k, v, **arguments)
    outs, state = [], None
    for first, end in itertools.pairwise((0, 33, 34, 35, 40)):
        rows = (x[:, first:end] for x in (q, k, v))
        out, state = permuteformer_step(*rows, state, positions=first, **arguments)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), whole)
    assert state.kv.shape == (2, 2, 16, 16) and state.kv.dtype == torch.float64


@ON_CPU
@pytest.mark.parametrize("tokens", [0, 1, FEW - 1, FEW, FEW + 1])
@pytest.mark.parametrize("dim, value_dim, dtype", [(33, 17, BF16), (64, 72, F16), (256, 96, F32)])
def test_few_tokens(dtype, dim, value_dim, tokens):
    """Of two sequences whose four states, two for each head of k, come from a float64 prompt."""
    (q, k, v), permutations = make(2, 60 + tokens, dim=dim, value_dim=value_dim, dtype=dtype)
    arguments = {
        "permutations": permutations,
        "decay": torch.tensor([0.5, 0.9, 0.99, 1.0]),
    }
    prompt = [x[:, :60].double() for x in (q, k, v)]
    _, given = permuteformer_step(*prompt, backend="reference", **arguments)
    rest = [x[:, 60:] for x in (q, k, v)]
    arguments["positions"] = 60
    start = PermuteFormerState(given.kv.float(), given.k.float())
    found, wide = permuteformer_step(*rest, start, **arguments), [x.double() for x in rest]
    same = permuteformer_step(*rest, start, backend="reference", **arguments)
    begin = PermuteFormerState(start.kv.double(), start.k.double())
    exact = permuteformer_step(*wide, begin, backend="reference", **arguments)
    assert_within_budget("rows", found[0], same[0], exact[0])
    for name in PermuteFormerState._fields:
        assert_within_budget(name, *(getattr(x[1], name) for x in (found, same, exact)))


@ON_CPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 70])
@pytest.mark.parametrize("name", PermuteFormerState._fields)
def test_states_that_are_not_finite(name, tokens, dtype):
    """phi is nowhere zero: infinite times eps is infinite."""
    (q, k, v), permutations = make(1, tokens, 1, 1, dim=64, value_dim=64, dtype=dtype)
    arguments = {"permutations": permutations, "positions": 9}
    _, state = permuteformer_step(q, k, v, permutations=permutations)
    getattr(state, name).view(-1)[3] = torch.inf
    out, _ = permuteformer_step(q, k, v, state, **arguments)
    wide = PermuteFormerState(state.kv.double(), state.k.double())
    exact, _ = permuteformer_step(*(x.double() for x in (q, k, v)), wide, **arguments)
    assert torch.equal(out.isnan(), exact.isnan()) and torch.equal(out.isinf(), exact.isinf())


def gradients_of_steps(q, k, v, start, douts, backend, cuts, **arguments):
    """Of q, k, v and the first state, through all states between; douts: of out and of the last."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v, *start)]
    state, outs = PermuteFormerState(*leaves[3:]), []
    for first, end in itertools.pairwise(cuts):
        rows = [x[:, first:end] for x in leaves[:3]]
        out, state = permuteformer_step(
            *rows, state, positions=7 + first, backend=backend, **arguments
        )
        outs.append(out)
    return torch.autograd.grad((torch.cat(outs, 1), *state), leaves, douts)


@pytest.mark.parametrize("named", [None, "reference"])
def test_a_state_may_be_a_plain_tuple(named):
    (q, k, v), permutations = make(2, 3, dim=8)
    arguments = {"permutations": permutations, "positions": 3, "backend": named}
    _, state = permuteformer_step(q, k, v, **arguments)
    out, _ = permuteformer_step(q, k, v, state, **arguments)
    recorded, _ = permuteformer_step(q.clone().requires_grad_(), k, v, tuple(state), **arguments)
    assert recorded.requires_grad
    torch.testing.assert_close(recorded.detach(), out)


def test_per_sample_gradients_of_a_step():
    """A mapped tensor does not say that torch.func.grad wants its gradient."""
    (q, k, v), permutations = make(2, 5, 2, 1, dim=8, value_dim=3)

    def loss(q, step):
        return step(q[None], k[:1], v[:1], permutations=permutations)[0].square().sum()

    found = torch.func.grad(lambda q: torch.vmap(lambda x: loss(x, permuteformer_step))(q).sum())(q)
    whole = torch.stack([torch.func.grad(lambda x: loss(x, by_reference))(x) for x in q])
    torch.testing.assert_close(found, whole)


def by_reference(*tensors, **arguments):
    return permuteformer_step(*tensors, **arguments, backend="reference")


@pytest.mark.parametrize(("heads", "normalize", "named"), [(1, True, None), (4, False, None)])
def test_gradients_through_states(heads, normalize, named):
    (q, k, v), permutations = make(2, 50, 4, 1, dim=24, value_dim=17)
    decay = torch.linspace(0.8, 1, heads).to(q.device)
    arguments = {"permutations": permutations, "normalize": normalize, "decay": decay}
    prompt = [x[:, :7] for x in (q, k, v)]
    _, start = permuteformer_step(*prompt, **arguments)
    rest = [x[:, 7:] for x in (q, k, v)]
    douts = [torch.randn(2, 43, 4, 17), *(torch.randn(x.shape) for x in start)]
    douts = [x.to(q.device) for x in douts]
    exactly = [x.double() for x in (*rest, *start, *douts)]
    whole = ("reference", (0, 43))
    exact = gradients_of_steps(*exactly[:3], exactly[3:5], exactly[5:], *whole, **arguments)
    same = gradients_of_steps(*rest, start, douts, *whole, **arguments)
    found = gradients_of_steps(*rest, start, douts, named, (0, 1, 20, 43), **arguments)
    for name, *values in zip(("q", "k", "v", "kv", "key_sum"), found, same, exact):
        assert_within_budget(name, *values)
