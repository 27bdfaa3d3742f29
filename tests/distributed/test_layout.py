"""Which tokens a rank holds, and cutting and joining by it."""

from __future__ import annotations

import pytest
import torch

from extrope_kernels.distributed import local_positions, shard, unshard


def has_the_tokens_of_torch(mesh, seqlen):
    """In zigzag those of its head-tail load balancer."""
    from torch.distributed.tensor.experimental._context_parallel import _load_balancer

    size = mesh.size()
    balancer = _load_balancer._HeadTailLoadBalancer(seqlen, size, "cpu")
    expected = balancer._generate_indices().flatten().chunk(size)[mesh.get_local_rank()]
    assert torch.equal(local_positions(seqlen, mesh), expected.long())
    whole = torch.arange(seqlen).chunk(size)[mesh.get_local_rank()]
    assert torch.equal(local_positions(seqlen, mesh, balance=None), whole)
    with torch.device("meta"):  # of the CPU, whatever the default is
        assert torch.equal(local_positions(seqlen, mesh), expected.long())


def cuts_and_joins(mesh, balance):
    x = torch.randn(3, 16, 2)
    for dim in (1, -2):
        part = shard(x, mesh, dim=dim, balance=balance)
        assert torch.equal(part, x[:, local_positions(16, mesh, balance=balance)])
        assert torch.equal(unshard(part, mesh, dim=dim, balance=balance), x)
    ids = torch.arange(16)
    assert torch.equal(
        shard(ids, mesh, dim=0, balance=balance), local_positions(16, mesh, balance=balance)
    )
    assert unshard(ids[:0], mesh, dim=0, balance=balance).shape == (0,)
    assert torch.equal(shard(ids, mesh.get_group(), dim=0), shard(ids, mesh, dim=0))


def sums_gradients(mesh, balance):
    """Every rank's loss is of the whole: a token's gradient is the sum of all ranks' gradients."""
    x = torch.randn(16, 2)
    part = shard(x, mesh, dim=0, balance=balance).clone().requires_grad_()
    weights = torch.randn(16, 2)
    (
        unshard(part, mesh, dim=0, balance=balance) * weights * (mesh.get_local_rank() + 1)
    ).sum().backward()
    total = sum(range(1, mesh.size() + 1))
    torch.testing.assert_close(part.grad, total * shard(weights, mesh, dim=0, balance=balance))


def of_both_balances(mesh, check):
    for balance in ("zigzag", None):
        check(mesh, balance)


@pytest.mark.parametrize("size", [2, 4])
def test_shard_and_unshard_are_each_others_inverse(ranks, size):
    ranks.run(has_the_tokens_of_torch, size, seqlen=24)
    for check in (cuts_and_joins, sums_gradients):
        ranks.run(of_both_balances, size, check=check)


X = torch.zeros(2, 12)
REFUSED = [
    (local_positions, 12, {}, ValueError, "seqlen must be a multiple of 8 for 4 r"),
    (local_positions, 12.0, {}, TypeError, "seqlen must be an int, got float"),
    (shard, X, {}, ValueError, "x's dimension 1 must be a multiple of 8 for 4 ra"),
    (shard, X, {"mesh": "cp"}, TypeError, "mesh must be a DeviceMesh or a ProcessGroup, got s"),
    (shard, X, {"balance": "tail"}, ValueError, "balance must be 'zigzag' or None, got 'tail'"),
    (unshard, X[:, :3], {}, ValueError, "x's dimension 1 must be even with balance"),
    (unshard, X, {"dim": 2}, ValueError, "dim must be one of x's 2 dimensions, got 2"),
    (unshard, X, {"dim": None}, TypeError, "dim must be an int, got NoneType"),
    (unshard, [X], {}, TypeError, "x must be a Tensor, got list"),
]


def refuses(mesh):
    for function, x, options, error, message in REFUSED:
        with pytest.raises(error, match=f"^{function.__name__}: {message}"):
            function(x, **{"mesh": mesh, **options})


def test_refuses(ranks):
    ranks.run(refuses, 4)
