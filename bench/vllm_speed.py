"""Tokens a second of vLLM on a CPU, plain and extended: python bench/vllm_speed.py

SmolLM2 reads a prompt and continues it. Engines take turns, each in its own process, and every step
is timed separately. Needs vLLM; writes build/bench/PROCESSOR/vllm.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import entry_points

RERO = {"score": {"method": "rerope", "window": 1024}}
# The entry of the configuration, and the type of the cache.
METHODS = {
    "plain": (None, "auto"),
    "yarn": ({"method": "yarn", "factor": 4.0}, "auto"),
    "rerope": (RERO, "auto"),
    "leaky_rerope": ({"score": {**RERO["score"], "method": "leaky_rerope", "factor": 4.0}}, "auto"),
    "plain fp8": (None, "fp8"),
    "rerope fp8": (RERO, "fp8"),
}
TOKENS, NEW, DTYPE, ROUNDS = 8000, 65, "bfloat16", 3
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


def run_engine(name: str) -> None:
    """Time one engine; print the seconds of its prefill, and of a decode step."""
    from vllm import LLM, SamplingParams

    from extrope_kernels.evaluation import models, packages

    # vLLM ignores an additional_config that no plugin reads.
    if "extrope" not in {entry.name for entry in entry_points(group="vllm.general_plugins")}:
        sys.exit("extrope_kernels must be installed, not on PYTHONPATH alone: vLLM finds its entry")
    extrope, cache_dtype = METHODS[name]
    llm = LLM(
        str(models.unpacked(packages.SMOLLM2)), dtype=DTYPE, kv_cache_dtype=cache_dtype,
        enforce_eager=True, max_model_len=TOKENS + NEW, max_num_batched_tokens=2048,
        max_num_seqs=4, skip_tokenizer_init=True, enable_prefix_caching=False,
        additional_config={} if extrope is None else {"extrope": extrope},
    )  # fmt: skip
    engine = llm.llm_engine
    prompt = [5 + n * n % 40000 for n in range(TOKENS)]
    params = SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True, detokenize=False)

    def steps(tokens: int) -> tuple[float, list[float]]:
        """Return the seconds of the prompt's steps together, and of each step after it."""
        engine.add_request(f"{tokens} tokens", {"prompt_token_ids": prompt[:tokens]}, params)
        prefill, decodes = 0.0, []
        while engine.has_unfinished_requests():
            begin = time.perf_counter()
            out = engine.step()
            seconds = time.perf_counter() - begin
            if not out or len(out[0].outputs[0].token_ids) <= 1:
                prefill += seconds
            else:
                decodes.append(seconds)
        return prefill, decodes

    steps(64)
    prefill, decodes = steps(TOKENS)
    print(json.dumps({"prefill": prefill, "decode": statistics.median(decodes)}))
    engine.engine_core.shutdown()


def measure(name: str, threads: int) -> dict[str, float]:
    """Run an engine in its own process."""
    env = os.environ | ENVIRONMENT | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, __file__, "--engine", name]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


@dataclass
class Row:
    """Tokens a second of an engine."""

    name: str
    prefill: float
    decode: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    parser.add_argument("--record", action="store_true", help="write to bench/results/PROCESSOR")
    args = parser.parse_args()
    if args.engine:
        run_engine(args.engine)
        return
    import transformers
    import vllm
    from harness import results_of, save

    rounds = [{name: measure(name, args.threads) for name in args.methods} for _ in range(ROUNDS)]
    # The least time of all rounds: other load on the machine only adds to it.
    best = {name: {part: min(each[name][part] for each in rounds) for part in ("prefill", "decode")}
            for name in args.methods}  # fmt: skip
    rows = [Row(name, TOKENS / of["prefill"], 1 / of["decode"]) for name, of in best.items()]
    print("\n".join(map(str, rows)))
    about = {"tokens": TOKENS, "dtype": DTYPE, "threads": args.threads, "rounds": ROUNDS}
    about |= {"vllm": vllm.__version__, "transformers": transformers.__version__}
    save("vllm", rows, results_of(args.record), **about)


if __name__ == "__main__":
    main()
