"""One engine on a CPU by what a GPU has: python -m support.vllm_gpu_runner FOLDER JSON

vLLM's second model runner, which is a GPU's, with its Triton kernels interpreted, and our backend
for GPUs in the place of the CPU's. Asks for prompts, makes a dummy run, and asks for longer ones
with the first in front; prints what came of it in one line of JSON.
"""

from __future__ import annotations

import json
import os
import sys
from types import SimpleNamespace

import torch

os.environ |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}  # before vLLM, and Triton


def main(folder: str, extrope: str) -> None:
    import triton.backends

    # vLLM wants to see a driver for CPUs, which the interpreter does without.
    there = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))
    triton.backends.backends["cpu"] = there

    from support.vllm_engines import PROMPTS, engine, generated

    from extrope_kernels.integrations.vllm import cuda, plugin

    plugin._BACKENDS["CPU_ATTN"] = f"{cuda.__name__}.{cuda.ScoreBackend.__name__}"
    longer = [PROMPTS[0] + PROMPTS[1], PROMPTS[0] + PROMPTS[3]]
    with engine(folder, json.loads(extrope), enable_prefix_caching=True) as llm:
        runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
        impl = runner.get_model().model.layers[0].self_attn.attn.impl
        generated(llm, PROMPTS[:1], logprobs=False)
        before = [cache.clone() for cache in runner.kv_caches]
        runner._dummy_run(4)
        kept = all(map(torch.equal, before, runner.kv_caches))
        found = generated(llm, longer, logprobs=False)
    said = {
        "runner": [each.__module__ for each in type(runner).__mro__],
        "impl": type(impl).__name__,
        "written": bool(before) and all(cache.any().item() for cache in before),
        "kept": kept,
        "prompts": longer,
        "found": [[each.tokens, each.of_new.tolist(), each.cached] for each in found],
    }
    print(json.dumps(said))


if __name__ == "__main__":
    main(*sys.argv[1:])
