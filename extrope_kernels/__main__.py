"""`python -m extrope_kernels`, and `extrope`."""

import errno
import os
import sys

from .cli import main


def run() -> int:
    """Run the command, even if the reader of its output (head, a full disk) stops early."""
    try:
        try:
            return main()
        finally:
            print(end="", flush=True)
    except BrokenPipeError:
        code = 1
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print(f"extrope: cannot print: {error.strerror}", file=sys.stderr)
        code = 2
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's own flush
    return code


if __name__ == "__main__":
    sys.exit(run())
