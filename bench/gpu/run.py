"""Run steps on a machine with a GPU: make gpu, or python bench/gpu/run.py [STEP]

It needs no network and no pip, and uses the torch, Triton and nvcc of its Python. Each step ends
within nine minutes with a verdict of one line; status 0 means that all is well. Results go to
bench/results/gpu-CARD/: JSON, and README.md with the tables.

`python bench/gpu/run.py --list` lists the steps. Without STEP all of them run.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:1] = folders = [str(ROOT / folder) for folder in (".", "bench", "tests")]

if __name__ == "__main__":
    # For the processes of a step; on a cluster torch may come through PYTHONPATH.
    os.environ["PYTHONPATH"] = os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")])
    from gpu.steps import main

    sys.exit(main(sys.argv[1:]))
