"""`python -m extrope_kernels`: the command `extrope`, but with torch loaded first."""

import sys

from extrope_cli import run

if __name__ == "__main__":
    sys.exit(run())
