"""Find, build on first use, and load the compiled libraries, or say in one line why not."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import re
import stat
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import AcquireReturnProxy, FileLock, Timeout

from . import _build

_log = logging.getLogger(__name__)
_lock = threading.RLock()
_thread = threading.local()
_reasons: dict[str, str | None] = {}
_paths: dict[str, Path] = {}
_watchers: dict[str, list[Callable[[str | None], None]]] = {}
_BUILD_TIMEOUT = 600.0  # seconds to wait for another process that builds the same library
_SILENT_WAIT = 2.0  # seconds before a message says so
_INSTEAD = {
    "cpu": "its ops run as the reference, which is slow",
    "cuda": "its ops run as Triton's kernels",
}


class _NotExpected(_build.BuildError):
    """A library is missing that no user would expect: no reason to warn."""


def load(name: str, *, quiet: bool = False) -> str | None:
    """Load the library `name` ("cpu" or "cuda"), building it if need be.

    quiet: do not warn of a failure, since the caller shows the reason.

    Returns: None if it is loaded, else the reason in one line. Later calls repeat the answer.
    """
    if name not in _build.LIBRARIES:
        raise ValueError(f"load: name must be one of {list(_build.LIBRARIES)}, got {name!r}")
    with _lock:
        if name not in _reasons:
            expected = True
            try:
                _paths[name] = _load(name)
                _reasons[name] = None
            except (_build.BuildError, OSError) as error:
                _reasons[name] = str(error)
                expected = not isinstance(error, _NotExpected)
            why = _reasons[name]
            for settled in _watchers.pop(name, []):
                settled(why)
            if why is not None and expected and not quiet:
                told = f"extrope_kernels has no {name} library here, {_INSTEAD[name]}: {why}"
                warnings.warn(told, RuntimeWarning, stacklevel=2)
        return _reasons[name]


@contextmanager
def deferred() -> Iterator[None]:
    """Leave libraries unloaded in a block: this thread's ops run as the reference where one lacks.

    For trials on a few tokens, which are not worth the minutes of a build.
    """
    before = getattr(_thread, "deferred", False)
    _thread.deferred = True
    try:
        yield
    finally:
        _thread.deferred = before


def is_deferred(name: str) -> bool:
    """Return True if the library `name` is not to be loaded now, and is not yet."""
    return name not in _reasons and getattr(_thread, "deferred", False)


def path(name: str) -> Path:
    """Return the file of a loaded library."""
    return _paths[name]


def watch(name: str, settled: Callable[[str | None], None]) -> None:
    """Call `settled(reason)` once `name` is loaded (reason None) or cannot be."""
    _watchers.setdefault(name, []).append(settled)


def status() -> dict[str, str]:
    """Return a line per library: the path it is loaded from, or why it is not."""
    reasons = {name: load(name, quiet=True) for name in _build.LIBRARIES}
    return {
        name: f"loaded from {_paths[name]}" if why is None else why for name, why in reasons.items()
    }


def cache_dirs() -> list[Path]:
    """List folders for built libraries, best first: the user's cache, a private temporary one."""
    user = [folder] if (folder := _user_dir()) else []
    # Users have no numbers on Windows, where nothing is built.
    return [*user, _temporary_dir()] if hasattr(os, "getuid") else user


def _user_dir() -> Path | None:
    if chosen := os.environ.get("EXTROPE_CACHE_DIR"):
        return Path(os.path.expanduser(chosen))  # a Dockerfile's ENV has no shell
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    folder = xdg if os.path.isabs(xdg) else os.path.expanduser("~/.cache")
    # "~" stays if the user has no home, as in a container that runs as a number without a name. A
    # folder called "~" here would be shared by everybody who works here.
    return Path(folder) / "extrope_kernels" if os.path.isabs(folder) else None


def _temporary_dir() -> Path:
    return Path(os.environ.get("TMPDIR") or "/tmp") / f"extrope_kernels-{os.getuid()}"


def _load(name: str) -> Path:
    if name == "cuda" and torch.version.cuda is None:
        raise _NotExpected("this torch is built without CUDA")
    failures = []
    packaged = Path(__file__).resolve().parent / _build.LIBRARIES[name]
    if packaged.exists():
        if (why := _dlopen(packaged)) is None:
            return packaged
        failures.append(why)
    try:
        return _load_cached(name)
    except _build.BuildError as error:
        if not failures:
            raise
        raise _build.BuildError("; ".join([*failures, str(error)])) from error


def _load_cached(name: str) -> Path:
    if os.environ.get("EXTROPE_JIT") == "0":
        raise _NotExpected("not in the package, and EXTROPE_JIT=0 forbids to build it")
    if name == "cuda":
        _check_cuda()
    entry = f"{name}-{_build.key(name)}"
    failures: list[str] = []
    for folder in _usable(cache_dirs(), failures):
        library = folder / entry / _build.LIBRARIES[name]
        try:
            if not _intact(library):
                _build_locked(name, library)
        except (OSError, NotImplementedError) as error:  # filelock: timeout, or no locks there
            failures.append(f"{folder}: {getattr(error, 'strerror', None) or error}")
            continue
        if why := _dlopen(library):
            raise _build.BuildError(why)
        return library
    raise _build.BuildError("no cache folder can be used: " + "; ".join(failures))


def _check_cuda() -> None:
    """Raise without a CUDA device, sources or nvcc; Triton is used instead."""
    if not torch.cuda.is_available():
        raise _NotExpected("not in the package, and not built here: no CUDA device")
    if not _build.source_dir().is_dir():
        raise _NotExpected("not in the package, and not built here: no sources")
    try:
        _build.find_nvcc()
    except _build.BuildError as error:
        raise _NotExpected(str(error)) from error


def _usable(folders: list[Path], failures: list[str]) -> Iterator[Path]:
    for folder in folders:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            info, mount = folder.stat(), os.statvfs(folder)
        except OSError as error:
            failures.append(f"{folder}: {error.strerror}")
            continue
        # Files in it are loaded as code, and anyone can make such a folder under /tmp.
        others = info.st_uid != os.getuid() or info.st_mode & (stat.S_IWOTH | stat.S_IWGRP)
        if folder == _temporary_dir() and others:
            failures.append(f"{folder}: others can write to it")
            continue
        if mount.f_flag & os.ST_NOEXEC:
            failures.append(f"{folder}: mounted noexec")
            continue
        yield folder


def _build_locked(name: str, library: Path) -> None:
    entry = library.parent
    # Objects are kept for the next build, after an edit of the sources or a failure.
    work_dir = entry.parent / f"build-{name}-{_build.work_key(name)}"
    for folder in (entry, work_dir):
        folder.mkdir(exist_ok=True)
    # An entry serves all installations of the same sources; each has its own work folder.
    with _locked(name, work_dir), _locked(name, entry):
        if _intact(library):  # another process built it meanwhile
            return
        _log.warning("building the %s library, once, into %s", name, entry)
        built = entry / f"{library.name}.new"
        try:
            _build.build(name, built, work_dir, entry / "build.log")
            _digest_path(library).write_text(_digest(built))
            os.replace(built, library)
        finally:
            built.unlink(missing_ok=True)


def _locked(name: str, folder: Path) -> AcquireReturnProxy:
    """Wait until no other process holds a folder's lock; return it, to be left by `with`."""
    lock = FileLock(folder / "lock", timeout=_BUILD_TIMEOUT)
    try:
        return lock.acquire(timeout=_SILENT_WAIT)
    except Timeout:
        _log.warning("waiting for another process that builds the %s library", name)
        return lock.acquire()


def _digest_path(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _digest(library: Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()


def _intact(library: Path) -> bool:
    # Loading a truncated library kills the process with SIGBUS.
    try:
        return _digest_path(library).read_text() == _digest(library)
    except FileNotFoundError:
        return False


def _dlopen(library: Path) -> str | None:
    """Load a library; it registers its ops if its kernels can run here."""
    try:
        loaded = ctypes.CDLL(str(library))
    except OSError as error:
        return f"{library.name} did not load: {' '.join(str(error).split())[:300]}"
    loaded.extrope_signatures.restype = loaded.extrope_register.restype = ctypes.c_char_p
    for signature in loaded.extrope_signatures().decode().splitlines():
        if why := _other_arguments(signature):
            return f"{library.name} is of another version: {why}"
    why = loaded.extrope_register(int(torch.cuda.is_available()))
    return None if why is None else f"{library.name} cannot run here: {why.decode()}"


def _other_arguments(signature: str) -> str | None:
    """Return how the arguments of a C++ function differ from its op's schema, or None.

    signature: the op's name and the function's parameters, which have the schema's names in its
        order. Only cu_seqlens has the name that other ops have in C++.
    """
    name, _, parameters = signature.partition(" ")
    taken = re.findall(r"(\w+) *(?:,|$)", re.sub(r"<[^>]*>", "", parameters))
    arguments = getattr(torch.ops.extrope, name).default._schema.arguments
    wanted = [x.name.replace("cu_seqlens_q", "cu_seqlens") for x in arguments]
    if taken == wanted:
        return None
    return (
        f"{name} takes {', '.join(taken)}, and its schema in Python has {', '.join(wanted)}; lists "
        "of arguments are in csrc/common/attention_args.h and rope_args.h"
    )
