"""Extended models over 2 and 4 processes against one process, and what they refuse."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist

from extrope_kernels import distributed

SEQLEN, VOCABULARY = 48, 128
SCORES = {
    "rerope": {"window": 16},
    "self_extend": {"window": 16, "factor": 4},
    "dual_chunk": {"chunk_size": 16, "local_window": 4},
    "blockwise_causal": {"block_size": 8},
}
EITHER = pytest.mark.parametrize("method", ["yarn", "rerope"])
# Whether the model is cut before it is extended.
IN_TURN = pytest.mark.parametrize(("method", "cut_first"), [("yarn", True), ("rerope", False)])
METHODS = SCORES | {"rope": {}, "yarn": {"factor": 4.0}, "dynamic_ntk": {"factor": 2.0}}
# The same sums in another order, and a few roundings of float32, in which models compute their
# norms whatever their weights are.
TOLERANCE = 2.0**-19


# Its temperature grows every 8 tokens, counted by cache_position in old versions.
SETTINGS = {
    "Ministral3ForCausalLM": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "original_max_position_embeddings": 8,
            "llama_4_scaling_beta": 0.5,
        }
    }
}


def built(name):
    from support.tiny_models import build

    model = build(name, **SETTINGS.get(name, {})).double()
    if name == "Gemma2ForCausalLM":  # whose cap old versions leave to PyTorch's attention
        model.set_attn_implementation("eager")
    return model


def extended(*args, **options):
    from extrope_kernels.integrations.transformers import extend

    return extend(*args, **options)


def inputs():
    """ids, and what logits are multiplied by, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 100, (2, SEQLEN), generator=generator)
    return ids, torch.randn(2, SEQLEN, VOCABULARY, generator=generator).double()


def trained(model, ids, weights, **given):
    """logits of a model, whose parameters get gradients."""
    logits = model(input_ids=ids, **given).logits
    (logits * weights).sum().backward()
    return logits.detach()


def gradients(model):
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def on_one_process(name, method):
    model = built(name)
    with extended(model, method, **METHODS[method]):
        return trained(model, *inputs(), use_cache=False), gradients(model)


def assert_close(name, got, want):
    error = (got - want).abs().max() / want.abs().max().clamp(min=1)
    assert error <= TOLERANCE, f"{name}: {error:.3g}"


def equals_one_process(mesh, name, method, strategy, balance, checkpoint=False):
    logits, expected = on_one_process(name, method)
    model, cut = built(name), {"mesh": mesh, "balance": balance}
    ids, weights = (distributed.shard(x, **cut) for x in inputs())
    if checkpoint:
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
    with extended(model, method, strategy=strategy, **cut, **METHODS[method]):
        copied = copy.deepcopy(model)  # goes round the same group
        found = trained(copied, ids, weights)
        given = distributed.local_positions(SEQLEN, **cut)[None]
        again = model(input_ids=ids, position_ids=given, attention_mask=torch.ones_like(ids))
    assert torch.equal(again.logits, found)
    assert_close("logits", found, distributed.shard(logits, **cut))
    assert gradients(copied).keys() == expected.keys()
    for n, got in gradients(copied).items():
        dist.all_reduce(got, group=mesh.get_group())
        assert_close(n, got, expected[n])


@pytest.mark.parametrize(
    ("name", "method", "strategy", "balance"),
    [
        ("Llama", "rope", "ring", "zigzag"),
        ("Llama", "yarn", "gather", "zigzag"),
        ("Llama", "dynamic_ntk", "ulysses", None),
        ("Llama", "self_extend", "ring", "zigzag"),
        ("Llama", "dual_chunk", "gather", "zigzag"),
        ("Llama", "blockwise_causal", "ulysses", "zigzag"),
        ("Qwen3", "rerope", "ring", None),
        ("Ministral3", "rerope", "gather", "zigzag"),
        ("Gemma2", "self_extend", "gather", "zigzag"),
        ("Gemma3", "yarn", "ulysses", "zigzag"),
        ("Gemma3", "dual_chunk", "ring", "zigzag"),
    ],
)
def test_equals_one_process(ranks, name, method, strategy, balance):
    case = {"method": method, "strategy": strategy, "balance": balance}
    ranks.run(equals_one_process, 2, name=f"{name}ForCausalLM", **case)


def test_activation_checkpointing(ranks):
    case = {"strategy": "ring", "balance": "zigzag", "checkpoint": True}
    ranks.run(equals_one_process, 2, name="LlamaForCausalLM", method="rerope", **case)


def tensor_parallel_too(mesh, method, cut_first):
    """Heads over the ranks of one dimension, tokens over those of the other."""
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    logits, expected = on_one_process("LlamaForCausalLM", method)
    model, plan = built("LlamaForCausalLM"), {}
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
        plan[f"model.layers.*.{name}"] = ColwiseParallel()
    plan["model.layers.*.self_attn.o_proj"] = RowwiseParallel()
    if cut_first:
        parallelize_module(model, mesh["inner"], plan)
    cp = mesh["outer"]
    with extended(model, method, mesh=cp, **METHODS[method]):
        if not cut_first:
            parallelize_module(model, mesh["inner"], plan)
        found = trained(model, *(distributed.shard(x, cp) for x in inputs()))
    assert_close("logits", found, distributed.shard(logits, cp))
    for n, got in gradients(model).items():
        got = got.full_tensor() if hasattr(got, "full_tensor") else got
        dist.all_reduce(got, group=cp.get_group())
        assert_close(n, got, expected[n])


@IN_TURN
def test_tensor_parallel_too(ranks, method, cut_first):
    ranks.run(tensor_parallel_too, (2, 2), method=method, cut_first=cut_first)


def fully_sharded(mesh, method, cut_first):
    """FSDP2 over the ranks that share the sequence: gradients are their mean."""
    from torch.distributed.fsdp import fully_shard

    logits, expected = on_one_process("LlamaForCausalLM", method)
    model = built("LlamaForCausalLM")

    def shard_parameters():
        for module in (*model.model.layers, model):
            fully_shard(module, mesh=mesh)

    if cut_first:
        shard_parameters()
    with extended(model, method, mesh=mesh, **METHODS[method]):
        if not cut_first:
            shard_parameters()
        assert all(hasattr(p, "full_tensor") for p in model.parameters())  # those to optimize
        found = trained(model, *(distributed.shard(x, mesh) for x in inputs()))
    assert_close("logits", found, distributed.shard(logits, mesh))
    for n, got in gradients(model).items():
        assert_close(n, mesh.size() * got.full_tensor(), expected[n])


@IN_TURN
def test_fully_sharded(ranks, method, cut_first):
    ranks.run(fully_sharded, 2, method=method, cut_first=cut_first)


def mixed_precision(mesh, method, over_mesh):
    """No further from float64 than twice what one process is with weights of bfloat16."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    exact, _ = on_one_process("LlamaForCausalLM", method)
    ids, weights = inputs()
    same, model = built("LlamaForCausalLM").bfloat16(), built("LlamaForCausalLM").float()
    with extended(same, method, **METHODS[method]):
        plain = trained(same, ids, weights.bfloat16(), use_cache=False)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    cp = mesh if over_mesh else None

    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    with extended(model, method, mesh=cp, **METHODS[method]):
        mine = [distributed.shard(x, mesh) if over_mesh else x for x in (ids, weights.bfloat16())]
        found = trained(model, *mine, use_cache=False)
    if over_mesh:
        found = distributed.unshard(found, mesh)
    assert found.dtype == torch.bfloat16
    budget = 2 * (plain.double() - exact).square().mean().sqrt()
    assert (found.double() - exact).square().mean().sqrt() <= budget
    assert all(grad.dtype == torch.float32 for grad in gradients(model).values())


@pytest.mark.parametrize(("method", "over_mesh"), [("rerope", True), ("yarn", False)])
def test_fully_sharded_in_mixed_precision(ranks, method, over_mesh):
    ranks.run(mixed_precision, 2, method=method, over_mesh=over_mesh)


def in_accelerates_region(mesh, method):
    """As accelerate and Trainer do it: their hooks take masks away, torch's region shards."""
    from accelerate.big_modeling import _attach_context_parallel_hooks
    from torch.distributed.tensor.experimental import context_parallel

    ids, _ = inputs()
    labels = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    model, one = built("LlamaForCausalLM"), built("LlamaForCausalLM")
    with extended(one, method, **METHODS[method]):
        one(input_ids=ids, labels=ids, shift_labels=labels, use_cache=False).loss.backward()
    given = {"input_ids": ids, "labels": ids.clone(), "shift_labels": labels}
    given["position_ids"] = torch.arange(SEQLEN).repeat(2, 1)
    buffers, count = list(given.values()), (labels != -100).sum()
    with extended(model, method, mesh=mesh, **METHODS[method]):
        assert model.config._attn_implementation == "sdpa"  # which they insist on
        _attach_context_parallel_hooks(model)
        with context_parallel(mesh, buffers=buffers, buffer_seq_dims=[1] * len(buffers)):
            assert given["input_ids"].shape[1] == SEQLEN // mesh.size()
            model(**given, num_items_in_batch=count).loss.backward()
    for n, got in gradients(model).items():
        dist.all_reduce(got, group=mesh.get_group())
        assert_close(n, got, gradients(one)[n])


@EITHER
def test_in_accelerates_region(ranks, method):
    pytest.importorskip("accelerate")
    ranks.run(in_accelerates_region, 2, method=method)


def refuses_forwards(mesh, method):
    model = built("LlamaForCausalLM")
    ids = distributed.shard(inputs()[0], mesh)
    with extended(model, method, mesh=mesh, **METHODS[method]):
        for given, message in FORWARDS:
            with pytest.raises(ValueError, match=f"extend: {message}"):
                model(**{"input_ids": ids, **given})
            model(input_ids=ids)
        with pytest.raises(ValueError, match="must run without a cache, got one; restore it"):
            model.generate(inputs()[0][:1, :8], max_new_tokens=2)
    with extended(model, method, **METHODS[method]):  # restored, it takes all of that
        model(input_ids=ids, labels=ids, use_cache=True)


IDS = torch.arange(48).view(2, 24)
FORWARDS = [
    ({"use_cache": True}, "a model over a mesh must run without a cache"),
    (
        {"attention_mask": torch.ones(2, 24).tril(20)},
        r"attention_mask must be None or \(batch, seqlen\) of ones over a mesh",
    ),
    (
        {"position_ids": torch.arange(24)[None]},
        "position_ids must be those of `distributed.local_positions` with balance='zigzag'",
    ),
    ({"input_ids": IDS[:, 1:]}, "input_ids must have an even number .* in zigzag, got 23"),
    ({"labels": IDS}, "labels must come with shift_labels over a mesh"),
]


@EITHER
def test_refuses_forwards(ranks, method):
    ranks.run(refuses_forwards, 2, method=method)


def refuses_model(mesh, name, message):
    with pytest.raises(ValueError, match=message):
        extended(built(name), "yarn", factor=4.0, mesh=mesh)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Qwen3_5", "over a mesh tokens must meet in attention alone, which an op replaces"),
        ("Llama4", "attends in chunks, which a mesh does not support"),
    ],
)
def test_refuses_models(ranks, name, message):
    name, transformers = f"{name}ForCausalLM", pytest.importorskip("transformers")
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    ranks.run(refuses_model, 2, name=name, message=message)


def refuses_arguments(mesh):
    for given, error, message in (
        ({"mesh": "cp"}, TypeError, "mesh must be a DeviceMesh or a ProcessGroup, got str"),
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
    from support.tiny_models import tiny_config
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


def generates_as_whole(mesh, method, path):
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    plan = {"tp_plan": "auto", "tp_size": mesh.size()}
    try:
        cut = {"distributed_config": DistributedConfig(**plan)}
    except TypeError:  # old versions take the plan itself
        cut = plan
    ids, found = torch.arange(40)[None], []
    settings = {"max_new_tokens": 4, "do_sample": False}
    settings |= {"output_logits": True, "return_dict_in_generate": True}
    for options in ({}, cut):
        model = AutoModelForCausalLM.from_pretrained(path, **options)
        with extended(model, method, **METHODS[method]):
            found.append(model.generate(ids, **settings))
    weight = model.model.layers[0].self_attn.q_proj.weight
    assert weight.to_local().shape[0] * mesh.size() == weight.shape[0]
    whole, parts = found
    assert torch.equal(parts.sequences, whole.sequences)
    want = torch.stack(whole.logits)
    # The same sums in another order, over two layers: a few roundings of float32.
    atol = 2.0**-19 * want.abs().max().item()
    torch.testing.assert_close(torch.stack(parts.logits), want, rtol=0, atol=atol)


@EITHER
def test_a_model_that_transformers_cut_generates_as_whole(ranks, method, tmp_path):
    from support.tiny_models import build

    build("LlamaForCausalLM", num_key_value_heads=4).save_pretrained(tmp_path)
    ranks.run(generates_as_whole, 4, method=method, path=str(tmp_path))
