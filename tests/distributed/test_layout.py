"""Which tokens a rank holds, and cutting and joining by it."""

from __future__ import annotations

import pytest
import torch

from extrope_kernels.distributed import local_positions, shard, unshard

SIZES = (2, 4)


def has_the_tokens_of_torch(mesh, seqlen):
    from torch.distributed.tensor.experimental._context_parallel import _load_balancer

    size = mesh.size()
    balancer = _load_balancer._HeadTailLoadBalancer(seqlen, size, "cpu")
    expected = balancer._generate_indices().flatten().chunk(size)[mesh.get_local_rank()]
    assert torch.equal(local_positions(seqlen, mesh), expected.long())
    whole = torch.arange(seqlen).chunk(size)[mesh.get_local_rank()]
    assert torch.equal(local_positions(seqlen, mesh, balance=None), whole)
    with torch.device("meta"):  # of the CPU, whatever the default is
        assert torch.equal(local_positions(seqlen, mesh), expected.long())


@pytest.mark.parametrize("size", SIZES)
def test_zigzag_is_the_order_of_torchs_balancer(ranks, size):
    ranks.run(has_the_tokens_of_torch, size, seqlen=24)


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


@pytest.mark.parametrize("balance", ["zigzag", None])
@pytest.mark.parametrize("size", SIZES)
def test_unshard_undoes_shard(ranks, size, balance):
    ranks.run(cuts_and_joins, size, balance=balance)


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


@pytest.mark.parametrize("balance", ["zigzag", None])
@pytest.mark.parametrize("size", SIZES)
def test_gradients(ranks, size, balance):
    ranks.run(sums_gradients, size, balance=balance)


def refuses(mesh):
    x = torch.zeros(2, 12)
    with pytest.raises(ValueError, match="local_positions: seqlen must be a multiple of 8 for 4 r"):
        local_positions(12, mesh)
    with pytest.raises(ValueError, match="shard: x's dimension 1 must be a multiple of 8 for 4 ra"):
        shard(x, mesh)
    with pytest.raises(ValueError, match="unshard: x's dimension 1 must be even with balance"):
        unshard(x[:, :3], mesh)
    for name, function in (("shard", shard), ("unshard", unshard)):
        with pytest.raises(ValueError, match=f"{name}: dim must be one of x's 2 dimensions, got 2"):
            function(x, mesh, dim=2)
        with pytest.raises(TypeError, match=f"{name}: dim must be an int, got NoneType"):
            function(x, mesh, dim=None)
        with pytest.raises(TypeError, match=f"{name}: x must be a Tensor, got list"):
            function([x], mesh)
    with pytest.raises(TypeError, match="local_positions: seqlen must be an int, got float"):
        local_positions(12.0, mesh)
    with pytest.raises(
        TypeError, match="shard: mesh must be a DeviceMesh or a ProcessGroup, got s"
    ):
        shard(x, "cp")
    with pytest.raises(ValueError, match="shard: balance must be 'zigzag' or None, got 'tail'"):
        shard(x, mesh, balance="tail")


def test_refuses(ranks):
    ranks.run(refuses, 4)
