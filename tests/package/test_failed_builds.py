"""A first-use build that fails: what is said of it, and that no other process tries the same."""

from __future__ import annotations

import io
import sys
import time
import warnings
from pathlib import Path

import pytest
from builds import LOAD, broken, has, load, start

from extrope_kernels import _build, _ext, _ninja

REFUSED = "x.cpp:1: error: out of luck"
ROTATE = (
    "import torch, extrope_kernels as e; x = torch.ones(1, 3, 2, 8)\n"
    "for _ in range(2): y = e.apply_rope(x, e.methods.rope(8))\n"
    "print(y.shape == x.shape)"
)
needs_ninja = pytest.mark.skipif(not has(_build.find_ninja), reason="no ninja")
pytestmark = pytest.mark.usefixtures("no_library")


def entry(cache: Path) -> Path:
    (folder,) = cache.glob("cpu-*")
    return folder


def rotate(**env: str) -> list[str]:
    """What a process that rotates prints to stderr, its warnings' code left out."""
    out, err = (process := start(ROTATE, **env)).communicate(timeout=60)
    assert out == "True\n" and process.returncode == 0, err
    return [line for line in err.splitlines() if not line.startswith("  ")]


@pytest.fixture
def failing(tmp_path, monkeypatch):
    """A cache folder, and a function that builds into it by a compiler that writes such a line."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("EXTROPE_CACHE_DIR", str(cache))
    monkeypatch.delenv("EXTROPE_JIT", raising=False)

    def build(line: str, name: str = "first") -> str:
        (tmp_path / name).mkdir(exist_ok=True)
        monkeypatch.setenv("CXX", broken(tmp_path / name, line))
        with pytest.raises(_build.BuildError) as error:
            _ext._load_cached("cpu")
        assert "\n" not in str(error.value)
        return str(error.value)

    return cache, build


def test_a_failed_build_is_told_and_not_tried_again(tmp_path):
    env = {"EXTROPE_CACHE_DIR": str(tmp_path / "cache"), "CXX": broken(tmp_path, REFUSED)}
    building, warned = rotate(**env)
    log = entry(tmp_path / "cache") / "build.log"
    assert building.startswith("building the cpu library, once, into ")
    why = f"broken failed: {REFUSED} (log: {log})"
    assert warned.endswith(
        "RuntimeWarning: extrope_kernels has no cpu library here, its ops run as the reference, "
        f"which is slow: {why}"
    )
    assert "-std=" in log.read_text()
    (warned,) = rotate(**env)  # another process
    again = f"in an earlier process; not tried again until {log.parent} is removed"
    assert warned.endswith(f"which is slow: {why}, {again}")
    assert "-std=" in log.read_text()


def test_what_a_compiler_writes_need_not_fit_the_locale(tmp_path):
    cache, line = tmp_path / "cache", "x.cpp:1: error: «x» was not declared"
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    env = {"EXTROPE_CACHE_DIR": str(cache), "CXX": broken(tmp_path, line), **ascii_only}
    _, warned = rotate(**env)
    assert r"broken failed: x.cpp:1: error: \xabx\xbb was not declared (log: " in warned
    for name in ("build.log", "failed"):
        assert line in (entry(cache) / name).read_text("utf-8")


@needs_ninja
def test_tools_write_english_whatever_the_language_is(monkeypatch, tmp_path):
    """By it their versions are compared, and a full disk is told from an error in the sources."""
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    compiler = tmp_path / "polyglot"
    compiler.write_text(
        '#!/bin/sh\n[ "$LC_ALL" = C ] && echo "No space left on device" || echo "Speicher voll"\n'
        '[ "$1" = --version ]\n'
    )
    compiler.chmod(0o755)
    assert _build.output([str(compiler), "--version"]) == "No space left on device\n"
    (tmp_path / "a.cpp").touch()
    objects, log = {"a.o": [str(compiler), "a.cpp"]}, tmp_path / "build.log"
    build = (_build.find_ninja(), objects, "lib.so", ["c++"], tmp_path, log)
    assert _ninja.run(*build) == "No space left on device"
    assert _ninja.was_stopped(log)


def test_no_compiler_is_told(tmp_path):
    env = {"EXTROPE_CACHE_DIR": str(tmp_path), "PATH": "/nonexistent", "CXX": ""}
    for _ in range(2):
        (warned,) = rotate(**env)
        assert warned.endswith("which is slow: no C++ compiler found (c++, g++, clang++)")
    assert load(**env)[0] == "no C++ compiler found (c++, g++, clang++)"
    assert rotate(**env, EXTROPE_JIT="0") == []


def test_of_two_processes_one_tries(tmp_path):
    env = {"EXTROPE_CACHE_DIR": str(tmp_path / "cache"), "CXX": broken(tmp_path, REFUSED)}
    processes = [start(LOAD, **env) for _ in range(2)]
    results = [process.communicate(timeout=60) for process in processes]
    assert sum("building the cpu library" in err for _, err in results) == 1
    assert all(out.startswith(f"broken failed: {REFUSED} (log: ") for out, _ in results)
    assert sum("not tried again" in out for out, _ in results) == 1


def test_removing_the_folder_tries_again(failing):
    cache, build = failing
    build(REFUSED)
    assert "not tried again" in build(REFUSED)
    for path in entry(cache).iterdir():
        path.unlink()
    entry(cache).rmdir()
    assert "not tried again" not in build(REFUSED)


def test_another_compiler_or_torch_is_tried(failing, monkeypatch):
    _, build = failing
    build(REFUSED)
    assert "not tried again" not in build(REFUSED, "second")
    assert "not tried again" in build(REFUSED, "second")
    monkeypatch.setattr(_ext.torch, "__version__", "99.0")
    assert "not tried again" not in build(REFUSED, "second")


@pytest.mark.parametrize(
    "line",
    [
        "g++: fatal error: Killed signal terminated program cc1plus",
        "nvcc error : cicc died due to signal 9 (Kill signal)",
        "collect2: fatal error: ld terminated with signal 9 [Killed]",
        "fatal error: error writing to /tmp/x.s: No space left on device",
        "cc1plus: out of memory allocating 65536 bytes",
        "ninja: build stopped: interrupted by user.",
    ],
)
def test_a_build_that_was_cut_short_is_tried_again(failing, line):
    _, build = failing
    build(line)
    assert "not tried again" not in build(line)


def test_ctrl_c_is_no_failure(failing, monkeypatch):
    cache, build = failing

    def interrupt(name, output, work_dir, log):
        log.write_text("[0/47]\n")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_build, "build", interrupt)
        with pytest.raises(KeyboardInterrupt):
            _ext._load_cached("cpu")
    assert not (entry(cache) / "failed").exists()
    assert "not tried again" not in build(REFUSED)


@needs_ninja
def test_an_interrupted_build_leaves_no_compiler_running(monkeypatch, tmp_path):
    """Even where Python alone was told: it would write where the next build does."""

    class Terminal(io.StringIO):
        def isatty(self):
            return True

        def write(self, text):  # the first of two files is compiled
            raise KeyboardInterrupt

    scripts = {
        "fast": "until [ -s pid ]; do sleep 0.01; done",
        "slow": "echo $$ > pid; sleep 60",
    }
    for name, does in scripts.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
        (tmp_path / f"{name}.cpp").touch()
    objects = {f"{name}.o": [f"./{name}", f"{name}.cpp"] for name in scripts}
    build = (_build.find_ninja(), objects, "lib.so", ["c++"], tmp_path, tmp_path / "build.log")
    monkeypatch.setattr(sys, "stderr", Terminal())
    with pytest.raises(KeyboardInterrupt):
        _ninja.run(*build)
    command = Path("/proc", (tmp_path / "pid").read_text().strip(), "cmdline")
    deadline = time.monotonic() + 5
    while command.exists() and command.read_bytes():  # nothing is left there of a zombie
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_killed_ninja_is_told_from_one_that_fails(tmp_path):
    log = tmp_path / "build.log"
    for end, stopped in (("kill -9 $$", True), ("exit 1", False)):
        ninja = tmp_path / "ninja"
        ninja.write_text(f"#!/bin/sh\necho '[1/2] c++ -c a.cpp'\n{end}\n")
        ninja.chmod(0o755)
        assert _ninja.run(str(ninja), {}, "lib.so", ["c++"], tmp_path, log)
        assert _ninja.was_stopped(log) == stopped


def test_a_missing_tool_is_not_remembered(failing, monkeypatch):
    cache, build = failing
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "ninja", None)
        patch.setattr(
            _build.shutil, "which", lambda name, path=None: None if "ninja" in name else name
        )
        assert build(REFUSED) == "ninja not found: pip install ninja"
    assert "not tried again" not in build(REFUSED)
    assert (entry(cache) / "failed").exists()


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


def test_no_nvcc_is_nothing_to_warn_of(monkeypatch):
    def missing():
        raise _build.BuildError("nvcc not found")

    monkeypatch.delenv("EXTROPE_JIT", raising=False)
    monkeypatch.setattr(_ext.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_build, "find_nvcc", missing)
    with pytest.raises(_ext._NotExpected, match=r"^nvcc not found$"):
        _ext._load_cached("cuda")


def test_info_shows_the_reason_and_does_not_warn(tmp_path):
    path = broken(tmp_path, REFUSED)
    process = start(
        "from extrope_kernels import cli; cli.main(['info'])",
        EXTROPE_CACHE_DIR=str(tmp_path / "cache"),
        CXX=path,
    )
    out, err = process.communicate(timeout=60)
    assert f"broken failed: {REFUSED}" in out and "RuntimeWarning" not in err
