"""How the plugin goes in: not where it does not fit, and in nobody else's place."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from test_vllm_settings import RERO, YARN, config

import extrope_kernels
import extrope_kernels.integrations.vllm as integration

SCORE = {"score": RERO}
# A vLLM that has nothing of what is needed but its configuration.
CONFIG = """
class VllmConfig:
    def __init__(self, additional_config):
        self.additional_config = additional_config
        self.__post_init__()

    def __post_init__(self):
        self.complete = True
"""
SCRIPT = """
import logging
from extrope_kernels.integrations.vllm import register

logging.basicConfig(format="%(levelname)s %(name)s %(message)s")
register()
register()
import vllm
if hasattr(vllm, "config"):
    for additional in {}, {"other": 1}, {"extrope": {"method": "yarn", "factor": 4.0}}:
        try:
            print(vllm.config.VllmConfig(additional).complete)
        except RuntimeError as error:
            print(error)
"""


def run_with(files, folder):
    """What the script prints in a process whose vLLM is made of these files."""
    (folder / "vllm").mkdir()
    for name, text in files.items():
        (folder / "vllm" / name).write_text(text)
    paths = [str(folder), str(Path(extrope_kernels.__file__).parents[1])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), [
        line for line in done.stderr.splitlines() if line.startswith("WARNING vllm.extrope")
    ]


def test_another_vllm_is_left_alone(tmp_path):
    files = {"__init__.py": "__version__ = '0.99'\n", "config.py": CONFIG}
    (plain, other, refused), (warning,) = run_with(files, tmp_path)
    assert plain == other == "True"
    reason = "extrope: vLLM must have what the plugin builds on, got 0.99: No module named"
    assert refused.startswith(reason)
    assert warning == f"WARNING vllm.extrope {refused}"


@pytest.fixture
def bare(monkeypatch):
    """What vLLM is where no plugin was."""
    pytest.importorskip("vllm.version")  # this folder is a "vllm", too
    integration.register()
    from vllm.config import VllmConfig
    from vllm.model_executor.custom_op import op_registry_oot
    from vllm.v1.attention.backends import registry
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    monkeypatch.setattr(VllmConfig, "__post_init__", VllmConfig.__post_init__.__wrapped__)
    monkeypatch.delattr(WorkerWrapperBase, "load_model")
    with patch.dict(op_registry_oot, clear=True), patch.dict(registry._ATTN_OVERRIDES, clear=True):
        yield SimpleNamespace(
            registry=registry,
            layers=op_registry_oot,
            backends=registry.AttentionBackendEnum,
            overrides=registry._ATTN_OVERRIDES,
            config=VllmConfig,
            wrapper=WorkerWrapperBase,
        )


@pytest.mark.parametrize(
    ("where", "name"),
    [
        ("vllm.v1.attention.backends.registry", "register_backend"),
        ("vllm.model_executor.layers.rotary_embedding", "_ROPE_DICT"),
        ("vllm.v1.worker.worker_base", "WorkerWrapperBase"),
    ],
)
def test_nothing_is_registered_where_something_is_missing(bare, monkeypatch, where, name):
    complete = bare.config.__post_init__
    monkeypatch.delattr(f"{where}.{name}")
    integration.register()
    assert not bare.layers and not bare.overrides and "load_model" not in vars(bare.wrapper)
    assert bare.config.__post_init__.__wrapped__ is complete
    assert bare.config().additional_config == {}
    with pytest.raises(RuntimeError, match=f"^extrope: vLLM must have .*{name}"):
        bare.config(additional_config={"extrope": YARN})


def test_a_second_call_does_nothing(bare):
    integration.register()
    found = dict(bare.layers), dict(bare.overrides), bare.config.__post_init__
    load = bare.wrapper.load_model
    integration.register()
    assert found == (bare.layers, bare.overrides, bare.config.__post_init__)
    assert bare.wrapper.load_model is load


@pytest.fixture
def platform(monkeypatch):
    """Sets what vLLM takes the machine for."""
    pytest.importorskip("vllm.version")
    import vllm.platforms

    def change(name):
        there = SimpleNamespace(
            is_cpu=lambda: name == "cpu", is_cuda=lambda: name == "cuda", device_name=name
        )
        monkeypatch.setattr(vllm.platforms, "current_platform", there)

    return change


def chosen(extrope, backend=None, per_kind=None):
    """The attention backend of an engine."""
    from extrope_kernels.integrations.vllm.plugin import choose_backend

    attention = SimpleNamespace(backend=backend, backend_per_kind=per_kind or {})
    choose_backend(config(extrope, attention_config=attention))
    return attention.backend


@pytest.mark.parametrize(("device", "name"), [("cpu", "CPU_ATTN"), ("cuda", "CUSTOM")])
def test_backends_of_other_plugins_stay(bare, platform, device, name):
    bare.registry.register_backend(bare.backends[name], "another.Backend")
    integration.register()
    assert bare.backends[name].get_path() == "another.Backend"
    platform(device)
    assert chosen(YARN) is chosen(None) is None
    message = f"^extrope: vLLM's attention backend {name} must be extrope.* got another.Backend"
    with pytest.raises(ValueError, match=message):
        chosen(SCORE)


def test_backend_of_a_score_method(bare, platform):
    integration.register()
    platform("cpu")
    assert chosen(SCORE) is None
    platform("cuda")
    assert chosen(SCORE) is chosen(SCORE, bare.backends.CUSTOM) is bare.backends.CUSTOM
    assert chosen(YARN | {"cache": "raw"}) is bare.backends.CUSTOM
    for backend, per_kind in ((bare.backends.FLASH_ATTN, {}), (None, {"full_attention": "B12X"})):
        with pytest.raises(ValueError, match=r"^extrope: .* must be left to the plugin .* got "):
            chosen(SCORE, backend, per_kind)
    platform("tpu")
    with pytest.raises(ValueError, match=r"^extrope: .* must run on CPUs or NVIDIA GPUs, got tpu"):
        chosen(SCORE)
    assert chosen(YARN) is None


def test_caches_of_a_score_method_on_any_cpu(bare, monkeypatch):
    """vLLM's own kernels take fp8 where a CPU has AVX-512 alone."""
    from extrope_kernels.integrations.vllm import cpu

    for name in "_is_amx_tile_supported", "_is_avx512_supported":
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    monkeypatch.setattr(cpu, "get_current_vllm_config_or_none", lambda: config(SCORE))
    taken = [None, "auto", "float16", "bfloat16", "fp8", "fp8_e4m3"]
    assert all(cpu.ScoreBackend.supports_kv_cache_dtype(name) for name in taken)
    assert not cpu.ScoreBackend.supports_kv_cache_dtype("fp8_e5m2")


@pytest.mark.parametrize("extrope", [YARN, SCORE], ids=["yarn", "rerope"])
def test_models_that_rotate_by_themselves_are_refused(bare, extrope):
    from extrope_kernels.integrations.vllm.plugin import check_model

    model = torch.nn.Linear(2, 2)
    check_model(config(None), lambda: model, first=True)
    with pytest.raises(ValueError, match=r"^extrope: .* by vLLM's rotary layer, got none"):
        check_model(config(extrope), lambda: model, first=True)


def test_a_layer_that_an_encoder_rotates_by_as_well_is_refused(bare):
    from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding

    from extrope_kernels.integrations.vllm.plugin import check_model

    model, rotary = torch.nn.ModuleDict(), RotaryEmbedding.__new__(RotaryEmbedding)
    torch.nn.Module.__init__(rotary)
    for name in "tower", "text":
        model[name] = torch.nn.ModuleDict({"rotary": rotary})
    model.get_language_model = lambda: model["text"]
    with pytest.raises(ValueError, match=r"^extrope: .* one that ModuleDict rotates by as well"):
        check_model(config(YARN, {}, {"is_multimodal_model": True}), lambda: model, first=True)


def test_a_step_by_the_table_is_left_to_the_layer(bare, monkeypatch):
    """As Qwen3-Next has one on a GPU: our layers have no table."""
    integration.register()
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding

    from extrope_kernels.integrations.vllm import rotary

    ours = config(YARN)
    monkeypatch.setattr(rotary, "get_current_vllm_config_or_none", lambda: ours)
    attention = torch.nn.Module()
    with set_current_vllm_config(VllmConfig()):
        attention.rotary_emb = RotaryEmbedding(32, 32, 128, 1e4, True, torch.float32)
    attention.use_fused_qk_norm_rope_gate = True
    rotary.extend_model(torch.nn.ModuleList([attention]), rotary.engine_of(ours))
    assert not hasattr(attention.rotary_emb, "cos_sin_cache")
    assert attention.use_fused_qk_norm_rope_gate is False
