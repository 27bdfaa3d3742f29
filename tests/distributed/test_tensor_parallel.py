"""A model that transformers itself has cut by its own plan, extended, against the whole one."""

from __future__ import annotations

import pytest
import torch

METHODS = {"yarn": {"factor": 4.0}, "rerope": {"window": 8}}


def generates_as_whole(mesh, method, path):
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    from extrope_kernels.integrations.transformers import extend

    plan = {"tp_plan": "auto", "tp_size": mesh.size()}
    try:
        cut = {"distributed_config": DistributedConfig(**plan)}
    except TypeError:  # old versions take the plan itself
        cut = plan
    ids, found = torch.arange(40)[None], []
    for options in ({}, cut):
        model = AutoModelForCausalLM.from_pretrained(path, **options)
        with extend(model, method, **METHODS[method]):
            found.append(
                model.generate(
                    ids,
                    max_new_tokens=4,
                    do_sample=False,
                    output_logits=True,
                    return_dict_in_generate=True,
                )
            )
    weight = model.model.layers[0].self_attn.q_proj.weight
    assert weight.to_local().shape[0] * mesh.size() == weight.shape[0]
    whole, parts = found
    assert torch.equal(parts.sequences, whole.sequences)
    want = torch.stack(whole.logits)
    # The same sums in another order, over two layers: a few roundings of float32.
    atol = 2.0**-19 * want.abs().max().item()
    torch.testing.assert_close(torch.stack(parts.logits), want, rtol=0, atol=atol)


@pytest.mark.parametrize("method", METHODS)
def test_generates_as_whole(ranks, method, tmp_path):
    from tiny_models import build

    build("LlamaForCausalLM", num_key_value_heads=4).save_pretrained(tmp_path)
    ranks.run(generates_as_whole, 4, method=method, path=str(tmp_path))
