"""The steps of docs/guide/add_method.md, followed to the letter in a copy: no more is needed."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STEP = re.compile(r"^\d\. `(?P<path>[^`]+)`|^```(?P<kind>\w+)\n(?P<text>.*?)^```", re.M | re.S)


@pytest.fixture
def checkout(tmp_path):
    """A copy of what a recipe may change; the C++ library is that of the same sources."""
    unused = shutil.ignore_patterns("__pycache__", "results")
    for folder in ("extrope_kernels", "tests", "bench"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=unused)
    (tmp_path / "csrc").symlink_to(ROOT / "csrc")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def steps(title):
    """(path, kind of code block, its text) of every block of a section."""
    page = (ROOT / "docs" / "guide" / "add_method.md").read_text()
    section = page.split(f"## {title}\n")[1].split("\n## ")[0]
    path = None
    for found in STEP.finditer(section):
        path = found["path"] or path
        if found["kind"]:
            yield path, found["kind"], found["text"]


def follow(title, checkout):
    """Write the new files and change the old ones; return the paths of both."""
    created, changed = [], []
    for path, kind, text in steps(title):
        file = checkout / path
        if kind == "diff":
            changed.append(path)
            old = "".join(line[1:] for line in text.splitlines(True) if line[:1] == " ")
            new = "".join(line[1:] for line in text.splitlines(True))
            assert file.read_text().count(old) == 1, f"{path} has no place for\n{text}"
            file.write_text(file.read_text().replace(old, new))
        else:
            assert not file.exists(), f"{path} is there already"
            created.append(path)
            file.write_text(text)
    return created, sorted(set(changed))


def passed(checkout, words, *files):
    """How many tests passed of those that are about `words`."""
    options = ["-qx", "-p", "no:cacheprovider", "-m", "not thorough", "-k", words]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files],
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return int(re.search(r"(\d+) passed", done.stdout)[1])


ROTATED = """
import pytest, torch
from extrope_kernels import apply_rope, methods
from extrope_kernels.testing import device

def test_slow_half_is_what_backends_rotate_by(backend):
    freqs, x = methods.slow_half(64, factor=4.0).to(device()), torch.randn(1, 9, 2, 64).to(device())
    got, want = (apply_rope(x, freqs, backend=name) for name in (backend, "reference"))
    torch.testing.assert_close(got, want)
    assert not torch.allclose(got, apply_rope(x, methods.rope(64).to(device())))
"""


TESTS = ("tests/pages/test_tables.py", "tests/all_ops/test_wrong_arguments.py")
# By title: the file that is new, those that change, and the tests that are about what is new.
RECIPES = {
    "Add a method": (
        "extrope_kernels/methods/slow_half.py",
        [
            "bench/gallery.py",
            "extrope_kernels/methods/__init__.py",
            "tests/support/data/method_vectors.json",
            "tests/support/method_examples.py",
        ],
        ("tests/methods", "tests/rope/test_slow_half.py", *TESTS),
    ),
    "Add a score method": (
        "extrope_kernels/scores/apart.py",
        [
            "bench/gallery.py",
            "extrope_kernels/scores/__init__.py",
            "tests/support/score_examples.py",
        ],
        (
            "tests/scores",
            "tests/attention/test_attention.py",
            "tests/attention/test_attention_gradients.py",
            "tests/decode/test_decode.py",
            *TESTS,
        ),
    ),
}


@pytest.mark.parametrize("title", RECIPES)
def test_the_steps_are_one_new_file_and_few_entries(title, checkout):
    new, entries, _ = RECIPES[title]
    assert follow(title, checkout) == ([new], entries)


@pytest.mark.thorough
@pytest.mark.parametrize("title", RECIPES)
def test_the_steps_are_enough(title, checkout):
    new, _, tests = RECIPES[title]
    follow(title, checkout)
    (checkout / "tests/rope/test_slow_half.py").write_text(ROTATED)
    words = f"{Path(new).stem} or cover or every_method or public"
    assert passed(checkout, words, *tests) > 30


def test_the_places_of_an_option_are_the_files_that_name_it():
    page = (ROOT / "docs" / "guide" / "add_method.md").read_text()
    section = page.split("## Add an option of attention\n")[1]
    listed = set(re.findall(r"`((?:extrope_kernels|csrc|tests)/[^`]+)`", section))
    assert all((ROOT / path).exists() for path in listed)
    sources = [
        path for folder in ("extrope_kernels", "csrc") for path in (ROOT / folder).rglob("*")
    ]
    named = {
        path.relative_to(ROOT).as_posix()
        for path in sources
        if path.suffix in (".py", ".h", ".cpp") and re.search(r"\bsoftcap\b", path.read_text())
    }
    assert {path for path in listed if not path.startswith("tests/")} == named
