"""What an extended model over a mesh refuses, and a model without one in torch's region."""

from __future__ import annotations

import pytest
import torch
from test_context_parallel_models import METHODS, SEQLEN, built, extended, inputs
from torch.distributed.device_mesh import init_device_mesh

from extrope_kernels import distributed


def refuses_forward(mesh, message, method, given):
    model = built("LlamaForCausalLM")
    ids = distributed.shard(inputs()[0], mesh)
    with extended(model, method, mesh=mesh, **METHODS[method]):
        with pytest.raises(ValueError, match=f"extend: {message}"):
            model(**{"input_ids": ids, **given})
        model(input_ids=ids)
    with extended(model, method, **METHODS[method]):  # restored, it takes all of that
        model(input_ids=ids, labels=ids, use_cache=True)


IDS = torch.arange(48).view(2, 24)
FORWARDS = {
    "cache": ({"use_cache": True}, "a model over a mesh must run without a cache"),
    "padding": (
        {"attention_mask": torch.ones(2, 24).tril(20)},
        "a model over a mesh must have rows without padding",
    ),
    "positions": (
        {"position_ids": torch.arange(24)[None]},
        "position_ids must be those of `distributed.local_positions` with balance='zigzag'",
    ),
    "odd": ({"input_ids": IDS[:, 1:]}, "input_ids must have an even number .* in zigzag, got 23"),
    "labels": ({"labels": IDS}, "labels must come with shift_labels over a mesh"),
}


@pytest.mark.parametrize("method", ["yarn", "rerope"])
@pytest.mark.parametrize("wrong", FORWARDS)
def test_refuses(ranks, wrong, method):
    given, message = FORWARDS[wrong]
    ranks.run(refuses_forward, 2, given=given, message=message, method=method)


def refuses_to_generate(mesh):
    model = built("LlamaForCausalLM")
    for method in ("yarn", "rerope"):
        with (
            extended(model, method, mesh=mesh, **METHODS[method]),
            pytest.raises(ValueError, match="must run without a cache, got one; restore it"),
        ):
            model.generate(inputs()[0][:1, :8], max_new_tokens=2)


def test_refuses_to_generate(ranks):
    ranks.run(refuses_to_generate, 2)


def refuses_model(mesh, name, message):
    with pytest.raises(ValueError, match=message):
        extended(built(name), "yarn", factor=4.0, mesh=mesh)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Qwen3_5", "all that makes one token of others must be attention that an op replaces"),
        ("Llama4", "sees chunks, which a mesh does not have"),
    ],
)
def test_refuses_models(ranks, name, message):
    name, transformers = f"{name}ForCausalLM", pytest.importorskip("transformers")
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    ranks.run(refuses_model, 2, name=name, message=message)


def refuses_arguments(mesh):
    grid = init_device_mesh("cpu", (1, 1, 2), mesh_dim_names=("a", "b", "c"))
    for given, error, message in (
        ({"mesh": "cp"}, TypeError, "mesh must be a DeviceMesh or a ProcessGroup, got str"),
        ({"mesh": grid}, ValueError, "mesh must have 1 or 2 dimensions, got 3"),
        ({"mesh": mesh, "strategy": "tree"}, ValueError, "strategy must be one of .*, got 'tree'"),
        ({"mesh": mesh, "balance": "tail"}, ValueError, "balance must be 'zigzag' or None"),
        ({"mesh": mesh, "strategy": "ulysses"}, ValueError, "q's heads must be a multiple of"),
    ):
        heads = 3 if given.get("strategy") == "ulysses" else 4
        model = of_heads(heads)
        with pytest.raises(error, match=f"extend: {message}"):
            extended(model, "rope", **given)
        model(input_ids=inputs()[0])  # as it was
    model = of_heads(4)
    with (
        extended(model, "yarn", factor=4.0, mesh=mesh),
        pytest.raises(ValueError, match="over a mesh must be the last, got rerope after yarn"),
    ):
        extended(model, "rerope", window=8, mesh=mesh)


def of_heads(heads):
    from tiny_models import tiny_config
    from transformers import LlamaConfig, LlamaForCausalLM

    config = tiny_config(LlamaConfig)
    config.num_attention_heads = config.num_key_value_heads = heads
    return LlamaForCausalLM._from_config(config)


def test_refuses_arguments(ranks):
    ranks.run(refuses_arguments, 2)


def refuses_region(mesh, method, positions, message):
    """Torch's region shards what it is given in place, and knows nothing of other attentions."""
    from torch.distributed.tensor.experimental import context_parallel

    given = {"input_ids": inputs()[0]}
    if positions:
        given["position_ids"] = torch.arange(SEQLEN).repeat(2, 1)
    model, buffers = built("LlamaForCausalLM"), list(given.values())
    with extended(model, method, **METHODS[method]):
        with (
            context_parallel(mesh, buffers=buffers, buffer_seq_dims=[1] * len(buffers)),
            pytest.raises(ValueError, match=f"must be extended with a mesh.*{message}"),
        ):
            model(**given, use_cache=False)
        model(**given, use_cache=False)


@pytest.mark.parametrize(
    ("method", "positions", "message"),
    [
        ("rerope", True, "rerope does not attend by PyTorch's function"),
        ("dual_chunk", False, "dual_chunk does not attend by PyTorch's function"),
        ("dynamic_ntk", True, "dynamic_ntk would take the length of a rank's tokens"),
        ("yarn", False, "position_ids are not given"),
    ],
)
def test_refuses_region(ranks, method, positions, message):
    case = {"method": method, "positions": positions, "message": message}
    ranks.run(refuses_region, 2, **case)
