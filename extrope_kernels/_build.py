"""Build the two compiled libraries, for setup.py and for the first use in `_ext.py`.

This module imports no torch, so that setup.py can use it without one.
`csrc/cpu/OP/*_kernel.cpp` includes no torch header and is compiled once per instruction set,
`*_bf16_kernel.cpp` for those that multiply in bf16. The other `.cpp` files bind kernels to torch
through its stable ABI. `csrc/cuda/OP/*.cu` includes no torch header either and is for nvcc.
Headers are named from csrc on. ninja runs the compilers in a work folder that is kept: an edit
compiles only the files that it touches.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

LIBRARIES = {"cpu": "_C_cpu.abi3.so", "cuda": "_C_cuda.abi3.so"}
MIN_TORCH = (2, 11)
# Hides the stable-ABI functions newer than MIN_TORCH: one binary serves that torch and later ones.
TORCH_TARGET = f"-DTORCH_TARGET_VERSION=0x{MIN_TORCH[0]:02x}{MIN_TORCH[1]:02x}000000000000"
CUDA_ARCHS = ("80", "90", "100", "120")

STANDARD = "-std=c++20"
CXX_FLAGS = (
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
)
# The kernels decide the speed; their bindings to torch compile faster with less optimisation.
KERNEL, BINDING = "-O3", "-O1"
_TELL_EVERY = 5.0  # seconds between lines of progress, where there is no terminal
NVCC_FLAGS = (STANDARD, BINDING, "--threads=2", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall")
_AVX512 = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c -mprefer-vector-width=512"
_BF16 = f"{_AVX512} -mavx512bf16"
# The kernels are written in vectors: the vectorizing passes gain nothing with short ones, and take
# a third of the time to compile.
_AS_WRITTEN = ("-fno-tree-vectorize", "-fno-ipa-cp-clone")
ISA_FLAGS = {
    "baseline": ("-O1",),  # for machines too old to be fast: less than half the time to compile
    # If products are reordered before registers are assigned, their sums spill. psabi warns of
    # calls from other files.
    "neon": (*_AS_WRITTEN, "-fno-schedule-insns", "-Wno-psabi"),
    "avx2": ("-mavx2", "-mfma", "-mf16c", *_AS_WRITTEN),
    "avx512": tuple(_AVX512.split()),
    "avx512_bf16": tuple(_BF16.split()),
    "amx": tuple(f"{_BF16} -mamx-tile -mamx-bf16".split()),
}
BF16_ISAS = ("avx512_bf16", "amx")  # old compilers do not know them
# By the compiler's target processor; any other has the baseline.
ISAS = {"x86_64": ("baseline", "avx2", "avx512", *BF16_ISAS), "aarch64": ("neon",)}
# By the end of a source's name; other sources are compiled for all but BF16_ISAS.
OF_SOME_ISAS = {"_bf16_kernel": BF16_ISAS}


class BuildError(RuntimeError):
    """A library cannot be built; the message is one line."""


@dataclass(frozen=True)
class Plan:
    """The commands that build one library, in a work folder where csrc is a copy of the sources."""

    objects: dict[str, list[str]]  # command by object file; its last word is the source
    link: list[str]
    left_out: str = ""  # kernels that this compiler cannot build, in one line


def source_dir() -> Path:
    """Return the folder of C++ and CUDA sources: inside an installed package, else beside it."""
    package = Path(__file__).resolve().parent
    installed = package / "csrc"
    return installed if installed.is_dir() else package.parent / "csrc"


def include() -> tuple[str, str]:
    """Return the flags for our headers, which are named from the folder of sources on."""
    return "-I", str(source_dir())


def find_torch() -> Path:
    """Find the folder of a torch to compile the bindings against, without importing it."""
    try:
        spec = importlib.util.find_spec("torch")
        version = importlib.metadata.version("torch")
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None:
        raise BuildError("torch is not installed where the build runs")
    if tuple(int(part) for part in version.split(".")[:2]) < MIN_TORCH:
        raise BuildError(f"torch {version} is older than {MIN_TORCH[0]}.{MIN_TORCH[1]}")
    return Path(spec.origin).parent


def find_compiler() -> list[str]:
    """Return the C++ compiler's command: $CXX, else the first of c++, g++ and clang++ on PATH."""
    if not sys.platform.startswith("linux"):
        raise BuildError(f"the compiled kernels are built on Linux only, this is {sys.platform}")
    try:
        chosen = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise BuildError(f"CXX cannot be read: {error}") from error
    for command in [chosen] if chosen else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    raise BuildError(f"no C++ compiler found ({chosen[0] if chosen else 'c++, g++, clang++'})")


def find_ninja() -> str:
    """Return the path of ninja: its wheel's, else on PATH."""
    try:
        from ninja import BIN_DIR
    except ImportError:
        BIN_DIR = ""
    if found := shutil.which("ninja", path=BIN_DIR) or shutil.which("ninja"):
        return found
    raise BuildError("ninja not found: pip install ninja")


def find_nvcc() -> str:
    """Return the path of nvcc: under $CUDA_HOME, else on PATH, else under /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME")
    folders = [f"{home}/bin"] if home else [None, "/usr/local/cuda/bin"]
    for folder in folders:
        if nvcc := shutil.which("nvcc", path=folder):
            return nvcc
    raise BuildError("nvcc not found" + (f" under CUDA_HOME={home}" if home else ""))


def cuda_archs(nvcc: str) -> list[str]:
    """Return the architectures: $EXTROPE_CUDA_ARCHS ("90", "80,90"), else those that nvcc knows."""
    asked = os.environ.get("EXTROPE_CUDA_ARCHS", "").replace(",", " ").split()
    if asked:  # the oldest first: the front end's pass is for that
        return sorted(asked, key=lambda arch: (len(arch.rstrip("af")), arch))
    known = output([nvcc, "--list-gpu-arch"]).split()
    return [arch for arch in CUDA_ARCHS if f"compute_{arch}" in known]


def gencode(archs: Sequence[str]) -> str:
    """Return nvcc's flag: machine code of every architecture, PTX of the first for later ones.

    One pass of the front end serves them all: a pass for each would take twice as long.
    """
    codes = ",".join([*(f"sm_{arch}" for arch in archs), f"compute_{archs[0]}"])
    return f"-gencode=arch=compute_{archs[0]},code=[{codes}]"


def plan(name: str) -> Plan:
    """Return the commands for library `name` ("cpu" or "cuda"); BuildError if a tool is missing."""
    return _plan_cpu() if name == "cpu" else _plan_cuda()


def _plan_cpu() -> Plan:
    compiler, torch = find_compiler(), find_torch()
    isas = instruction_sets(compiler)
    has_bf16 = ["-DEXTROPE_HAS_BF16"] if "amx" in isas else []
    objects = cpu_objects(compiler, isas, [*has_bf16, *_torch_flags(torch)])
    link = [*compiler, "-shared", f"-L{torch / 'lib'}", "-Wl,--no-undefined", "-ltorch_cpu"]
    lacks_amx = "avx512" in isas and not has_bf16
    left_out = f"{shlex.join(compiler)} does not know AMX" if lacks_amx else ""
    return Plan(objects, link, left_out)


def cpu_objects(
    compiler: list[str], isas: Sequence[str], torch_flags: list[str]
) -> dict[str, list[str]]:
    """Return a Plan's commands for the CPU sources: kernels for each of `isas`, the rest once."""
    objects = {}
    for source in _sources("cpu", "*.cpp"):
        compile_it = [*compiler, STANDARD, *CXX_FLAGS, "-I", "csrc"]
        which = ["-c", _copied(source)]
        if not source.stem.endswith("_kernel"):
            objects[_object(source)] = [*compile_it, BINDING, *torch_flags, *which]
            continue
        for isa in _isas_of(source, isas):
            for_isa = [KERNEL, f"-DEXTROPE_ISA={isa}", *ISA_FLAGS[isa]]
            objects[_object(source, isa)] = [*compile_it, *for_isa, *which]
    return objects


def instruction_sets(compiler: list[str]) -> list[str]:
    """Return those of ISAS that the compiler knows; old compilers do not know BF16_ISAS."""
    isas = ISAS.get(output([*compiler, "-dumpmachine"]).split("-")[0], ("baseline",))
    known = [*compiler, *ISA_FLAGS["amx"], "-E", "-x", "c++", os.devnull]
    if "amx" in isas and subprocess.run(known, capture_output=True).returncode != 0:
        return [isa for isa in isas if isa not in BF16_ISAS]
    return list(isas)


def _isas_of(source: Path, isas: Sequence[str]) -> list[str]:
    """Return the instruction sets that one kernel is compiled for."""
    for end, some in OF_SOME_ISAS.items():
        if source.stem.endswith(end):
            return [isa for isa in isas if isa in some]
    return [isa for isa in isas if isa not in BF16_ISAS]


def _plan_cuda() -> Plan:
    # nvcc drives every step: it alone knows where its headers and the static runtime are.
    compiler, path, torch = find_compiler(), find_nvcc(), find_torch()
    nvcc = [path, *host_compiler(compiler)] if os.environ.get("CXX") else [path]
    chips = gencode(cuda_archs(path))
    compile_it = [*nvcc, *NVCC_FLAGS, "-I", "csrc"]
    objects = {
        _object(s, "cu"): [*compile_it, chips, "-c", _copied(s)] for s in _sources("cuda", "*.cu")
    }
    for source in _sources("cuda", "*.cpp"):
        objects[_object(source)] = [*compile_it, *_torch_flags(torch), "-c", _copied(source)]
    link = [*nvcc, "-shared", "-cudart=static", chips, f"-L{torch / 'lib'}"]
    return Plan(
        objects, [*link, "-Xlinker=--no-undefined", "-ltorch_cpu", "-ldl", "-lrt", "-lpthread"]
    )


def host_compiler(command: Sequence[str]) -> list[str]:
    """Return nvcc's flags for a C++ compiler's command; a launcher such as ccache is left out."""
    first_flag = next((n for n, word in enumerate(command) if word.startswith("-")), len(command))
    return [
        f"-ccbin={command[first_flag - 1]}",
        *(f"-Xcompiler={flag}" for flag in command[first_flag:]),
    ]


def _tools(name: str) -> str:
    """Describe the compilers and their targets, for a hash."""
    compilers = [find_compiler()] + ([[find_nvcc()]] if name == "cuda" else [])
    return platform.machine() + "".join(output([*command, "--version"]) for command in compilers)


def key(name: str) -> str:
    """Hash a library's inputs: sources, flags, compilers, processor family.

    torch's version is left out: by the stable ABI one library serves all from MIN_TORCH on.
    """
    steps = plan(name)
    digest = hashlib.sha256(_tools(name).encode())
    for command in [*steps.objects.values(), steps.link]:
        # Paths of sources and of torch do not change the result.
        digest.update(" ".join(word for word in command if os.sep not in word).encode())
    for source in _read_by(name):
        digest.update(_copied(source).encode() + source.read_bytes())
    return digest.hexdigest()[:16]


def work_key(name: str) -> str:
    """Hash what decides the work folder: the compilers, and the folder of sources."""
    return hashlib.sha256(
        f"{_tools(name)}{source_dir()}".encode(errors="surrogateescape")  # a path may be any bytes
    ).hexdigest()[:16]


def build(name: str, output: Path, work_dir: Path, log: Path) -> None:
    """Compile library `name` into the file `output`; `log` keeps the commands and their output.

    `work_dir` may be an earlier build's: then only what has changed since is compiled.
    """
    steps = plan(name)
    if lacks := steps.left_out:
        warnings.warn(f"the {name} library lacks its fastest kernels: {lacks}", stacklevel=2)
    work_dir.mkdir(parents=True, exist_ok=True)
    _copy_sources({work_dir / _copied(x): x for x in _read_by(name)}, work_dir / "csrc")
    run_ninja(steps.objects, LIBRARIES[name], steps.link, work_dir, log)
    shutil.copy(work_dir / LIBRARIES[name], output)


def run_ninja(
    objects: Mapping[str, Sequence[str]],
    library: str,
    link: Sequence[str],
    folder: Path,
    log: Path,
) -> None:
    """Compile `objects`, each by a command that ends in its source, and link `library` from them.

    All paths are relative to `folder`. The file `log` gets ninja's output, a terminal its count of
    steps, any other stderr the count now and then. Raises BuildError with the line that says why it
    failed.
    """
    command = [find_ninja(), "-v"]  # -v: the log holds whole commands
    (folder / "build.ninja").write_bytes(os.fsencode(_ninja_file(objects, library, link)))
    terminal = sys.stderr is not None and sys.stderr.isatty()
    printed, told = [], time.monotonic()
    with (
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen(
            command,
            cwd=folder,
            env={**_in_english(), "NINJA_STATUS": "[%f/%t] "},
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
                if sys.stderr is None or not (count := re.match(r"\[\d+/\d+\]", line)):
                    continue
                if terminal:
                    print(f"\r{count[0]}", end="", file=sys.stderr, flush=True)
                elif time.monotonic() - told > _TELL_EVERY:
                    told = time.monotonic()
                    print(f"{count[0]} steps of the build", file=sys.stderr, flush=True)
        except BaseException:  # such as KeyboardInterrupt
            # Otherwise the compilers would go on, and write into the next build's files.
            process.terminate()
            process.communicate()
            raise
    if terminal:
        print(file=sys.stderr)
    if process.returncode:
        why = _first_error(printed)
        raise BuildError(f"{Path(link[0]).name} failed: {why} (log: {log})")


def output(command: list[str]) -> str:
    """Return a command's output; BuildError if it fails."""
    try:
        done = subprocess.run(command, env=_in_english(), capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"{shlex.join(command)} failed") from error
    return done.stdout.decode(errors="replace")


def _in_english() -> dict[str, str]:
    """Return an environment in which compilers print versions and errors in English."""
    return {**os.environ, "LC_ALL": "C"}


def _copy_sources(copies: Mapping[Path, Path], folder: Path) -> None:
    """Update a folder of copies by content.

    ninja compares dates, and installers date files as they like.
    """
    for path in folder.rglob("*"):
        if path.is_file() and path not in copies:
            path.unlink()
    for path, source in copies.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        content = source.read_bytes()
        if not path.exists() or path.read_bytes() != content:
            path.write_bytes(content)


def _ninja_file(objects: Mapping[str, Sequence[str]], library: str, link: Sequence[str]) -> str:
    # Objects come before the libraries: the linker looks only ahead for missing symbols.
    first = next((n for n, word in enumerate(link) if word.startswith("-l")), len(link))
    lines = [
        "rule compile",
        "  command = $compile -MD -MF $out.d -o $out",
        "  depfile = $out.d",
        "  deps = gcc",  # nvcc writes this format too
        "rule link",
        f"  command = {_escaped(link[:first])} $in {_escaped(link[first:])} -o $out",
        f"build {library}: link {' '.join(objects)}",
    ]
    for target, command in objects.items():
        lines += [f"build {target}: compile {command[-1]}", f"  compile = {_escaped(command)}"]
    return "\n".join([*lines, ""])


def _escaped(command: Sequence[str]) -> str:
    return shlex.join(command).replace("$", "$$")


def _first_error(printed: list[str]) -> str:
    """Return the line that says why: behind FAILED with the target, and the command."""
    failed = next((i for i, line in enumerate(printed) if line.startswith("FAILED:")), -1)
    after = printed[failed + 2 :] if failed >= 0 else printed
    wrote = [line for line in after if line and not line.startswith("ninja: build stopped")]
    if not wrote:
        return "it wrote nothing"
    # "undefined": the linker's own word, before its caller's "error: ld returned 1".
    return next((x for x in wrote if re.search("error|undefined", x, re.I)), wrote[-1])[:300]


def _sources(folder: str, pattern: str) -> list[Path]:
    found = sorted(path for path in (source_dir() / folder).rglob(pattern) if path.is_file())
    if not found:
        raise BuildError(f"no {pattern} sources in {source_dir() / folder}")
    return found


def _read_by(name: str) -> list[Path]:
    """List all files that the library is compiled from, headers too."""
    return [*_sources("common", "*"), *_sources(name, "*")]


def _copied(source: Path) -> str:
    """Return a source's path in the work folder."""
    return f"csrc/{source.relative_to(source_dir()).as_posix()}"


def _object(source: Path, kind: str = "") -> str:
    """Return the object file's name: the path below the folder of sources, joined by dots."""
    parts = source.relative_to(source_dir()).with_suffix("").parts
    return ".".join(filter(None, (*parts, kind, "o")))


def _torch_flags(torch: Path) -> list[str]:
    return [TORCH_TARGET, "-isystem", str(torch / "include")]
