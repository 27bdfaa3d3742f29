"""bench/distributed_model.py: what is computed on paper, against sums by hand."""

from __future__ import annotations

import distributed_model as model
import pytest
import torch
from sent import by_formula

MILLION = 1 << 20


def test_attention_alone():
    """Four operations for each of 32 x 128 dims and each of 2**40 / 2 pairs, at 400 TFLOP/s."""
    cost = model.alone(8, MILLION)
    assert cost.forward == pytest.approx(4 * 4096 * 2**39 / 8 / 400e12)
    assert cost.backward == pytest.approx(2.5 * cost.forward)


def test_what_is_sent_where_nothing_hides_it():
    """4.3 GB of keys at 50 GB/s, and there and back in float32 with them: 86 and 258 ms."""
    for strategy in (model.gather, model.ring):
        cost = strategy(256, MILLION // 16)
        seconds = 16 * cost.forward, 16 * cost.backward
        assert seconds == pytest.approx((0.0859, 0.2577), rel=0.01)


def test_ulysses_sends_what_is_counted():
    """bench_distributed.py compares the formula with the bytes of every collective."""
    gpus, tokens = 16, MILLION
    q, k, v = (torch.empty(tokens // gpus, heads, 128, dtype=torch.bfloat16, device="meta")
               for heads in (model.HEADS_Q, model.HEADS_K, model.HEADS_K))  # fmt: skip
    alone, cost = model.alone(gpus, tokens), model.ulysses(gpus, tokens)
    sent = [model.FABRIC * x for x in (cost.forward - alone.forward, cost.seconds - alone.seconds)]
    formula = [by_formula("ulysses", q, k, v, gpus, backward) for backward in (False, True)]
    assert sent == pytest.approx(formula)


@pytest.mark.parametrize("gpus", model.GPUS)
@pytest.mark.parametrize("tokens", model.TOKENS)
def test_the_choice_fits_and_is_close_to_the_fastest(tokens, gpus):
    _, cost = model.choice(gpus, tokens)
    others = [strategy(gpus, tokens) for strategy in model.STRATEGIES.values()]
    fit = [other.seconds for other in others if other.under_way <= model.FITS]
    assert cost.under_way <= model.FITS and cost.seconds <= 1.02 * min(fit)
    assert cost.seconds >= model.alone(gpus, tokens).seconds
    assert f"| {model.named(tokens)} | {gpus} |" in model.cases()


def test_the_plot_is_that_of_the_docs(tmp_path):
    """Or run python bench/distributed_model.py."""
    pytest.importorskip("matplotlib")
    model.plot(tmp_path / "plot.svg")
    cells = (tmp_path / "plot.svg").read_text().count("<!-- +")
    assert cells == len(model.GPUS) * len(model.TOKENS)
    assert (model.DOCS / "context_parallel.svg").read_text().count("<!-- +") == cells
