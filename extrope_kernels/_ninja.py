"""Compiles what is out of date in a folder: how `_build.py` runs ninja."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

# Else what compilers print, by which they and their errors are told apart, is the user's language.
IN_ENGLISH = {"LC_ALL": "C"}
# What is written where a build fails for what goes on beside it: another may well succeed.
_STOPPED = (
    r"interrupted by user|ninja was killed|\bKilled\b|Kill signal|(Terminated|Hangup) signal|"
    r"No space left on device|Disk quota exceeded|Cannot allocate memory|out of memory|"
    r"memory exhausted"
)


def run(
    ninja: str,
    objects: Mapping[str, Sequence[str]],
    library: str,
    link: Sequence[str],
    folder: Path,
    log: Path,
) -> str | None:
    """Compile `objects`, each by a command that ends in its source, and link `library` from them.

    All paths are relative to `folder`. The file `log` gets what ninja prints, and a terminal its
    count of steps. Returns: None, or the line that says why it failed.
    """
    (folder / "build.ninja").write_bytes(os.fsencode(_file(objects, library, link)))
    # -v: the log holds whole commands.
    printed, failed = _run([ninja, "-v"], folder, log)
    return _first_error(printed) if failed else None


def was_stopped(log: Path) -> bool:
    """Whether a failed build was cut short, as by Ctrl-C or a full disk: the next may succeed."""
    return re.search(_STOPPED, log.read_text("utf-8", errors="replace")) is not None


def copy_sources(copies: Mapping[Path, Path], folder: Path) -> None:
    """Bring a folder of copies up to date, by content: installers date as they like, ninja goes
    by dates.
    """
    for path in folder.rglob("*"):
        if path.is_file() and path not in copies:
            path.unlink()
    for path, source in copies.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        content = source.read_bytes()
        if not path.exists() or path.read_bytes() != content:
            path.write_bytes(content)


def _file(objects: Mapping[str, Sequence[str]], library: str, link: Sequence[str]) -> str:
    lines = [
        "rule compile",
        "  command = $compile -MD -MF $out.d -o $out",
        "  depfile = $out.d",
        "  deps = gcc",  # in whose format nvcc writes them too
        "rule link",
        # Objects come before the libraries: the linker looks only ahead for what they lack.
        f"  command = {_escaped(link[:1])} $in {_escaped(link[1:])} -o $out",
        f"build {library}: link {' '.join(objects)}",
    ]
    for target, command in objects.items():
        lines += [f"build {target}: compile {command[-1]}", f"  compile = {_escaped(command)}"]
    return "\n".join([*lines, ""])


def _escaped(command: Sequence[str]) -> str:
    return shlex.join(command).replace("$", "$$")


def _run(command: list[str], folder: Path, log: Path) -> tuple[list[str], bool]:
    """What ninja printed, and whether it failed."""
    terminal = sys.stderr is not None and sys.stderr.isatty()
    printed = []
    with (
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **IN_ENGLISH, "NINJA_STATUS": "[%f/%t] "},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
        ) as process,
    ):
        try:
            for line in process.stdout or ():
                file.write(line)
                printed.append(line.strip())
                if terminal and (count := re.match(r"\[\d+/\d+\]", line)):
                    print(f"\r{count[0]}", end="", file=sys.stderr, flush=True)
        except BaseException:  # such as KeyboardInterrupt
            # Else the compilers would go on, and write where the next build does.
            process.terminate()
            process.communicate()
            raise
        if process.wait() < 0:
            printed.append("ninja was killed")
            file.write(f"{printed[-1]}\n")
    if terminal:
        print(file=sys.stderr)
    return printed, process.returncode != 0


def _first_error(printed: list[str]) -> str:
    """Of FAILED and the target, the command, and what that wrote, the line that says why."""
    failed = next((i for i, line in enumerate(printed) if line.startswith("FAILED:")), -1)
    after = printed[failed + 2 :] if failed >= 0 else printed
    wrote = [line for line in after if line and not line.startswith("ninja: build stopped")]
    if not wrote:
        return "it wrote nothing"
    # "undefined": the linker's own word, before its caller's "error: ld returned 1".
    return next((x for x in wrote if re.search("error|undefined", x, re.I)), wrote[-1])[:300]
