"""The cells of bench/ruler.py: which samples come next, what is kept, what a table says of them."""

import shlex
import sys

import pytest
import ruler

from extrope_kernels.evaluation import UsageError

CELL = ruler.Cell("niah_single_1", 4096, "90cb0bfff726", "rerope", "window=4096")


def test_intervals_of_shares_are_wilsons():
    # Brown, Cai and DasGupta (2001): 0 of 10 up to 0.278, 5 of 10 from 0.237 to 0.763.
    for hits, low, high in ((0, 0.0, 0.2775), (5, 0.2366, 0.7634), (10, 0.7225, 1.0)):
        cell = CELL._replace(scores=(1.0,) * hits + (0.0,) * (10 - hits))
        assert ruler.interval(cell) == pytest.approx((low, high), abs=1e-4)
    assert ruler.share(cell) == "100% of 10 (72-100)"


def test_cells_go_on_together_from_what_is_kept(tmp_path):
    other = CELL._replace(method="yarn", parameters="factor=2")
    path = tmp_path / "tiny.csv"
    assert ruler.read(path) == []
    ruler.write(path, [other, CELL._replace(scores=(1.0, 0.4, 0.0))])
    kept = {cell.key: cell for cell in ruler.read(path)}
    assert kept[CELL.key].scores == (1.0, 0.4, 0.0) and kept[other.key].scores == ()
    steps = []
    for cell, upto in ruler.missing(kept, [CELL, other], 5):
        steps.append((cell.method, len(cell.scores), upto))
        kept[cell.key] = cell._replace(scores=(0.0,) * upto)
    assert steps == [
        ("yarn", 0, 2), ("rerope", 3, 4), ("yarn", 2, 4), ("rerope", 4, 5), ("yarn", 4, 5)
    ]  # fmt: skip


def test_a_process_keeps_what_others_measured_meanwhile(tmp_path):
    other, path = CELL._replace(method="yarn", scores=(1.0,)), tmp_path / "ruler" / "tiny.csv"
    ruler.keep(path, other)
    ruler.keep(path, CELL._replace(scores=(1.0, 0.0, 1.0)))
    kept = ruler.keep(path, CELL._replace(scores=(1.0, 0.0)))  # began before the third was known
    assert kept[CELL.key].scores == (1.0, 0.0, 1.0) and kept[other.key] == other
    assert ruler.read(path) == sorted(kept.values())


def test_scores_of_other_samples_are_not_mixed():
    ruler.check_samples(CELL, [CELL, CELL._replace(length=8192, samples="others")])
    with pytest.raises(UsageError, match=r"niah_single_1, 4,096 tokens, are 90cb.* and others in"):
        ruler.check_samples(CELL, [CELL._replace(samples="others")])


@pytest.mark.parametrize(("method", "given"), ruler.METHODS["smollm2"])
def test_the_command_of_a_cell_is_read_as_it_is_measured(method, given, monkeypatch):
    cli = pytest.importorskip("lm_eval.__main__").HarnessCLI
    cell = ruler.Cell("niah_single_1", 4096, "", *ruler.names(method, given), (1.0,) * 50)
    _, _, command = ruler.command(cell).partition(" -m ")
    monkeypatch.setattr(sys, "argv", shlex.split(command.replace("\\\n", "")))
    read = cli().parse_args()
    own = {"method": method, **given} if method else {}
    about = {"pretrained": "$MODEL", "dtype": "bfloat16", "attn_implementation": "extrope"}
    assert read.model_args == about | own
    assert (read.tasks, read.metadata) == (["niah_single_1"], {"max_seq_lengths": [4096]})
    assert (read.gen_kwargs, read.limit) == ({"max_gen_toks": 48}, 50)
