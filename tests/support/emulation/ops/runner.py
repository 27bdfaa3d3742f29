"""Runs cases on the emulated ops: `runner.py LIBRARY MODULE:FUNCTION`, under a sanitizer's runtime.

FUNCTION yields (name, check) pairs. What fails is printed as JSON, by name.
"""

from __future__ import annotations

import importlib
import json
import sys
import time

import torch
from emulation.ops import emulated


def main(path: str, cases: str) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh memory is NaN
    emulated.load(path)
    module, function = cases.split(":")
    failed = {}
    for name, check in getattr(importlib.import_module(module), function)():
        begin = time.perf_counter()
        print(name, end=" ", file=sys.stderr, flush=True)  # the last one ends the process
        try:
            check()
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"
        print(f"{time.perf_counter() - begin:.2f} s", file=sys.stderr, flush=True)
    print(json.dumps(failed))


if __name__ == "__main__":
    main(*sys.argv[1:])
