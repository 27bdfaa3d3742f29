"""`python -m extrope_kernels.evaluation.lm_eval`: lm-eval's command line with our model in it."""

from __future__ import annotations

import sys

from ..._usage import UsageError


def main() -> int:
    """Make the model known to lm-eval and hand on to its command line; return the exit code."""
    try:
        from lm_eval.__main__ import cli_evaluate
        from lm_eval.api.registry import model_registry

        from .model import NAME, ExtropeLM
    except ModuleNotFoundError as error:
        command = "pip install 'lm-eval[hf,ruler]'"
        print(f"lm_eval: {error.name} not installed; run: {command}", file=sys.stderr)
        return 2
    if NAME not in model_registry:
        model_registry.register(NAME, target=ExtropeLM)
    try:
        cli_evaluate()
    except UsageError as error:
        print(f"lm_eval: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
