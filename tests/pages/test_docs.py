"""Every Python block of README.md and docs/ runs, page by page, and every link leads somewhere.

Blocks of a page share their names and run in order, in a folder that has a tiny Llama at
path/to/model and at the name that README takes from the hub. Each of README's runs alone. One that
cannot run here follows a line `<!-- skip: why -->`.
"""

from __future__ import annotations

import inspect
import pkgutil
import re
import runpy
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import readme
import torch

import extrope_kernels
from extrope_kernels import distributed, methods, positions, scores
from extrope_kernels.integrations import transformers

ROOT = Path(__file__).parents[2]
PAGES = readme.pages(ROOT)
README = ROOT / "README.md"
BLOCK = re.compile(r"(<!-- skip: [^\n]+ -->\n+)?^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[str]:
    """Return those that run, with empty lines in front: errors then name the page's own lines."""
    text = page.read_text()
    found = (block for block in BLOCK.finditer(text) if not block[1])
    return ["\n" * text.count("\n", 0, block.start(2)) + block[2] for block in found]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where blocks run."""
    hugging_face = pytest.importorskip("transformers")
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    config = hugging_face.LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("docs")
    model = hugging_face.LlamaForCausalLM(config)
    tokenizer = Tokenizer(WordLevel({"Your": 0, "long": 1, "text.": 2}, unk_token="text."))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    for name in ("path/to/model", "HuggingFaceTB/SmolLM2-135M-Instruct"):
        model.save_pretrained(path / name)
        words = hugging_face.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
        words.save_pretrained(path / name)
    return path


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=name)
def test_the_blocks_of_a_page_run(page, folder, monkeypatch):
    monkeypatch.chdir(folder)
    torch.manual_seed(0)
    names: dict[str, object] = {"__name__": "page"}
    for block in blocks(page):
        if page == README:
            names = {"__name__": "page"}
        exec(compile(block, name(page), "exec"), names)


def test_models_that_docs_models_names_rotate_without_rope_parameters():
    hugging_face = pytest.importorskip("transformers")
    told = re.search(r"^(.+) rotate, but", (ROOT / "docs/models.md").read_text(), re.MULTILINE)[1]
    names = re.findall(r"[\w-]+", told.replace(" and ", " "))
    assert len(names) == 4
    for model_type in (name.lower().replace("-", "") for name in names):
        config = hugging_face.AutoConfig.for_model(model_type)
        assert not hasattr(config, "rope_parameters"), model_type
        assert model_type == "esm" or not hasattr(config, "rope_theta"), model_type


def test_links_of_pages_beside_the_site_lead_somewhere():
    """Those of the site are its strict build's."""
    for page in (README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"):
        for link in LINK.findall(BLOCK.sub("", page.read_text())):
            url = urlsplit(link)
            assert url.scheme == "https" or (page.parent / url.path).exists(), link


def test_figures_are_those_of_the_measured_files():
    """Or run python bench/readme.py."""
    assert not [name(page) for page in readme.stale()]


def api() -> dict[str, str]:
    """The directives of the API's pages, each with what follows it up to the next one."""
    pages = (page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    parts = (re.split(r"^::: (\S+)$", page, flags=re.MULTILINE)[1:] for page in pages)
    return {path: after for part in parts for path, after in zip(part[::2], part[1::2])}


def test_every_public_name_has_its_place_in_the_api():
    placed = {path.rpartition(".")[2] for path in api()}
    modules = {"methods", "positions", "scores", "query_scale"}
    packages = (extrope_kernels, distributed, positions, scores, methods, transformers)
    public = {name for package in packages for name in package.__all__}
    assert public - modules - {"METHODS", "PARAMETERS", "SCORES", "WRAPPERS"} <= placed


@pytest.mark.parametrize("path", sorted(api()))
def test_a_name_of_the_api_has_an_example_and_says_what_each_parameter_is(path):
    name = path.rpartition(".")[2]
    assert name in "".join(block[2] for block in BLOCK.finditer(api()[path]))
    value = pkgutil.resolve_name(path)
    record = inspect.isclass(value) and hasattr(value, "__match_args__")
    if inspect.isfunction(value) or record:
        described = re.findall(r"^ *(\w+(?:, \w+)*): ", inspect.getdoc(value), re.MULTILINE)
        names = {name for names in described for name in names.split(", ")}
        assert inspect.signature(value).parameters.keys() <= names


def test_every_op_that_is_named_exists():
    named = re.findall(r"^\| `(\w+)`", (ROOT / "docs/api/ops.md").read_text(), re.MULTILINE)
    assert len(named) > 10 and all(hasattr(torch.ops.extrope, op) for op in named)


@pytest.mark.parametrize(
    ("remote", "page"),
    [
        ("https://example.org/us/it.git", "https://example.org/us/it"),
        ("git@example.org:us/it.git", "https://example.org/us/it"),
        ("ssh://git@example.org/us/it", "https://example.org/us/it"),
        ("https://me:secret@example.org/us/it.git", None),
        ("/srv/it", None),
        ("", None),
    ],
)
def test_the_site_links_to_its_repository_without_a_password(remote, page):
    pytest.importorskip("mkdocs")
    hooks = runpy.run_path(str(ROOT / "docs" / "hooks.py"))
    assert hooks["web_address"](remote) == page


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for page in PAGES[1:]:
        assert (tmp_path / page.relative_to(ROOT / "docs").with_suffix(".html")).exists()
    assert not list(tmp_path.rglob("__pycache__"))
    for page in tmp_path.rglob("*.html"):
        text = page.read_text()
        assert f"extrope_kernels {extrope_kernels.__version__}" in text
        for image in re.findall(r'<img [^>]*src="(?!https:)([^"]+)"', text):
            assert (page.parent / image).exists(), f"{page.name}: {image}"
