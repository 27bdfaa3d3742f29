"""The build on first use: its cache, what it compiles again, and what it says when it fails."""

from __future__ import annotations

import ast
import errno
import os
import pwd
import re
import shutil
import subprocess
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
from support.builds import (
    CPU,
    LOAD,
    broken,
    compile_times,
    copy_checkout,
    copy_compiled,
    foreign_symbols,
    load,
    needs_compiler,
    start,
)

from extrope_kernels import _build, _ext


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkout")
    copy_checkout(folder)
    return folder


def entry(cache: Path) -> Path:
    (folder,) = cache.glob("cpu-*")
    return folder


@pytest.fixture(scope="module")
def cache(checkout, tmp_path_factory) -> Path:
    """A cache that two processes filled at once; most objects were there, so it takes seconds."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_build, "source_dir", lambda: checkout / "csrc")
        work_dir = folder / f"build-cpu-{_build.work_key('cpu')}"
    copy_compiled(work_dir)
    for path in work_dir.glob("*quantize*.o"):
        path.unlink()
    env = {"EXTROPE_CACHE_DIR": str(folder), "PYTHONPATH": str(checkout)}
    processes = [start(LOAD, **env) for _ in range(2)]
    results = [process.communicate(timeout=3600) for process in processes]
    for (out, err), process in zip(results, processes, strict=True):
        assert process.returncode == 0, err
        assert out == f"None\n{entry(folder) / CPU}\n"
    assert sum("building the cpu library" in err for _, err in results) == 1
    return folder


def headers(csrc: Path, source: str) -> set[str]:
    """What a source includes of ours, by way of others too."""
    named = set(re.findall(r'^#include "(.+)"', (csrc / source).read_text(), re.M))
    return named.union(*(headers(csrc, name) for name in named))


@needs_compiler
def test_two_processes_leave_one_library(cache):
    assert sorted(path.name for path in entry(cache).iterdir() if path.name != "lock") == [
        CPU.removesuffix("so") + "sha256",
        CPU,
        "build.log",
    ]


@pytest.mark.thorough
@needs_compiler
def test_an_edited_header_compiles_what_includes_it(checkout, cache, tmp_path):
    shutil.copytree(cache, tmp_path / "cache")
    (work_dir,) = (tmp_path / "cache").glob("build-cpu-*")
    before = compile_times(work_dir)
    name = "cpu/permute/kernel.h"
    header = checkout / "csrc" / name
    text = header.read_text()
    try:
        header.write_text(f"{text}// edited\n")
        os.utime(header, (0, 0))  # an installer may date what it brings before our objects
        env = {"EXTROPE_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(checkout)}
        reason, path = load(**env)
    finally:
        header.write_text(text)
    assert reason == "None" and Path(path).parent.name != entry(cache).name
    sources = {
        target: command[-1].removeprefix("csrc/")
        for target, command in _build.plan("cpu").objects.items()
    }
    includers = {t for t, source in sources.items() if name in headers(checkout / "csrc", source)}
    assert 1 < len(includers) < len(before)
    after = compile_times(work_dir)
    assert {target for target in after if after[target] != before[target]} == includers


@needs_compiler
def test_only_stable_symbols(cache):
    library = entry(cache) / CPU
    assert not foreign_symbols(library)
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


def test_two_installations_of_the_same_sources_build_one_library(monkeypatch, tmp_path, caplog):
    """Each has a work folder of its own, both have one entry in the cache; who waits says so."""
    library, began, builds = tmp_path / "entry" / CPU, threading.Event(), []

    def build(name, output, *_):
        builds.append(output)
        output.write_bytes(b"half")
        began.set()
        time.sleep(0.3)
        output.write_bytes(b"built")

    monkeypatch.setattr(_ext, "_SILENT_WAIT", 0.01)
    monkeypatch.setattr(_build, "build", build)
    monkeypatch.setattr(_build, "work_key", lambda name: threading.current_thread().name)
    threads = [
        threading.Thread(target=_ext._build_locked, args=("cpu", library), name=f"installation{n}")
        for n in range(2)
    ]
    threads[0].start()
    assert began.wait(10)
    threads[1].start()
    for thread in threads:
        thread.join(10)
    assert len(builds) == 1 and _ext._intact(library) and library.read_bytes() == b"built"
    assert [message.partition(" the cpu")[0] for message in caplog.messages] == [
        "building", "waiting for another process that builds"
    ]  # fmt: skip


@needs_compiler
def test_unwritable_cache_falls_back_to_temporary_folder(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("EXTROPE_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.delenv("EXTROPE_JIT", raising=False)
    monkeypatch.setattr(_build, "build", lambda name, output, *_: output.write_bytes(b"built"))
    monkeypatch.setattr(_ext, "_dlopen", lambda library: None)
    library, private = _ext._load_cached("cpu"), tmp_path / f"extrope_kernels-{os.getuid()}"
    assert library.parent.parent == private and library.read_bytes() == b"built"
    assert private.stat().st_mode & 0o777 == 0o700
    private.chmod(0o777)  # anyone could have put the library there
    with pytest.raises(_build.BuildError, match=r"folder can be used: .* others can write"):
        _ext._load_cached("cpu")


def test_no_home_is_no_folder_here(monkeypatch, tmp_path):
    """As in a container that runs as a number without a name."""

    def nobody(number):
        raise KeyError(number)

    for name in ("EXTROPE_CACHE_DIR", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    private = tmp_path / f"extrope_kernels-{os.getuid()}"
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    assert _ext.cache_dirs() == [private]
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert _ext.cache_dirs() == [tmp_path / "home/.cache/extrope_kernels", private]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    assert _ext.cache_dirs() == [tmp_path / "caches/extrope_kernels", private]
    monkeypatch.setenv("EXTROPE_CACHE_DIR", "~/own")
    assert _ext.cache_dirs() == [tmp_path / "home/own", private]


def test_a_folder_that_cannot_hold_code_is_passed_over(monkeypatch, tmp_path):
    statvfs, noexec = os.statvfs, tmp_path / "noexec"

    def of(path):
        found = list(statvfs(path))
        if path == noexec:
            found[8] |= os.ST_NOEXEC  # f_flag
        return os.statvfs_result(found)

    monkeypatch.setattr(os, "statvfs", of)
    failures = []
    assert list(_ext._usable([noexec, tmp_path / "other"], failures)) == [tmp_path / "other"]
    assert failures == [f"{noexec}: mounted noexec"]


@needs_compiler
@pytest.mark.parametrize(
    ("of", "name", "error", "told"),
    [
        (
            _ext,
            "FileLock",
            NotImplementedError("no flock"),
            "can be used: .* flock; .* flock",
        ),
        (_build, "build", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), ".*No space left.*"),
    ],
)
def test_a_cache_that_cannot_be_written_is_one_line(monkeypatch, tmp_path, of, name, error, told):
    """On a file system without locks, or on a full disk, of which nothing half written is left."""

    def fail(*_, **__):
        raise error

    monkeypatch.setenv("EXTROPE_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("EXTROPE_JIT", raising=False)
    monkeypatch.setattr(_ext, "_temporary_dir", lambda: tmp_path / "temporary")
    monkeypatch.setattr(of, name, fail)
    with pytest.raises(_build.BuildError, match=f"{told}$") as caught:
        _ext._load_cached("cpu")
    assert "\n" not in str(caught.value) and not list(tmp_path.glob("**/*.new"))


def test_load_rejects_unknown_library():
    with pytest.raises(ValueError, match="load: name must be one of"):
        _ext.load("tpu")


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch has CUDA")
def test_cuda_library_says_why_not():
    assert _ext.load("cuda") == "this torch is built without CUDA"


# -------------------------------------------------------------------------------------------------
# Builds that fail

REFUSED = "x.cpp:1: error: «x» is out of luck"
ROTATE = (
    "import torch, extrope_kernels as e; x = torch.ones(1, 3, 2, 8)\n"
    "for _ in range(2): y = e.apply_rope(x, e.methods.rope(8))\n"
    "print(y.shape == x.shape, ascii(e._ext.load('cpu')))"
)


def rotate(**env: str) -> tuple[str, list[str]]:
    """Why a process that rotates has no library, and what it tells, its warnings' code left out."""
    out, err = (process := start(ROTATE, **env)).communicate(timeout=3600)
    assert out.startswith("True ") and process.returncode == 0, err
    told = [line for line in err.splitlines() if not line.startswith("  ")]
    return ast.literal_eval(out.removeprefix("True ")), told


def test_a_failed_build_is_told_and_ops_run(no_library, tmp_path):
    """In a line, in whatever locale."""
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    env = {"EXTROPE_CACHE_DIR": str(tmp_path / "cache"), "CXX": broken(tmp_path, REFUSED)}
    _, (building, warned) = rotate(**env, **ascii_only)
    assert building.startswith("building the cpu library, once, into ")
    log = entry(tmp_path / "cache") / "build.log"
    why = r"broken failed: x.cpp:1: error: \xabx\xbb is out of luck"
    assert warned.endswith(
        "RuntimeWarning: extrope_kernels has no cpu library here, its ops run as the reference, "
        f"which is slow: {why} (log: {log})"
    )
    assert "-std=" in log.read_text("utf-8")


def test_a_missing_compiler_is_one_line(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setenv("CXX", "")
    with pytest.raises(_build.BuildError, match=r"^no C\+\+ compiler found \(c\+\+, g\+\+, clang"):
        _build.find_compiler()


def test_warnings_are_for_what_was_to_be_expected(monkeypatch):
    """One for each library, and none where nothing was asked for or the caller shows the reason."""

    def warned(name: str, error: Exception, quiet: bool = False) -> list[str]:
        def fail(name):
            raise error

        monkeypatch.setattr(_ext, "_load", fail)
        monkeypatch.setattr(_ext, "_reasons", {})
        monkeypatch.setattr(_ext, "_watchers", {})
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert [_ext.load(name, quiet=quiet) for _ in range(2)] == [str(error)] * 2
        return [str(warning.message) for warning in caught]

    failure = _build.BuildError("nvcc failed: why (log: here)")
    expected = "extrope_kernels has no cuda library here, its ops run as Triton's kernels: "
    assert warned("cuda", failure) == [f"{expected}{failure}"]
    assert warned("cuda", failure, quiet=True) == []
    assert warned("cpu", _ext._NotExpected("EXTROPE_JIT=0")) == []


def test_neither_no_nvcc_nor_a_forbidden_build_is_to_be_warned_of(no_library, monkeypatch):
    def missing():
        raise _build.BuildError("nvcc not found")

    monkeypatch.delenv("EXTROPE_JIT", raising=False)
    monkeypatch.setattr(_ext.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_build, "find_nvcc", missing)
    with pytest.raises(_ext._NotExpected, match=r"^nvcc not found$"):
        _ext._load_cached("cuda")
    monkeypatch.setattr(_build, "source_dir", lambda: Path("/nonexistent"))
    with pytest.raises(_ext._NotExpected, match=r"no sources$"):
        _ext._load_cached("cuda")
    monkeypatch.setenv("EXTROPE_JIT", "0")
    with pytest.raises(_ext._NotExpected, match=r"^not in the package, and EXTROPE_JIT=0 forbids"):
        _ext._load_cached("cpu")
