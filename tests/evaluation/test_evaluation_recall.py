"""What a passage gains by having been read before, by how far back that was."""

import pytest
import torch

pytest.importorskip("transformers", minversion="5")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from tiny_model import check_image, results

from extrope_kernels.evaluation import UsageError, loss, recall


@pytest.mark.parametrize("longest", (160, 333, 16_384, 32_768))
def test_passages_come_again_at_their_distances(longest):
    wanted, passage = recall.distances(longest)
    assert 2 <= passage <= 64 and max(wanted) + passage < longest
    for length in (longest, longest // 2, longest // 3):
        found = recall.repeats(length, wanted, passage)
        assert [repeat.distance for repeat in found] == [d for d in wanted if d + passage < length]
        ids = recall.repeated(torch.arange(length), found)
        end = length - passage * len(found)
        assert torch.equal(ids[:end], torch.arange(end))
        for repeat in found:
            assert repeat.again - repeat.first == repeat.distance and repeat.first >= 1
            assert repeat.first + passage <= end
            first, again = (ids[at : at + passage] for at in (repeat.first, repeat.again))
            assert torch.equal(first, again)


def test_gains_are_differences_of_losses():
    """Of the last three quarters of a passage; entry t is the loss of token t + 1."""
    losses = torch.zeros(99)
    losses[9 + 2 : 9 + 8] = 5.0
    losses[79 + 2 : 79 + 8] = 3.0
    losses[79 : 79 + 2] = 100.0
    assert recall.gains(losses, [recall.Repeat(70, 10, 80, 8)]) == [2.0]


def test_too_short():
    with pytest.raises(UsageError, match="--lengths 100: recall needs 160 tokens"):
        recall.distances(100)


def test_a_model_that_copies_gains(run, tmp_path, monkeypatch, capsys):
    """A stand-in for the losses that knows every pair of tokens it has had before."""

    def copies(model, ids, on_progress):
        seen, losses = set(), []
        for pair in zip(ids[:-1].tolist(), ids[1:].tolist()):
            losses.append(0.5 if pair in seen else 4.0)
            seen.add(pair)
        return torch.tensor(losses)

    text = tmp_path / "text.txt"
    text.write_text("".join(chr(33 + (n * n // 7) % 90) for n in range(400)))
    monkeypatch.setattr(loss, "token_losses", copies)
    assert run(task="recall", text=text, methods="rope,pi", lengths="80,160", trials=2) == 0
    found = results(tmp_path, "recall")
    assert found["distances"] == [10, 20, 40, 80, 150] and found["passage"] == 2
    short, long = found["rows"][:2]
    assert [gain["distance"] for gain in long["gains"]] == found["distances"]
    assert [gain["distance"] for gain in short["gains"]] == [10, 20, 40]
    for row in found["rows"]:
        assert len(row["pieces"]) == 2
        for gain, *of_pieces in zip(row["gains"], *row["pieces"]):
            assert gain["gain"] == pytest.approx(sum(of_pieces) / 2)
            assert set(of_pieces) <= {0.0, 3.5, 1.75} and gain["error"] is not None
    assert max(gain["gain"] for gain in long["gains"]) > 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["method", "tokens", "10", "20", "40", "80", "150"]
    check_image(tmp_path / "out" / "recall.png")


def test_of_a_model(run, text, tmp_path):
    assert run(task="recall", methods="rope,rerope", lengths="160") == 0
    rows = results(tmp_path, "recall")["rows"]
    assert all(abs(gain["gain"]) < 20 for row in rows for gain in row["gains"])
    assert rows[0]["gains"] != rows[1]["gains"]
