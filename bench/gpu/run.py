"""The steps that a machine with a GPU is asked for: make gpu, or python bench/gpu/run.py [STEP]

Without a network and without pip: with the torch, Triton and nvcc of the Python that runs it. Each
step ends within nine minutes with a verdict of one line; status 0 is that all is well. Results go
to bench/results/gpu-CARD/, by the card's name: JSON, and README.md with the tables.

Steps: see `python bench/gpu/run.py --list`. Without one, all of them, one after the other.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:1] = [str(ROOT / folder) for folder in (".", "bench", "tests/support")]

if __name__ == "__main__":
    from gpu.command import main

    sys.exit(main(sys.argv[1:]))
