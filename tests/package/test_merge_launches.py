"""How many kernels a merge launches on a GPU, told without one: see test_launches.py."""

from __future__ import annotations

from test_launches import run_on_chip


def test_a_merge_is_one_launch(run_python):
    """Of any number of sets, in place too; no length compiles again."""
    source = """
    from extrope_kernels.ops.attention.triton.merge import merge_fwd as merge
    from extrope_kernels.ops.attention.triton.merge import merge_inplace as inplace
    found = set()
    for batch, seqlen in ((2, 40), (2, 41), (1, 16), (3, 1), (2, 1000)):
        outs = [random(batch, seqlen, 4, 64) for _ in range(3)]
        lses = [torch.zeros(batch, 4, seqlen) for _ in range(3)]
        for sets in (1, 3):
            for _ in range(2):
                assert launched(lambda: merge(outs[:sets], lses[:sets])) == 1
        wide = [torch.zeros(batch, 2 * seqlen, 4, 64), torch.zeros(batch, 4, 2 * seqlen)]
        views = wide[0][:, seqlen:], wide[1][..., seqlen:]
        assert launched(lambda: inplace(*views, outs[1:2], lses[1:2])) == 1
        found.add(compiled())
    assert len(found) == 1, found
    """
    run_on_chip(run_python, source)
