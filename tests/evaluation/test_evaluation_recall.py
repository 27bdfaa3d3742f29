"""What a passage gains by having been read before, by how far back that was."""

from itertools import pairwise

import pytest
import torch
from tiny_model import results

from extrope_kernels.evaluation import UsageError, loss, recall


@pytest.mark.parametrize("longest", (480, 997, 16_384, 32_768))
def test_passages_come_again_at_their_distances(longest):
    wanted, passage = recall.distances(longest)
    assert 2 <= passage <= 64 and max(wanted) + 3 * passage < longest
    for length in (longest, longest // 2, longest // 3):
        found = recall.repeats(length, wanted, passage)
        fitting = [distance for distance in wanted if distance + 3 * passage < length]
        assert [repeat.distance for repeat in found] == [d for d in fitting for _ in range(3)]
        others = -1 - torch.arange(passage * len(found))
        ids = recall.repeated(torch.cat([torch.arange(length), others]), length, found)
        for repeat, other in zip(found, others.split(passage)):
            assert repeat.again - repeat.first == repeat.distance and repeat.first >= 1
            for start in (repeat.first, repeat.again):
                assert torch.equal(ids[start : start + passage], other)
        assert (ids < 0).sum() == 2 * len(others)  # no two passages share a place


def test_gains_are_differences_of_losses():
    """Of the last three quarters of a passage; entry t is the loss of token t + 1."""
    losses = torch.zeros(99)
    losses[9 + 3 : 9 + 12] = 5.0
    losses[9 + 3] = 14.0  # the first that counts: 6 of nine
    losses[79 + 3 : 79 + 12] = 3.0
    losses[79 : 79 + 3] = 100.0
    assert recall.gains(losses, [recall.Repeat(70, 10, 80, 12)]) == [3.0]


def test_too_short(run, capsys):
    with pytest.raises(UsageError, match="lengths 400: recall needs 480 tokens"):
        recall.distances(400)
    assert run(task="recall", lengths="480") == 2
    assert "240 tokens, too short for 510" in capsys.readouterr().err


@pytest.fixture
def numbers(tmp_path):
    text = tmp_path / "numbers.txt"
    text.write_text("".join(chr(33 + (n * n // 7) % 90) for n in range(800)))
    return text


def test_a_model_that_copies_gains(run, numbers, tmp_path, monkeypatch, capsys):
    """A stand-in for the losses that knows every pair of tokens it has had before."""

    def copies(ids):
        seen, losses = set(), []
        for last in pairwise(ids):
            losses.append(0.5 if last in seen else 4.0)
            seen.add(last)
        return losses

    monkeypatch.setattr(
        loss, "token_losses", lambda model, ids: torch.tensor([*map(copies, ids.tolist())])
    )
    given = {"task": "recall", "text": numbers, "lengths": "300,600", "trials": 2}
    assert run(methods="rope,pi", **given) == 0
    found = results(tmp_path, "recall")
    assert found["distances"] == [37, 74, 148, 296, 555] and found["passage"] == 2
    short, long = found["rows"][:2]
    assert [gain["distance"] for gain in long["gains"]] == found["distances"]
    assert [gain["distance"] for gain in short["gains"]] == found["distances"][:3]
    for row in found["rows"]:
        for gain in row["gains"]:
            assert len(gain["passages"]) == 3 * 2
            assert gain["gain"] == pytest.approx(sum(gain["passages"]) / 6)
            assert gain["error"] is not None and gain["gain"] > 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["method", "tokens", "37", "74", "148", "296", "555"]


def test_of_a_model(run, numbers, tmp_path):
    assert run(task="recall", text=numbers, methods="rope,rerope", lengths="480") == 0
    rows = results(tmp_path, "recall")["rows"]
    assert all(abs(gain["gain"]) < 20 for row in rows for gain in row["gains"])
    assert rows[0]["gains"] != rows[1]["gains"]
