"""The CPU library with kernels for AMX that any processor with AVX512_BF16 runs: see amx.h."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from extrope_kernels import _build

HEADER = Path(__file__).with_name("amx.h")


def emulate() -> None:
    """Let this process build that library: the usual one's objects, but for the kernels that use
    AMX, compiled at -O1, and what asks the processor for it.
    """
    steps = _build.plan("cpu")
    objects = {target: _with_header(target, command) for target, command in steps.objects.items()}
    emulated = replace(steps, objects=objects)
    _build.plan = lambda name: emulated


def _with_header(target: str, command: list[str]) -> list[str]:
    if target.endswith(".amx.o"):
        command = ["-O1" if word == "-O3" else word for word in command]
    elif not target.endswith("capability.o"):
        return command
    return [*command[:-2], "-include", str(HEADER), *command[-2:]]
