"""The loss of each token, where its vocabulary is large."""

import math
from types import SimpleNamespace

import torch
from torch.nn.functional import cross_entropy

from extrope_kernels.evaluation import loss


def test_what_is_unlikely_counts_in_large_vocabularies(monkeypatch):
    """Of 2^17 tokens all but one are too unlikely to change a float32 sum one at a time."""
    vocab_size, rows, seqlen = 2**17, 2, 3
    config = SimpleNamespace(vocab_size=vocab_size)
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: config))
    predicted = torch.full((rows, seqlen - 1, vocab_size), math.log(2**-25))
    predicted[..., 7] = 0.0
    monkeypatch.setattr(loss, "run_body", lambda *_: None)
    monkeypatch.setattr(loss, "logits", lambda model, body, start, stop: predicted[:, start:stop])
    ids = torch.tensor([[7, 7, 7], [0, 7, 0]])

    def by_rows(logits):
        losses = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        return losses.unflatten(0, (rows, seqlen - 1))

    wanted, theirs = by_rows(predicted.double()), by_rows(predicted)
    got = loss.token_losses(model, ids)
    assert (got - wanted).abs().max() <= 2 * (theirs - wanted).abs().max()
