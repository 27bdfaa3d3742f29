"""The tests of the CPU kernels under a sanitizer: `make sanitize`.

`python tests/support/sanitizers/run.py address|thread` runs one. The library is built with the
sanitizer's flags into build/sanitized, then loaded by a Python that has the sanitizer's runtime
preloaded. Further arguments replace the choice of tests.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

from extrope_kernels import _build

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
FLAGS = {
    "address": "-g1 -fsanitize=address,undefined -fno-sanitize-recover=all",
    "thread": f"-g1 -fsanitize=thread -include {HERE / 'threads.h'}",
}
OPTIONS = {
    # The interpreter frees nothing at exit; torch and numpy are not instrumented.
    "address": {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"},
    "thread": {"TSAN_OPTIONS": "halt_on_error=1 ignore_noninstrumented_modules=1"},
}
RUNTIMES = {"address": "libasan.so", "thread": "libtsan.so"}
TESTS = (
    "rope/test_rope.py",
    "rope/test_rope_gradients.py",
    "rope/test_rope_memory.py",
    "rope/test_rope_norm.py",
    "cache/test_rope_append.py",
    "attention/test_attention.py",
    "attention/test_attention_gradients.py",
    "attention/test_pair_maps.py",
    "attention/test_pair_maps_cache.py",
    "attention/test_attention_bf16.py",
    "attention/test_float32_results.py",
    "decode/test_decode.py",
    "decode/test_decode_fp8.py",
    "permuteformer/test_permute.py",
    "permuteformer/test_properties_permute.py",
    "permuteformer/test_permuteformer.py",
    "permuteformer/test_permuteformer_step.py",
    "package/test_determinism.py",
    "rope/test_properties_rope.py",
    "attention/test_properties_attention.py",
)
LOAD = "from extrope_kernels import _ext; print('library:', _ext.load('cpu'))"


def main(sanitizer: str, arguments: list[str]) -> int:
    compiler = _build.find_compiler()
    built = {
        **os.environ,
        "CXX": shlex.join([*compiler, *shlex.split(FLAGS[sanitizer])]),
        "EXTROPE_CACHE_DIR": str(ROOT / "build" / "sanitized"),
    }
    # Without the runtime it is built but cannot be loaded: a sanitizer may end the process there.
    subprocess.run([sys.executable, "-c", LOAD], cwd=ROOT, env=built)
    # libstdc++ too: a sanitizer looks for the function that throws when it starts.
    preload = [
        _build.output([*compiler, f"-print-file-name={name}"]).strip()
        for name in (RUNTIMES[sanitizer], "libstdc++.so.6")
    ]
    run = {**built, **OPTIONS[sanitizer], "LD_PRELOAD": ":".join(preload)}
    loaded = subprocess.run(
        [sys.executable, "-c", LOAD], cwd=ROOT, env=run, text=True, capture_output=True
    )
    print(loaded.stdout + loaded.stderr, flush=True)
    if loaded.stdout != "library: None\n":
        return 1
    tests = arguments or [str(ROOT / "tests" / name) for name in TESTS]
    # Inductor takes $CXX for one file, without flags.
    left_out = ("triton", "narrower", "million", "2_to_31", "compile")
    choice = ["-q", "-k", " and ".join(f"not {name}" for name in left_out)]
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *choice]
    return subprocess.run([*pytest, *tests], cwd=ROOT, env=run).returncode


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], sys.argv[2:]))
