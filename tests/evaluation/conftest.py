"""A tiny model on disk, a text, and the evaluation command on them."""

from importlib.util import find_spec

import pytest
import torch

from extrope_cli import main
from extrope_kernels.evaluation import plots

# What the demo extra brings.
if not all(map(find_spec, ("matplotlib", "transformers"))):
    collect_ignore_glob = ["test_*"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tiny Llama and a tokenizer whose tokens are characters."""
    from tiny_model import CONFIG, save_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**CONFIG)).save_pretrained(path)
    save_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text("The quick brown fox, at 7 o'clock, jumps over 13 lazy dogs.\n" * 4)
    return path


@pytest.fixture
def tokenizer(folder):
    from extrope_kernels.evaluation.models import find_model, load_tokenizer

    return load_tokenizer(find_model(str(folder)))


@pytest.fixture
def run(folder, text, tmp_path, monkeypatch):
    """Runs the command with defaults for what a test does not name; returns its exit code.

    Without plots, which take most of the time, unless a test asks for them.
    """

    def call(plot=False, **given):
        if not plot:
            with monkeypatch.context() as patch:
                patch.setattr(plots, "available", lambda: False)
                return call(plot=True, **given)
        defaults = {"model": folder, "text": text, "lengths": "64", "methods": "rope"}
        more = {"bucket": 16, "trials": 1, "out": tmp_path / "out", "device": "cpu"}
        words = [
            f"--{name}={value}"
            for name, values in (defaults | more | given).items()
            if values is not None
            for value in (values if isinstance(values, list) else [values])
        ]
        try:
            return main(["eval", *words])
        except SystemExit as error:  # of an option that cannot be read
            return error.code

    return call
