"""`python -m extrope_kernels`."""

import os
import sys

from .cli import main


def run() -> int:
    """Run the command; who reads what it prints, such as head, may stop early."""
    try:
        try:
            return main()
        finally:
            print(end="", flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's own flush
        return 1


sys.exit(run())
