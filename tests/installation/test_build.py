"""Wheels, the plan of commands and how ninja runs them."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
import release
import setuptools
import torch
from setuptools import Distribution
from setuptools.command.build import build
from support.builds import (
    CPU,
    ROOT,
    compile_times,
    copy_checkout,
    copy_compiled,
    foreign_symbols,
    has,
    load,
    needs_compiler,
    needs_nvcc,
    nm,
    start,
)

from extrope_kernels import _build

# What a CUDA library says of this machine, were it one with a GPU, and then as it is.
CUDA_OPS = """
import pathlib, torch
from extrope_kernels import _ext

def try_it():
    print(_ext._dlopen(pathlib.Path({library!r})))
    print(torch._C._dispatch_has_kernel_for_dispatch_key("extrope::rope_bwd", "CUDA"))

if not torch.cuda.is_available():
    is_available, torch.cuda.is_available = torch.cuda.is_available, lambda: True
    try_it()
    torch.cuda.is_available = is_available
try_it()
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkout")
    copy_checkout(folder)
    return folder


def run_backend(checkout: Path, *python: str, build: str = "build_wheel", **env: str) -> Path:
    """What setuptools builds from a checkout, of which it has nothing to warn."""
    code = f"from setuptools.build_meta import {build}; print({build}('dist'))"
    env = {**os.environ, "EXTROPE_CUDA": "0", **env}
    done = subprocess.run(
        [sys.executable, *python, "-c", code], cwd=checkout, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Warning:" not in done.stderr, done.stderr
    return checkout / "dist" / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(checkout) -> Path:
    steps = build(Distribution())
    steps.finalize_options()
    copy_compiled(checkout / steps.build_temp / "cpu")
    return run_backend(checkout)


def test_wheel_without_torch_is_pure_and_holds_the_sources(checkout, tmp_path):
    # A path with setuptools alone, as in pip's isolated build.
    site = Path(setuptools.__file__).parent.parent
    for path in [*site.glob("setuptools*"), *site.glob("_distutils_hack")]:
        (tmp_path / path.name).symlink_to(path)
    stale = checkout / "build" / "lib" / "extrope_kernels" / CPU
    stale.parent.mkdir(parents=True, exist_ok=True)
    stale.touch()
    wheel = run_backend(checkout, "-S", PYTHONPATH=str(tmp_path))
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    (entry_points,) = [name for name in names if name.endswith("/entry_points.txt")]
    scripts = "[console_scripts]\nextrope = extrope_cli:run\n"
    assert scripts in zipfile.ZipFile(wheel).read(entry_points).decode()
    packaged = {name.split("/", 2)[2] for name in names if name.startswith("extrope_kernels/csrc")}
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    assert packaged == {path.relative_to(ROOT / "csrc").as_posix() for path in sources}
    assert not [name for name in names if name.endswith(".so")]
    package = ROOT / "extrope_kernels"
    modules = [*package.rglob("*.py"), *package.rglob("*.json"), package / "py.typed"]
    modules.append(ROOT / "extrope_cli.py")
    missing = {path.relative_to(ROOT).as_posix() for path in modules} - set(names)
    assert not missing  # as of a folder without an __init__.py


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_an_unpacked_sdist_is_a_checkout(tmp_path):
    """It can be tested and linted as one."""
    unwanted = (".git", ".venv", ".nox", "build", "dist", "results", "*.egg-info", "__pycache__")
    copy = tmp_path / "copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*unwanted))
    sdist = run_backend(copy, build="build_sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.glob("extrope_kernels-*")
    folders = ("bench", "csrc", "docs", "examples", "extrope_kernels", "tests")
    files = [path for folder in folders for path in (copy / folder).rglob("*") if path.is_file()]
    files += [copy / name for name in (".ci/run", ".clang-format", ".gitignore", "noxfile.py")]
    names = [path.relative_to(copy) for path in files if path.suffix != ".pyc"]
    assert not [name for name in names if not (unpacked / name).exists()]
    for target in ("lint", "test", "docs", "sanitize"):
        done = subprocess.run(["make", "-n", target], cwd=unpacked, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@needs_compiler
def test_wheel_with_torch_holds_the_library_and_works(wheel, tmp_path):
    assert re.search(r"-cp310-abi3-linux_\w+\.whl$", wheel.name)
    zipfile.ZipFile(wheel).extractall(tmp_path)
    reason, path = load(PYTHONPATH=str(tmp_path), EXTROPE_JIT="0")
    assert (reason, path) == ("None", str(tmp_path / "extrope_kernels" / CPU))


@needs_compiler
def test_instruction_sets_share_no_function(checkout, wheel):
    # The linker keeps one of several equal weak functions, whichever processor it was compiled for.
    objects = {path: path.name.split(".")[-2] for path in checkout.glob("build/temp*/cpu/*.o")}
    assert set(objects.values()) >= set(_build.instruction_sets(_build.find_compiler()))
    for path, isa in objects.items():
        if isa not in _build.ISA_FLAGS:
            continue
        shared = [line for line in nm(path) if " W " in line and isa not in line]
        assert not shared, path.name


@needs_compiler
def test_unchanged_sources_compile_nothing(checkout, wheel, monkeypatch, tmp_path):
    (work_dir,) = checkout.glob("build/temp*/cpu")
    before = compile_times(work_dir)
    assert before.keys() >= _build.plan("cpu").objects.keys()
    for path in (checkout / "csrc").rglob("*.*"):
        path.touch()
    monkeypatch.setattr(_build, "source_dir", lambda: checkout / "csrc")
    _build.build("cpu", tmp_path / CPU, work_dir, tmp_path / "build.log")
    assert compile_times(work_dir) == before
    assert (tmp_path / CPU).read_bytes() == (work_dir / CPU).read_bytes()


def test_notes_are_of_the_newest_version():
    changelog = "# Changelog\n\n## 0.3.0\n\nNew.\n\n### Changed\n\n- Old.\n\n## 0.2.0\n\nLess."
    assert release.notes(changelog) == "New.\n\n### Changed\n\n- Old.\n"


def test_no_ninja_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "ninja", None)
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(_build.BuildError, match=r"^ninja not found: pip install ninja$"):
        _build.find_ninja()


@needs_compiler
def test_a_compiler_that_no_shell_reads_is_one_line(monkeypatch):
    monkeypatch.setenv("CXX", "g++ -DNAME='open")
    with pytest.raises(_build.BuildError, match=r"^CXX cannot be read: No closing quotation$"):
        _build.find_compiler()


@needs_compiler
def test_a_launcher_before_the_compiler(tmp_path):
    launched = ["env", *_build.find_compiler(), "-fPIC"]  # as ccache
    (tmp_path / "a.cpp").write_text("#include <cmath>\ndouble a(double x) { return std::sin(x); }")
    link = [*launched, "-shared", "-Wl,--no-undefined", "-lm"]
    objects = {"a.o": [*launched, "-c", "a.cpp"]}
    _build.run_ninja(objects, "lib.so", link, tmp_path, tmp_path / "build.log")
    assert (tmp_path / "lib.so").exists()


def test_nvcc_gets_the_compiler_without_launcher_and_its_flags():
    assert _build.host_compiler(["g++-13"]) == ["-ccbin=g++-13"]
    assert _build.host_compiler(["ccache", "/usr/bin/g++", "-m64", "-g"]) == [
        "-ccbin=/usr/bin/g++",
        "-Xcompiler=-m64",
        "-Xcompiler=-g",
    ]


@needs_compiler
def test_what_does_not_link_is_one_line(tmp_path):
    compiler = _build.find_compiler()
    (tmp_path / "a.cpp").write_text("void missing(); void a() { missing(); }")
    objects = {"a.o": [*compiler, "-fPIC", "-c", "a.cpp"]}
    link = [*compiler, "-shared", "-Wl,--no-undefined"]
    with pytest.raises(_build.BuildError, match="missing") as error:
        _build.run_ninja(objects, "lib.so", link, tmp_path, tmp_path / "build.log")
    assert "\n" not in str(error.value)


class Interrupting(io.StringIO):
    """A terminal on which the user presses Ctrl-C when the first file is compiled."""

    def isatty(self):
        return True

    def write(self, text):
        raise KeyboardInterrupt


def test_an_interrupted_build_leaves_no_compiler_running(monkeypatch, tmp_path):
    """Even where Python alone was told: it would write where the next build does."""
    if not has(_build.find_ninja):
        pytest.skip("no ninja")
    scripts = {"fast": "until [ -s pid ]; do sleep 0.01; done", "slow": "echo $$ > pid; sleep 60"}
    for name, does in scripts.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
        (tmp_path / f"{name}.cpp").touch()
    objects = {f"{name}.o": [f"./{name}", f"{name}.cpp"] for name in scripts}
    monkeypatch.setattr(sys, "stderr", Interrupting())
    with pytest.raises(KeyboardInterrupt):
        _build.run_ninja(objects, "lib.so", ["c++"], tmp_path, tmp_path / "build.log")
    command = Path("/proc", (tmp_path / "pid").read_text().strip(), "cmdline")
    deadline = time.monotonic() + 5
    while command.exists() and command.read_bytes():  # nothing is left there of a zombie
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.thorough
@needs_nvcc
@needs_compiler
def test_cuda_library_links_against_any_torch_and_registers_where_it_can_run(monkeypatch, tmp_path):
    monkeypatch.setenv("EXTROPE_CUDA_ARCHS", "90")  # the host side is the same for all
    library = tmp_path / _build.LIBRARIES["cuda"]
    _build.build("cuda", library, tmp_path / "objects", tmp_path / "build.log")
    read = _build.output([_build.find_ninja(), "-C", str(tmp_path / "objects"), "-t", "deps"])
    assert "csrc/cuda/launch.h" in read  # nvcc's dependencies are known too
    assert not foreign_symbols(library)
    printed, errors = start(CUDA_OPS.format(library=str(library))).communicate(timeout=3600)
    if torch.cuda.is_available():
        assert printed.splitlines() == ["None", "True"], errors
    else:
        why = "_C_cuda.abi3.so cannot run here: the driver is for CUDA 0.0, the library needs CUDA"
        told, *registered = printed.splitlines()
        assert told.startswith(why) and registered == ["False", "None", "True"], errors


@needs_nvcc
def test_architectures_from_the_environment(monkeypatch):
    monkeypatch.setenv("EXTROPE_CUDA_ARCHS", "80,90")
    assert _build.cuda_archs(_build.find_nvcc()) == ["80", "90"]
    monkeypatch.setenv("EXTROPE_CUDA_ARCHS", "120 90a,90,80")  # nvcc takes the oldest first
    assert _build.cuda_archs(_build.find_nvcc()) == ["80", "90", "90a", "120"]
    monkeypatch.delenv("EXTROPE_CUDA_ARCHS")
    assert set(_build.cuda_archs(_build.find_nvcc())) <= set(_build.CUDA_ARCHS)


def test_torch_that_is_too_old_is_refused(monkeypatch):
    monkeypatch.setattr(_build.importlib.metadata, "version", lambda name: "2.10.1+cpu")
    with pytest.raises(_build.BuildError, match=r"torch 2\.10\.1\+cpu is older than 2\.11"):
        _build.find_torch()


def wrapped(folder: Path, case: str) -> str:
    """The path of a compiler that does as this machine's, but for a case of a shell script."""
    path, real = folder / "wrapped", " ".join(_build.find_compiler())
    path.write_text(f'#!/bin/sh\ncase "$*" in {case};; esac\nexec {real} "$@"\n')
    path.chmod(0o755)
    return str(path)


@needs_compiler
def test_compiler_without_amx(monkeypatch, tmp_path):
    if "avx512" not in _build.instruction_sets(_build.find_compiler()):
        pytest.skip("not an x86 processor")
    monkeypatch.setenv("CXX", wrapped(tmp_path, "*-mamx*) exit 1"))
    steps = _build.plan("cpu")
    assert steps.left_out.endswith("wrapped does not know AMX")
    words = [Path(word).name for command in steps.objects.values() for word in command]
    assert not [word for word in words if "amx" in word.lower()]
    assert "cpu.attention.forward_kernel.avx512.o" in steps.objects


@needs_compiler
def test_compiler_for_arm(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", wrapped(tmp_path, "-dumpmachine) echo aarch64-linux-gnu; exit 0"))
    steps = _build.plan("cpu")
    kernels = {name: words for name, words in steps.objects.items() if "_kernel." in name}
    assert steps.left_out == "" and {name.split(".")[-2] for name in kernels} == {"neon"}
    assert all("-O3" in words and "-O1" not in words for words in kernels.values())
    words = [word for command in steps.objects.values() for word in command]
    assert not [word for word in words if word.startswith("-m") or "BF16" in word]


@needs_compiler
def test_key_follows_sources_and_flags(monkeypatch, tmp_path):
    before = _build.key("cpu")
    assert _build.key("cpu") == before
    monkeypatch.setattr(_build, "CXX_FLAGS", (*_build.CXX_FLAGS, "-g"))
    assert _build.key("cpu") != before
    monkeypatch.undo()
    shutil.copytree(_build.source_dir(), tmp_path / "csrc")
    monkeypatch.setattr(_build, "source_dir", lambda: tmp_path / "csrc")
    assert _build.key("cpu") == before
    (tmp_path / "csrc/common/rope_params.h").write_text("// changed")
    assert _build.key("cpu") != before


@needs_compiler
def test_a_folder_whose_name_is_not_utf8_has_a_key(monkeypatch):
    monkeypatch.setattr(_build, "source_dir", lambda: Path(os.fsdecode(b"/caf\xe9/csrc")))
    assert re.fullmatch("[0-9a-f]{16}", _build.work_key("cpu"))
