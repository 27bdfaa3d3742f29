"""Building, packaging and loading the compiled libraries: each case in a process of its own."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import setuptools
import torch

from extrope_kernels import _build, _ext

ROOT = Path(__file__).resolve().parents[2]
CPU = _build.LIBRARIES["cpu"]
LOAD = "from extrope_kernels import _ext; print(_ext.load('cpu')); print(_ext._paths.get('cpu'))"
# Torch's C shim, the versioned symbols of libc, libstdc++ and libgcc, and weak ones.
ALLOWED = re.compile(r"U (aoti_torch_|torch_)\w+$|U \S+@(GLIBC|GLIBCXX|CXXABI|GCC)_|[wv] ")


def has(find) -> bool:
    try:
        find()
    except _build.BuildError:
        return False
    return True


needs_compiler = pytest.mark.skipif(not has(_build.find_compiler), reason="no C++ compiler")
needs_nvcc = pytest.mark.skipif(not has(_build.find_nvcc), reason="no nvcc")


def start(code: str, **env: str) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=env,
        cwd="/",
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def load(**env: str) -> tuple[str, str]:
    """The reason and the path that a fresh process gets from `load("cpu")`, "None" for none."""
    process = start(LOAD, **env)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    reason, path = out.splitlines()
    return reason, path


def nm(library: Path, *options: str) -> list[str]:
    done = subprocess.run(["nm", *options, str(library)], capture_output=True, text=True)
    return [line.strip() for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """A cache that two processes filled at once."""
    folder = tmp_path_factory.mktemp("cache")
    processes = [start(LOAD, EXTROPE_CACHE_DIR=str(folder)) for _ in range(2)]
    results = [process.communicate(timeout=300) for process in processes]
    for (out, err), process in zip(results, processes, strict=True):
        assert process.returncode == 0, err
        assert out.startswith("None\n"), out
    assert sum("building the cpu library" in err for _, err in results) == 1
    return folder


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of what a wheel is made from: builds write into their source folder."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, folder)
    for name in ("csrc", "extrope_kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def build_wheel(checkout: Path, *python: str, **env: str) -> Path:
    code = "from setuptools.build_meta import build_wheel; print(build_wheel('dist'))"
    env = {**os.environ, "EXTROPE_CUDA": "0", **env}
    done = subprocess.run(
        [sys.executable, *python, "-c", code], cwd=checkout, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return checkout / "dist" / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(checkout) -> Path:
    return build_wheel(checkout)


def entry(cache: Path) -> Path:
    (folder,) = cache.glob("cpu-*")
    return folder


@needs_compiler
def test_two_processes_leave_one_library(cache):
    assert sorted(path.name for path in entry(cache).iterdir() if path.name != "lock") == [
        CPU.removesuffix("so") + "sha256",
        CPU,
        "build.log",
    ]


@needs_compiler
def test_cached_library_is_loaded_again(cache):
    assert load(EXTROPE_CACHE_DIR=str(cache)) == ("None", str(entry(cache) / CPU))


@needs_compiler
def test_only_stable_symbols(cache):
    library = entry(cache) / CPU
    foreign = [line for line in nm(library, "-D", "--undefined-only") if not ALLOWED.match(line)]
    assert not foreign
    dynamic = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True).stdout
    needed = re.findall(r"NEEDED.*\[(.*)\]", dynamic)
    assert [name for name in needed if "torch" in name or "c10" in name] == ["libtorch_cpu.so"]
    assert not re.search(r"RPATH|RUNPATH", dynamic)


@needs_compiler
def test_damaged_cache_is_rebuilt(cache, monkeypatch, tmp_path):
    good = (entry(cache) / CPU).read_bytes()
    shutil.copytree(entry(cache), tmp_path / "entry")
    library = tmp_path / "entry" / CPU
    library.write_bytes(good[:5000])
    monkeypatch.setattr(_build, "build", lambda name, output, *_: output.write_bytes(good))
    assert not _ext._intact(library)
    _ext._build_locked("cpu", library)
    assert _ext._intact(library) and library.read_bytes() == good


@needs_compiler
def test_unwritable_cache_falls_back_to_temporary_folder(cache, tmp_path):
    (tmp_path / "file").touch()
    private = tmp_path / f"extrope_kernels-{os.getuid()}"
    shutil.copytree(cache, private)
    private.chmod(0o700)
    env = {"EXTROPE_CACHE_DIR": str(tmp_path / "file" / "cache"), "TMPDIR": str(tmp_path)}
    assert load(**env) == ("None", str(entry(private) / CPU))
    private.chmod(0o777)  # anyone could have put the library there
    reason, _ = load(**env)
    assert reason.startswith("no cache folder can be used: ") and "others can write" in reason


@needs_compiler
def test_full_disk_is_one_line(monkeypatch, tmp_path):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setenv("EXTROPE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(_ext, "_temporary_dir", lambda: tmp_path / "temporary")
    monkeypatch.setattr(_build, "build", full)
    with pytest.raises(_build.BuildError, match="No space left on device") as error:
        _ext._load_cached("cpu")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("**/build-*"))


def test_no_compiler_is_one_line(tmp_path):
    reason, _ = load(EXTROPE_CACHE_DIR=str(tmp_path), PATH="/nonexistent", CXX="")
    assert reason == "no C++ compiler found (c++, g++, clang++)"


def test_failing_compiler_is_one_line_with_a_log(tmp_path):
    compiler = tmp_path / "broken"
    compiler.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exit 0\necho x.cpp:1: error: out of luck\nexit 1\n'
    )
    compiler.chmod(0o755)
    reason, _ = load(EXTROPE_CACHE_DIR=str(tmp_path / "cache"), CXX=str(compiler))
    log = entry(tmp_path / "cache") / "build.log"
    assert reason == f"broken failed: x.cpp:1: error: out of luck (log: {log})"
    assert "-std=" in log.read_text()


def test_jit_turned_off(tmp_path):
    reason, _ = load(EXTROPE_CACHE_DIR=str(tmp_path), EXTROPE_JIT="0")
    assert reason == "not in the package, and EXTROPE_JIT=0 forbids to build it"
    assert not list(tmp_path.iterdir())


def test_rotation_works_without_a_library(tmp_path):
    code = (
        "import torch, extrope_kernels as e; x = torch.ones(1, 3, 2, 8)\n"
        "y = e.apply_rope(x, e.methods.rope(8)); print(y.shape == x.shape)"
    )
    process = start(code, EXTROPE_CACHE_DIR=str(tmp_path), EXTROPE_JIT="0")
    out, err = process.communicate(timeout=60)
    assert out == "True\n", err


def test_load_rejects_unknown_library():
    with pytest.raises(ValueError, match="load: name must be one of"):
        _ext.load("tpu")


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch has CUDA")
def test_cuda_library_says_why_not():
    assert _ext.load("cuda") == "this torch is built without CUDA"


def test_wheel_without_torch_is_pure_and_holds_the_sources(checkout, tmp_path):
    # A path with setuptools alone, as in pip's isolated build.
    site = Path(setuptools.__file__).parent.parent
    for path in [*site.glob("setuptools*"), *site.glob("_distutils_hack")]:
        (tmp_path / path.name).symlink_to(path)
    stale = checkout / "build" / "lib" / "extrope_kernels" / CPU
    stale.parent.mkdir(parents=True, exist_ok=True)
    stale.touch()
    wheel = build_wheel(checkout, "-S", PYTHONPATH=str(tmp_path))
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    packaged = {name.split("/", 2)[2] for name in names if name.startswith("extrope_kernels/csrc")}
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    assert packaged == {path.relative_to(ROOT / "csrc").as_posix() for path in sources}
    assert not [name for name in names if name.endswith(".so")]


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
    assert set(objects.values()) >= set(_build.ISA_FLAGS) - set(_build.BF16_ISAS)
    for path, isa in objects.items():
        if isa not in _build.ISA_FLAGS:
            continue
        shared = [line for line in nm(path) if " W " in line and isa not in line]
        assert not shared, path.name


@needs_nvcc
@needs_compiler
def test_cuda_library_links_against_any_torch(monkeypatch, tmp_path):
    monkeypatch.setenv("EXTROPE_CUDA_ARCHS", "90")  # the host side is the same for all
    library = tmp_path / _build.LIBRARIES["cuda"]
    _build.build("cuda", library, tmp_path / "objects", tmp_path / "build.log")
    foreign = [line for line in nm(library, "-D", "--undefined-only") if not ALLOWED.match(line)]
    assert not foreign
    code = f"import extrope_kernels, torch; torch.ops.load_library({str(library)!r})"
    process = start(code)
    assert process.wait(60) == 0, process.stderr.read()


@needs_nvcc
def test_architectures_from_the_environment(monkeypatch):
    monkeypatch.setenv("EXTROPE_CUDA_ARCHS", "80,90")
    assert _build.cuda_archs(_build.find_nvcc()) == ["80", "90"]
    monkeypatch.delenv("EXTROPE_CUDA_ARCHS")
    assert set(_build.cuda_archs(_build.find_nvcc())) <= set(_build.CUDA_ARCHS)


def test_torch_that_is_too_old_is_refused(monkeypatch):
    monkeypatch.setattr(_build.importlib.metadata, "version", lambda name: "2.10.1+cpu")
    with pytest.raises(_build.BuildError, match=r"torch 2\.10\.1\+cpu is older than 2\.11"):
        _build.find_torch()


@needs_compiler
def test_compiler_without_amx(monkeypatch, tmp_path):
    if "avx512" not in _build._instruction_sets(_build.find_compiler()):
        pytest.skip("not an x86 processor")
    real = " ".join(_build.find_compiler())
    old = tmp_path / "old"
    old.write_text(f'#!/bin/sh\ncase "$*" in *-mamx*) exit 1;; esac\nexec {real} "$@"\n')
    old.chmod(0o755)
    monkeypatch.setenv("CXX", str(old))
    steps = _build.plan("cpu")
    assert steps.left_out.endswith("old does not know AMX")
    words = [word for command in steps.objects.values() for word in command]
    assert not [word for word in words if word != str(old) and "amx" in word.lower()]
    assert "cpu.attention.forward_kernel.avx512.o" in steps.objects


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
