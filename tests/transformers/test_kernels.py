"""The folder that `make hub` writes: loaded by `kernels`, beside the package, and in a model."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import pytest
import tiny_models
import torch
from hf_models import CountOps

import extrope_kernels
from extrope_kernels import methods
from extrope_kernels._build import BuildError
from extrope_kernels.integrations.kernels.export import export
from extrope_kernels.testing import attention_backends, make_qk

kernels = pytest.importorskip("kernels")
pytestmark = pytest.mark.skipif("cpu" not in attention_backends(), reason="no CPU library to copy")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    command = [sys.executable, "-m", "extrope_kernels.integrations.kernels", str(folder)]
    subprocess.run(command, check=True)
    return folder


def test_every_variant_says_what_it_is(folder):
    found = {path.name: path for path in (folder / "build").iterdir()}
    assert sorted(found) == ["torch-cuda", f"torch-stable-abi211-cpu-{platform.machine()}-linux"]
    about = [json.loads((path / "metadata.json").read_text()) for path in found.values()]
    assert len({each["id"] for each in about}) == len(about)
    assert not list(found["torch-cuda"].rglob("*.so"))


def test_another_build_folder_is_left_alone(tmp_path):
    """As in a checkout, which keeps more under that name."""
    (tmp_path / "build/demo").mkdir(parents=True)
    with pytest.raises(BuildError, match="must hold variants alone, got demo"):
        export(tmp_path)
    assert (tmp_path / "build/demo").is_dir()


def test_rotates_beside_the_package(folder, monkeypatch):
    monkeypatch.setenv("EXTROPE_JIT", "0")  # the library is in the folder
    loaded = kernels.get_local_kernel(folder, backend="cpu")
    assert loaded.apply_rope_qk is not extrope_kernels.apply_rope_qk
    results, namespaces = [], []
    for package in (loaded, extrope_kernels):
        q, k = (x.requires_grad_() for x in make_qk(1, 7, 3, 2, 32))
        freqs = package.methods.yarn(32, factor=2.0, original_max_position_embeddings=64)
        with CountOps() as ops:
            out = package.apply_rope_qk(q, k, freqs, backend="cpu")
            grads = torch.autograd.grad(out, (q, k), [x + 1 for x in (q.detach(), k.detach())])
        results.append((*out, *grads))
        used = (name.split(".")[0] for name in ops.counts)
        namespaces.append({name for name in used if name.startswith("extrope")})
    assert namespaces[1] == {"extrope"} and namespaces[0].isdisjoint(namespaces[1])
    assert all(torch.equal(x, y) for x, y in zip(*results))
    assert torch.equal(loaded.methods.rope(8).inv_freq, methods.rope(8).inv_freq)


def logits_and_gradients(model, ids):
    model.zero_grad()
    logits = model(ids).logits
    logits.square().sum().backward()
    return logits.detach(), *(p.grad.clone() for p in model.parameters())


def test_kernelize_gives_a_llama_our_rotation(folder, monkeypatch):
    from transformers.models.llama import modeling_llama as llama

    if not hasattr(llama.apply_rotary_pos_emb, "kernel_layer_name"):
        # What transformers does by itself, where it knows this version of `kernels`.
        marked = kernels.use_kernel_forward_from_hub("rotary_pos_emb")(llama.apply_rotary_pos_emb)
        monkeypatch.setattr(llama, "apply_rotary_pos_emb", marked)
        own = llama.LlamaAttention.__init__
        monkeypatch.setattr(llama.LlamaAttention, "__init__", own)  # put back, as it is wrapped
        kernels.use_kernelized_func(marked)(llama.LlamaAttention)
    model = tiny_models.build("LlamaForCausalLM", num_key_value_heads=2).double()
    ids = torch.randint(3, 99, (2, 20), generator=torch.Generator().manual_seed(0))
    want = logits_and_gradients(model, ids)
    ours = kernels.LocalLayerRepository(repo_path=folder, layer_name="RotaryPosEmb")
    modes = {kernels.Mode.TRAINING: ours, kernels.Mode.INFERENCE: ours}
    with kernels.use_kernel_mapping({"rotary_pos_emb": {"cpu": modes}}):
        model = kernels.kernelize(model, mode=kernels.Mode.TRAINING, device="cpu")
    with CountOps() as ops:
        got = logits_and_gradients(model, ids)
    assert ops.of("extrope") == 2 * len(model.model.layers)  # forward and backward
    for x, y in zip(got, want):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12 * y.abs().max().item())
