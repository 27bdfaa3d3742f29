"""What the search leaves out after a look at short pieces, and what it cannot rank."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers", minversion="5")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from tiny_model import TRAINED, retrained
from transformers import LlamaForCausalLM

from extrope_kernels.cli import main
from extrope_kernels.evaluation.search import stages
from extrope_kernels.evaluation.search.candidates import published, score_methods


def test_short_pieces_only_drop_what_is_far_behind():
    """The order is that of `published`, not theirs; what there was no time for is dropped, too."""
    yarn, *others = published(128, TRAINED, 4)
    losses = {others[0].name: 2.1, others[1].name: 1.9, others[2].name: 2.2, others[3].name: None}

    def mean_short(candidate, pieces, share):
        return 2.0 if candidate == yarn else losses.get(candidate.name, 9.0)

    search = SimpleNamespace(
        yarn=lambda: yarn,
        length=128,
        ladder=SimpleNamespace(trained=TRAINED, plain=[0.0] * 4),
        mean_short=mean_short,
    )
    assert stages.Search.grid(search) == [yarn, others[0], others[1]]
    losses.clear()
    assert stages.Search.grid(search) == [yarn]


def test_a_loss_that_is_no_number_is_told(folder, text, tmp_path, capsys):
    broken = retrained(folder, tmp_path)
    model = LlamaForCausalLM.from_pretrained(broken)
    model.model.norm.weight.data[0] = torch.nan
    model.save_pretrained(broken)
    command = f"search --model {broken} --text {text} --length 64 --device cpu --out {tmp_path}"
    assert main(command.split()) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "search: the loss under yarn factor=2 is nan, which ranks with no other"


@pytest.mark.parametrize("length", [6000, 16_384, 100_000])
def test_wide_groups_fill_three_quarters_of_the_distances(length):
    """Behind the window, half of those that the model knows; with a factor less they would not."""
    trained = 4096
    half = trained // 2
    grids = [each.params for each in score_methods(length, trained) if each.method == "self_extend"]
    wide = next(each for each in grids if each["window"] > trained // 4)
    window, factor = wide["window"], wide["factor"]
    assert window % factor == 0 and half - factor < window <= half
    assert (length - half) / factor <= (trained - half) * 3 / 4
    assert factor == 2 or (length - half) / (factor - 1) > (trained - half) * 3 / 4
