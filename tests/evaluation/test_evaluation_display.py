"""What plots, heads of tables and progress bars show."""

from types import SimpleNamespace

import pytest

pytest.importorskip("transformers", minversion="5")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from extrope_kernels.evaluation import models, plots, report
from extrope_kernels.evaluation.runner import TASKS

ABOUT = {"model": "m", "texts": [{"name": "t"}], "dtype": "float32", "training_length": 8}
ABOUT |= {"bucket": 4, "distances": [2, 14]}


def lines_of(axes):
    """(x, y, standard error or None) of each point, by the label of its line."""
    found = {}
    for container in axes.containers:
        line, _, bars = container.lines
        ends = [segment[:, 1] for segment in bars[0].get_segments()] if container.has_yerr else None
        errors = [None] * 2 if ends is None else [(high - low) / 2 for low, high in ends]
        found[container.get_label()] = [*zip(*(x.tolist() for x in line.get_data()), errors)]
    return found


@pytest.mark.parametrize("task", ["loss", "recall"])
def test_lines_are_the_numbers_with_their_errors(monkeypatch, task):
    def row(method, length, *points):
        buckets = [
            {"start": x - 2, "stop": x + 2, "loss": y, "error": error} for x, y, error in points
        ]
        gains = [{"distance": x, "gain": y, "error": error} for x, y, error in points]
        return {"method": method, "length": length, "buckets": buckets, "gains": gains}

    both, alone, longer = (
        [(2, 3.0, 0.25), (14, 2.0, 0.5)],
        [(2, 1.0, None), (14, 4.0, None)],
        [(2, 5.0, 0.125), (14, 6.0, 0.25)],
    )
    rows = [row("a", 16, *both), row("b", 16, *alone), row("b", 32, *longer)]
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure))
    {"loss": plots.plot_loss, "recall": plots.plot_recall}[task](ABOUT | {"rows": rows}, None)
    first, second = map(lines_of, figures[0].axes)
    assert first == {"a": both, "b": alone} and second == {"b": longer}
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["a", "b"]


def test_heat_maps_are_the_shares(monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure))
    rows = [
        {"method": "a", "length": 8, "accuracy": [0.0, 1.0]},
        {"method": "a", "length": 16, "accuracy": [0.25, 0.5]},
    ]
    plots.plot_passkey(ABOUT | {"depths": [0.0, 1.0], "rows": rows}, None)
    image = figures[0].axes[0].images[0]
    assert image.get_array().tolist() == [[0.0, 0.25], [1.0, 0.5]]  # a line for each depth
    assert image.get_clim() == (0, 1)


def test_heads_of_buckets():
    ranges = [(0, 2048), (2048, 4096), (1024, 1536), (512, 1024), (512, 768)]
    heads = ["0-2k", "2-4k", "1024-1536", "512-1024", "512-768"]
    assert [report.range_label(*each) for each in ranges] == heads


@pytest.mark.parametrize("task", TASKS)
def test_progress_ends_at_the_end(folder, tokenizer, tmp_path, task):
    paths = [tmp_path / "first.txt", tmp_path / "second.txt"][: 1 if task == "passkey" else 2]
    for step, path in enumerate(paths, start=7):
        path.write_text("".join(chr(33 + (n * n // step) % 90) for n in range(800)))
    args = SimpleNamespace(text=list(map(str, paths)), trials=2, seed=0, bucket=64, depths=3)
    model = models.load_model(models.find_model(str(folder)), "float32", "cpu")
    made, ticks = TASKS[task](args, [480], tokenizer), []
    made.measure(model, 480, ticks.append)
    assert sum(ticks) == made.ticks(len(models.decoder_layers(model)))
