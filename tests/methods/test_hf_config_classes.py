"""`from_hf_config` against every rotary embedding of the installed transformers, to the bit.

A class is built from a configuration of its own: the defaults, and every rope type that the class
takes. Compared are its tables of frequencies, or where positions have several axes its cosines.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version

from extrope_kernels.methods import from_hf_config

transformers = pytest.importorskip("transformers")
rope_utils = import_module("transformers.modeling_rope_utils")
KNOWN_TYPES = {"default", *rope_utils.ROPE_INIT_FUNCTIONS}
MODELS = Path(find_spec("transformers").origin).parent / "models"
ROTARY = re.compile(r"^class (\w*RotaryEmbedding)\(", re.MULTILINE)
FILES = {
    path.parent.name: path.stem
    for path in sorted(MODELS.glob("*/modeling_*.py"))
    if ROTARY.search(path.read_text()) and "compute_" in path.read_text()
}
# All take minutes. These read what no other does, or are read most.
READ_MOST = ("llama", "gemma3", "gemma4", "deepseek_v3", "deepseek_v4", "phi3", "gpt_neox", "glm")
READ_MOST += ("qwen2_vl", "qwen3_vl", "gpt_oss", "stablelm", "ernie4_5_vl_moe", "dinov3_vit")


def each(quick):
    """Every model, those that are not `quick` in a thorough run."""
    thorough = pytest.mark.thorough
    models = [x if x in quick else pytest.param(x, marks=thorough) for x in FILES]
    return pytest.mark.parametrize("model", models)


DEFAULT = {"rope_type": "default", "rope_theta": 1e6}
FACTORS = [1.0 + 0.25 * i for i in range(512)]
LENGTH = {"original_max_position_embeddings": 1024}
YARN = {"rope_type": "yarn", "factor": 4.0, **LENGTH}
# Rope parameters by name; factors are cut to the number of pairs.
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "dynamic, alpha": {"rope_type": "dynamic", "factor": 1.0, "alpha": 1000.0},
    "yarn": YARN,
    "yarn, mscale": {**YARN, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.707},
    "yarn, to the pair by null": {**YARN, "truncate": None},
    "yarn, to the pair": {**YARN, "truncate": False, "beta_fast": 16.0, "beta_slow": 2.0},
    "yarn, attention_factor": {**YARN, "attention_factor": 1.25},
    "yarn, shorter": {**YARN, "factor": 0.5},
    "yarn, mscale alone": {**YARN, "mscale": 0.707},
    "yarn, a step": {**YARN, "beta_fast": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0},  # Kimi K2
    "yarn, a step within a pair": {**YARN, "beta_fast": 1.0, "truncate": False},
    "yarn, mscale_all_dim 0": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.0},
    "longrope": {"rope_type": "longrope", **LENGTH, "factor": 8.0},
    "longrope, shorter": {"rope_type": "longrope", **LENGTH, "factor": 0.5},
    "longrope, attention_factor": {
        "rope_type": "longrope", **LENGTH, "factor": 8.0, "attention_factor": 1.5,
    },
    "llama3, a step": {  # Llama 4 Scout
        "rope_type": "llama3", "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0,
        **LENGTH,
    },
    "llama3, wide": {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 0.5, "high_freq_factor": 32.0,
        **LENGTH,
    },
    "proportional, none": {"rope_type": "proportional", "partial_rotary_factor": 0.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        **LENGTH,
    },
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.25},
    "proportional, linear": {"rope_type": "proportional", "factor": 3.0},
}  # fmt: skip
# Defaults that no checkpoint has: an odd rotary dimension, layer types without parameters.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "CohereCompassTextConfig": {
        "rope_parameters": {"full_attention": DEFAULT, "sliding_attention": DEFAULT}
    },
    "Glm4MoeConfig": {"head_dim": 128},
    "Glm4vMoeTextConfig": {"head_dim": 128},
    "Qwen3OmniMoeTextConfig": {"head_dim": 128},
}
# What cannot be read, and the reason that is given.
REFUSED = {
    "EfficientLoFTRRotaryEmbedding": "efficientloftr cannot be read: its frequencies run through",
    "EomtDinov3RotaryEmbedding": "eomt_dinov3 cannot be read: it rotates by coordinates",
    "Gemma4VisionRotaryEmbedding": "gemma4_vision cannot be read: it pairs dims within the half",
}
# Faults of transformers itself, and the version without them.
FAULTS = {
    "bamba": ("5.18", "it rotates whole heads, whatever partial_rotary_factor says"),
    "ernie4_5_vl_moe": ("5.3", "its classes have other names, and its rotary embedding no types"),
    "qwen3_omni_moe": ("5.1", "its configuration cannot be built"),
}
# Classes whose configuration lacks what transformers' functions of the other types read.
DEFAULT_ONLY = {"MusicFlamingoRotaryEmbedding"}
# Its table is in the order of its sections, and of its default type alone.
REORDERED = {"Ernie4_5_VLMoeTextRotaryEmbedding"}


@dataclass(frozen=True)
class Site:
    """A rotary embedding, and the configuration that it was built from."""

    config: Any
    module: torch.nn.Module

    @property
    def name(self) -> str:
        return type(self.module).__name__

    @property
    def axes(self) -> int:
        """How many axes its positions have."""
        source = inspect.getsource(type(self.module))
        if "compute_axial_rope_parameters" in source:
            return 3 if "per axis based application (THW)" in source else 2
        found = re.search(r"position_ids\.expand\((\d)", source)
        return int(found[1]) if found else 1

    def tables(self) -> Iterator[tuple[str | None, torch.Tensor, float]]:
        """The layer types, their frequencies and their factors."""
        for name, table in self.module.named_buffers():
            if name.endswith("inv_freq") and "original" not in name:
                prefix = name.removesuffix("inv_freq")
                factor = getattr(self.module, f"{prefix}attention_scaling", 1.0)
                yield prefix.removesuffix("_") or None, table, factor


def sites(model: str) -> Iterator[Site]:
    mended, fault = FAULTS.get(model, ("5", ""))
    if Version(transformers.__version__) < Version(mended):
        pytest.skip(f"{model} before transformers {mended}: {fault}")
    module = import_module(f"transformers.models.{model}.{FILES[model]}")
    for name in ROTARY.findall(Path(module.__file__).read_text()):
        rotary = getattr(module, name)
        if "config" not in inspect.signature(rotary).parameters:
            continue
        if {"compute_default_rope_parameters", "compute_axial_rope_parameters"} & {*dir(rotary)}:
            yield built(rotary, module)


def built(rotary: type, module: Any) -> Site:
    config_class = inspect.signature(rotary).parameters["config"].annotation
    if isinstance(config_class, str):
        config_class = getattr(module, config_class)
    errors = []
    for config in configurations(config_class):
        try:
            return Site(config, rotary(config))
        except (AttributeError, KeyError, TypeError) as error:
            errors.append(error)
    raise AssertionError(f"{rotary.__name__}: {errors}")


def fresh(config_class: type) -> Any:
    try:
        return config_class(**deepcopy(ARGUMENTS.get(config_class.__name__, {})))
    except ImportError as error:  # old versions want timm at once
        pytest.skip(f"{config_class.__name__}: {error}")


def configurations(config_class: type) -> Iterator[Any]:
    """A configuration and those inside it: annotations name the whole model's now and then."""
    config = fresh(config_class)
    yield config
    for name in config.sub_configs:
        if (inner := getattr(config, name, None)) is not None:
            yield from configurations(type(inner))


def assert_same(freqs, table, factor):
    assert torch.equal(freqs.inv_freq.view(torch.int32), table.view(torch.int32))
    assert freqs.attention_factor == factor


def with_sections(site: Site) -> Site:
    """The site with an mrope_section of its number of pairs, where it takes one."""
    if not hasattr(site.module, "mrope_section"):
        return site
    parameters = site.config.rope_parameters
    for layer_type, table, _ in site.tables():
        third = len(table) // 3
        sections = [len(table) - 2 * third, third, third]
        if site.name.startswith("Ernie"):  # time is its last section
            sections.reverse()
        own = parameters if layer_type is None else parameters[layer_type]
        own["mrope_section"] = sections
    return Site(site.config, type(site.module)(site.config))


def assert_same_cosines(site: Site, layer_type: str | None, freqs) -> None:
    """The class's own forward at positions by axis, whichever way it pairs the dims."""
    generator = torch.Generator().manual_seed(0)
    positions = torch.randint(0, 1000, (site.axes, 1, 7), generator=generator)
    given = positions[:, 0].T if "axial" in site.module.rope_type else positions
    options = {} if layer_type is None else {"layer_type": layer_type}
    cos, sin = site.module(torch.zeros(1), given, **options)
    angles = positions[freqs.axes.long(), 0].T.float() * freqs.inv_freq
    for got, expected in ((cos, angles.cos()), (sin, angles.sin())):
        got, expected = got.reshape(7, -1), expected * freqs.attention_factor
        halves, turns = torch.cat((expected, expected), -1), expected.repeat_interleave(2, -1)
        assert torch.equal(got, halves) or torch.equal(got, turns)


@each(READ_MOST)
def test_defaults(model):
    for site in sites(model):
        several = site.axes > 1 and site.name not in REFUSED
        site = with_sections(site) if several else site
        for layer_type, table, factor in site.tables():
            if site.name in REFUSED:
                with pytest.raises(ValueError, match=REFUSED[site.name]):
                    from_hf_config(site.config, layer_type=layer_type)
                continue
            freqs = from_hf_config(site.config, layer_type=layer_type)
            if several:
                assert_same_cosines(site, layer_type, freqs)
                continue
            assert_same(freqs, table, factor)
            stored = from_hf_config(site.config.to_dict(), layer_type=layer_type)
            assert_same(stored, table, factor)


@each(("llama", "gemma3", "phi3", "deepseek_v3"))
def test_every_rope_type(model):
    for site in sites(model):
        if site.name in {*REFUSED, *DEFAULT_ONLY, *REORDERED}:
            continue
        if "ROPE_INIT_FUNCTIONS" not in inspect.getsource(type(site.module)):
            continue
        for name, parameters in VARIANTS.items():
            compare(site, name, parameters)


def compare(site: Site, name: str, parameters: dict[str, Any]) -> None:
    if "alpha" in parameters and "ntk_alpha" not in inspect.getsource(type(site.module)):
        return
    if parameters["rope_type"] not in KNOWN_TYPES:
        return
    config = fresh(type(site.config))
    # None, which some of transformers' functions take for a number.
    if not getattr(config, "is_heterogeneous", False) and getattr(config, "head_dim", 0) is None:
        config.head_dim = config.hidden_size // config.num_attention_heads
    config.rope_parameters = with_variant(site, parameters)
    module = type(site.module)(config)
    other = Site(config, module)
    for layer_type, table, factor in other.tables():
        assert_same(from_hf_config(config, layer_type=layer_type), table, factor)
        if name in ("dynamic", "longrope"):
            options = {} if layer_type is None else {"layer_type": layer_type}
            for seq_len in (7, 3 * config.max_position_embeddings):
                expected = rope_utils.ROPE_INIT_FUNCTIONS[name](config, "cpu", seq_len, **options)
                assert_same(from_hf_config(config, seq_len, layer_type=layer_type), *expected)


def with_variant(site: Site, parameters: dict[str, Any]) -> dict[str, Any]:
    """The configuration's rope parameters with another type, for every layer type it has."""
    own = site.config.rope_parameters
    tables = {layer_type: len(table) for layer_type, table, _ in site.tables()}

    def changed(old: dict[str, Any], pairs: int) -> dict[str, Any]:
        names = {"rope_theta", "partial_rotary_factor"} & {*old}
        kept = {"rope_theta": 1e6} | {name: old[name] for name in names}
        types = {old["rope_type"], parameters["rope_type"]}
        unheeded = "default" in types and "partial_rotary_factor" not in inspect.getsource(
            type(site.module)
        )
        if unheeded or "proportional" in types:
            kept.pop("partial_rotary_factor", None)
        factors = {}
        if parameters["rope_type"] == "longrope":
            factors = {"short_factor": FACTORS[:pairs], "long_factor": FACTORS[-pairs:]}
        return kept | parameters | factors

    if None in tables:
        return changed(own, tables[None])
    return own | {layer_type: changed(own[layer_type], n) for layer_type, n in tables.items()}


def test_patches_of_llama_4():
    modeling = import_module("transformers.models.llama4.modeling_llama4")
    config = transformers.Llama4VisionConfig()
    table = modeling.Llama4VisionRotaryEmbedding(config).freqs_ci[:-1, 0]  # but for the class token
    freqs = from_hf_config(config)
    side = config.image_size // config.patch_size
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    positions = torch.stack((rows.flatten(), columns.flatten())) + 1
    angles = positions[freqs.axes.long()].T * freqs.inv_freq
    assert torch.equal(table, torch.view_as_complex(torch.stack((angles.cos(), angles.sin()), -1)))


def test_every_type_of_transformers_is_tried():
    tried = {parameters["rope_type"] for parameters in VARIANTS.values()}
    newest = Version(transformers.__version__) >= Version("5.24")
    assert tried == KNOWN_TYPES if newest else tried >= KNOWN_TYPES
    assert len(FILES) > (150 if newest else 90)
