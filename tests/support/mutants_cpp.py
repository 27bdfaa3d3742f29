"""Mutants of the C++ kernels, for mutants.py: edits of one place, by rule.

Each is built, which takes a minute, and meets the tests of its folder; one that does not compile
is none. universalmutator was looked at: it makes such edits too, mostly of types and templates, and
builds nothing.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

SOURCES = ("csrc/cpu", "csrc/common")
# By folder; those that all share are tested by all.
TESTS = {
    "cache": ["cache", "decode"],
    "attention": ["attention"],
    "decode": ["decode"],
    "linear_attention": ["permuteformer"],
    "permute": ["permuteformer"],
    "rope": ["rope"],
}
ALL = ["rope", "cache", "permuteformer", "attention", "decode"]
RULES = (
    (r" \+ ", " - "),
    (r" - ", " + "),
    (r" \* ", " + "),
    (r" / ", " * "),
    (r" \+= ", " -= "),
    (r" < ", " <= "),
    (r" <= ", " < "),
    (r" > ", " >= "),
    (r" >= ", " > "),
    (r" == ", " != "),
    (r" != ", " == "),
    (r" && ", " || "),
    (r" \|\| ", " && "),
    (r"\bmin\(", "max("),
    (r"\bmax\(", "min("),
    (r"\btrue\b", "false"),
    (r"\bfalse\b", "true"),
    (r"(?<=[ (\[,-])(\d+)(?=[ )\],;])", r"(\1 + 1)"),
    (r"\bif \((.+)\)", r"if (!(\1))"),
    (r"^( *)([\w.\->\[\]]+(\(.*\)| [+*|-]?= .*);)$", r"\1/* \2 */"),
)
# Comments, declarations, and what is decided as it compiles.
DULL = r"\s*(//|#|\}|using |namespace |template|static_assert|static constexpr|constexpr)"
LOAD = "from extrope_kernels import _ext; print(_ext.load('cpu', quiet=True))"


def run(folder: Path, known: set[str], count: int) -> None:
    """Let `count` mutants meet their tests, in a worktree below `folder`."""
    tree, results = folder / "tree", folder / "csrc.json"
    path = os.pathsep.join((str(tree), os.environ.get("PYTHONPATH", "")))
    environment = {**os.environ, "PYTHONPATH": path, "EXTROPE_CACHE_DIR": str(folder / "cache")}
    environment["OMP_WAIT_POLICY"] = "passive"
    candidates = [mutant for mutant in mutants(tree) if mutant[0] not in known]
    random.Random(0).shuffle(candidates)
    done: dict[str, str] = json.loads(results.read_text()) if results.exists() else {}
    progress = tqdm(total=count, initial=sum(said != "not built" for said in done.values()))
    for key, source, text in candidates:
        if progress.n >= count:
            break
        if key in done:
            continue
        original = source.read_text()
        try:
            source.write_text(text)
            done[key] = meet(tree, environment, TESTS.get(source.parent.name, ALL))
        finally:
            source.write_text(original)
        results.write_text(json.dumps(done, indent=1))
        progress.update(done[key] != "not built")
    progress.close()
    survivors = [key for key, said in done.items() if said == "survived"]
    ran = sum(said != "not built" for said in done.values())
    print(f"csrc: {ran - len(survivors)} of {ran} mutants killed")
    for key in survivors:
        print(f"  survived: {key}")


def mutants(tree: Path) -> Iterator[tuple[str, Path, str]]:
    """Yield each mutant's name, which stays as lines move, its source and the source's text."""
    for source in sorted(path for folder in SOURCES for path in (tree / folder).rglob("*.[ch]*")):
        lines = source.read_text().splitlines(keepends=True)
        for number, line in enumerate(lines):
            if re.match(DULL, line):
                continue
            code = line.split(" //")[0].rstrip("\n")
            for rule, replacement in RULES:
                for match in re.finditer(rule, code):
                    edited = code[: match.start()] + match.expand(replacement)
                    edited += line[match.end() :]
                    key = f"{source.relative_to(tree)}: {line.strip()} -> {edited.strip()}"
                    yield key, source, "".join([*lines[:number], edited, *lines[number + 1 :]])


def meet(tree: Path, environment: dict[str, str], tests: list[str]) -> str:
    """Build the library and run the tests: "not built", "killed" or "survived"."""
    call = {"cwd": tree, "env": environment, "check": False, "capture_output": True, "text": True}
    built = subprocess.run([sys.executable, "-c", LOAD], **call)
    if built.stdout.split() != ["None"]:
        return "not built"
    # A mutant may loop for ever, in a worker; timeout ends them all.
    python = ["timeout", "900", sys.executable]
    command = [*python, "-m", "pytest", "-x", "-q", "-n", "2", "-p", "no:cacheprovider"]
    names = [f"tests/{name}" for name in tests]
    tested = subprocess.run([*command, "-k", "not triton and not reference", *names], **call)
    return "killed" if tested.returncode else "survived"
