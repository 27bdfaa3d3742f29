"""The folder that `kernels` loads: this package under another namespace of ops, per device.

build/torch-stable-abi211-cpu-x86_64-linux/   with the compiled CPU library
build/torch-cuda/                             Python and Triton only

`kernels` asks that copies can live in one process with the installed package: the ops of a copy
are in a namespace named after its contents.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

from ... import _build, _ext

PACKAGE = Path(_ext.__file__).resolve().parent
FOLDERS = ("methods", "ops", "positions", "scores")
FILES = ("_build.py", "_checks.py", "_ext.py", "py.typed")
LAYERS = "integrations/kernels/layers.py"
_DECLARED = f'NAMESPACE = "{_ext.NAMESPACE}"'


def export(folder: Path) -> list[Path]:
    """Write the folder, replacing an older one, and return the folder of each variant.

    Raises BuildError without the compiled library, and if something else is in its way.
    """
    builds = folder / "build"
    others = [path for path in sorted(builds.glob("*")) if not path.name.startswith("torch-")]
    if others:
        raise _build.BuildError(f"export: {builds} must hold variants alone, got {others[0].name}")
    if why := _ext.load("cpu"):
        raise _build.BuildError(f"export: no CPU library: {why}")
    abi = "".join(map(str, _build.MIN_TORCH))
    cpu = f"torch-stable-abi{abi}-cpu-{platform.machine()}-linux"
    shutil.rmtree(builds, ignore_errors=True)
    return [
        _variant(builds / cpu, "cpu", _ext.path("cpu")),
        _variant(builds / "torch-cuda", "cuda", None),
    ]


def _variant(folder: Path, backend: str, library: Path | None) -> Path:
    for source, target in _sources():
        at = folder / target
        at.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, at)
    if library is not None:
        shutil.copyfile(library, folder / _build.LIBRARIES["cpu"])
    for parent in Path(LAYERS).parents[:-1]:
        (folder / parent / "__init__.py").write_text("")
    with (folder / "__init__.py").open("a") as init:
        init.write("from .integrations.kernels import layers\n\n__all__.append('layers')\n")
    digest = _digest(folder)
    declaring = folder / "_ext.py"
    text = declaring.read_text()
    if text.count(_DECLARED) != 1:
        raise AssertionError(f"{declaring.name} must hold {_DECLARED} once")
    namespace = f"{_ext.NAMESPACE}_{digest[:12]}"
    declaring.write_text(text.replace(_DECLARED, f'NAMESPACE = "{namespace}"'))
    _write_metadata(folder, backend, namespace)
    return folder


def _sources() -> Iterator[tuple[Path, str]]:
    """Map the package's files that `kernels` needs to their places."""
    for name in ("__init__.py", *FILES, LAYERS):
        yield PACKAGE / name, name
    for name in FOLDERS:
        for source in sorted((PACKAGE / name).rglob("*")):
            if source.is_file() and "__pycache__" not in source.parts:
                yield source, str(source.relative_to(PACKAGE))


def _digest(folder: Path) -> str:
    found = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        found.update(str(path.relative_to(folder)).encode())
        found.update(path.read_bytes())
    return found.hexdigest()


def _write_metadata(folder: Path, backend: str, namespace: str) -> None:
    from ... import __version__

    metadata = {
        "id": f"_extrope_kernels_{backend}_{namespace.rpartition('_')[2]}",
        "name": "extrope-kernels",
        "version": int(__version__.split(".")[0]),
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
