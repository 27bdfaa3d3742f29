"""Make what a release consists of: make release. It leaves build/release.

The sdist; a wheel that auditwheel tags by the oldest C library that it runs on, without torch's own
libraries; NOTES.md, of CHANGELOG.md. README's Python blocks run from the wheel, in an environment
that has no compiler.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
OUT = ROOT / "build" / "release"
BLOCKS = """
import re, sys
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
import extrope_kernels
from extrope_kernels import _ext

assert Path(extrope_kernels.__file__).is_relative_to(Path("site").resolve())
assert _ext.load("cpu") is None, _ext.load("cpu")
size = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
config = LlamaConfig(**size, num_attention_heads=2, max_position_embeddings=64)
LlamaForCausalLM(config).save_pretrained("path/to/model")
exec("".join(re.findall(r"^```python\\n(.*?)^```$", sys.stdin.read(), re.DOTALL | re.MULTILINE)))
"""


def main() -> int:
    for stale in (OUT, ROOT / "build" / "lib"):  # setuptools would package what is left there
        shutil.rmtree(stale, ignore_errors=True)
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": tools, "EXTROPE_CUDA": "0"}
    with tempfile.TemporaryDirectory() as built:
        for what, folder in (("sdist", OUT), ("wheel", Path(built))):
            folder.mkdir(parents=True, exist_ok=True)
            code = f"from setuptools.build_meta import build_{what} as b; b({str(folder)!r})"
            subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, check=True)
        (wheel,) = Path(built).glob("*.whl")
        repair = ["auditwheel", "repair", "--exclude", "libtorch_cpu.so", "-w", str(OUT)]
        subprocess.run([*repair, str(wheel)], env=env, check=True)
    (wheel,) = OUT.glob("*.whl")
    run_readme(wheel)
    (OUT / "NOTES.md").write_text(notes((ROOT / "CHANGELOG.md").read_text()))
    print("\n".join(map(str, sorted(OUT.iterdir()))))
    return 0


def run_readme(wheel: Path) -> None:
    """Run README's Python blocks from a wheel, without a compiler."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", "site"]
    env = {**os.environ, "PATH": "", "PYTHONPATH": "site", "EXTROPE_JIT": "0"}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([*pip, str(wheel)], cwd=folder, check=True)
        text = (ROOT / "README.md").read_text()
        command = [sys.executable, "-c", BLOCKS]
        subprocess.run(command, cwd=folder, env=env, input=text, text=True, check=True)


def notes(changelog: str) -> str:
    """Return what the changelog says of its newest version."""
    return re.split(r"^## ", changelog, flags=re.MULTILINE)[1].partition("\n")[2].strip() + "\n"


if __name__ == "__main__":
    sys.exit(main())
