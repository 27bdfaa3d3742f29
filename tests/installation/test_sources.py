"""What sources and their flags must never contain."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from extrope_kernels import _build

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("*.py", "*.h", "*.cpp", "*.cu")


def test_no_fast_math():
    flags = [*_build.CXX_FLAGS, *_build.NVCC_FLAGS, *sum(_build.ISA_FLAGS.values(), ())]
    text = " ".join(flags) + " ".join(
        path.read_text() for path in (ROOT / "csrc").rglob("*") if path.is_file()
    )
    forbidden = (
        r"fast-math|fast_math|unsafe-math|associative-math|reciprocal-math|finite-math|Ofast"
    )
    assert not re.search(forbidden, text)


# One interface for two units of a processor: a file of kernels includes one of them.
TWICE = {"ProductUnit"}


def test_no_two_classes_of_cpp_have_one_name():
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.suffix in (".h", ".cpp", ".cu"):
            named = r"^ *(?:class|struct|enum|enum class) (?:alignas\(.*\) )?(\w+)(?: : .*)? \{"
            for name in re.findall(named, path.read_text(), re.MULTILINE):
                found.setdefault(name, []).append(path.name)
    assert len(found) > 100 and found.keys() >= TWICE
    assert not {name: at for name, at in found.items() if len(at) > 1 and name not in TWICE}


def test_no_two_public_classes_of_ops_have_one_name():
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "extrope_kernels" / "ops").rglob("*.py")):
        for name in re.findall(r"^class ([A-Za-z]\w*)", path.read_text(), re.MULTILINE):
            found.setdefault(name, []).append(str(path.relative_to(ROOT)))
    assert len(found) > 40
    assert not {name: at for name, at in found.items() if len(at) > 1}


def test_the_tree_of_contributing_is_whole():
    """Every source is under a row, and every name of a row is there."""
    tree = (ROOT / "CONTRIBUTING.md").read_text().split("## The tree")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.*?`) \|", tree, re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(.+?)`", row)}
    ops = [path.name for path in (ROOT / "extrope_kernels/ops").glob("[a-z]*/")]
    of_ops = {name.replace("/OP/", f"/{op}/") for name in named for op in ops if "/OP/" in name}
    named = {name for name in named if "/OP/" not in name}
    assert len(ops) == 5 and not [name for name in named if not (ROOT / name).exists()]
    found = [path for path in ROOT.glob("*.py") if path.name != "noxfile.py"]
    for folder in ("extrope_kernels", "csrc", "tests", "bench", "examples"):
        found += [x for end in SOURCES for x in (ROOT / folder).rglob(end)]
    found = [x for x in found if x.name not in ("__init__.py", "__main__.py", "conftest.py")]
    names = {path.relative_to(ROOT).as_posix() for path in found}
    assert len(names) > 400 and not sorted(x for x in names if not x.startswith((*named, *of_ops)))


def includes(source: Path, seen: set[Path]) -> set[str]:
    """Every header that a source names, through our own headers."""
    names = set(re.findall(r'#include\s*[<"](.*)[>"]', source.read_text()))
    for name in list(names):
        header = ROOT / "csrc" / name
        if header.is_file() and header not in seen:
            seen.add(header)
            names |= includes(header, seen)
    return names


def test_kernels_include_no_torch_header():
    """What bindings include of it, their symbols tell: test_first_use.py."""
    kernels = [*(ROOT / "csrc/cuda").rglob("*.cu"), *(ROOT / "csrc/cpu").rglob("*_kernel.cpp")]
    for source in kernels:
        headers = includes(source, set())
        assert not [x for x in headers if re.match(r"torch/|ATen/|c10/", x)], source.name


@pytest.mark.thorough
@pytest.mark.parametrize(
    "source", sorted((ROOT / "tests/support/arm").glob("*.cpp")), ids=lambda path: path.name
)
def test_the_driver_for_arm_compiles_without_torch(source):
    """As `nox -s arm` compiles it, which few run: for this processor, no further than its types."""
    flags = ["-fsyntax-only", "-DEXTROPE_ISA=baseline", _build.STANDARD]
    where = ["-I", str(ROOT / "csrc"), "-I", str(source.parent)]
    command = [*_build.find_compiler(), *flags, *where, str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
