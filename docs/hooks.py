"""A mkdocs hook: files outside docs/ are part of the site, and links to them work there too."""

import re
import shutil
import subprocess
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
OUTSIDE = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/*.py", "bench/results/*.md",
           "bench/results/*.csv", "bench/results/models/*.json")  # fmt: skip
_LINK = re.compile(r"""(\]\(|(?:src|href)=")(?!\w+:|#)([^)"\s]+)""")
_REMOTE = re.compile(r"(?:https://|ssh://git@|git@)([\w.-]+)[:/]([\w./-]+?)(?:\.git)?")


def on_config(config: MkDocsConfig) -> None:
    """Name the version on every page, and link to the repository that this is a clone of."""
    source = (ROOT / "extrope_kernels" / "__init__.py").read_text()
    config.site_name += " " + re.search(r'__version__ = "(.+)"', source)[1]
    if shutil.which("git"):
        git = ["git", "-C", str(ROOT), "remote", "get-url", "origin"]
        remote = subprocess.run(git, capture_output=True, text=True).stdout.strip()
        config.repo_url, config.repo_name = web_address(remote), "Repository, Apache-2.0"


def web_address(remote: str) -> str | None:
    """Return the page of a remote; None for a folder, and where a password would be published."""
    found = _REMOTE.fullmatch(remote)
    return found and f"https://{found[1]}/{found[2]}"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files of OUTSIDE to the site, and the license as a page, which the search finds."""
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    licence = f"# License\n\n```text\n{(ROOT / 'LICENSE').read_text()}\n```\n"
    files.append(File.generated(config, "LICENSE.md", content=licence))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Shorten links into docs/ and out of it by a step: docs/ is the root of the site."""
    name = page.file.src_uri
    outside = any(Path(name).match(pattern) for pattern in OUTSIDE) and (ROOT / name).exists()
    out = "../" * (name.count("/") + 1)
    markdown = markdown.replace("](LICENSE)", "](LICENSE.md)")

    def moved(link: re.Match) -> str:
        before, target = link.groups()
        if outside:
            return before + target.removeprefix("docs/")
        return before + (target.removeprefix("../") if target.startswith(out) else target)

    return _LINK.sub(moved, markdown)
