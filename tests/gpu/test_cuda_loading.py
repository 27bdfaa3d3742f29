"""A CUDA library that loads but cannot run: what it says, and that Triton serves in its place."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from support.builds import needs_compiler, start

from extrope_kernels import _build

STUBS = Path(__file__).resolve().parents[1] / "support" / "cuda_runtime"
pytestmark = needs_compiler


@pytest.fixture(scope="module")
def machine(tmp_path_factory) -> Path:
    """csrc/cuda/runtime/why_not.cu over a runtime that answers as the environment says."""
    program = tmp_path_factory.mktemp("machine") / "machine"
    flags = ["-I", str(STUBS), *_build.include(), "-D__CUDA_ARCH_LIST__=800,900", "-rdynamic"]
    command = [*_build.find_compiler(), _build.STANDARD, "-Wall", "-Werror", *flags]
    subprocess.run([*command, str(STUBS / "main.cpp"), "-o", str(program), "-ldl"], check=True)
    return program


def ask(machine: Path, devices: str, driver=13000, runtime=13010, image=True):
    """Why not, and the devices that the question opened contexts on."""
    about = {"DEVICES": devices, "DRIVER": driver, "RUNTIME": runtime, "IMAGE": int(image)}
    env = {**os.environ, **{name: str(value) for name, value in about.items()}}
    done = subprocess.run([machine], env=env, capture_output=True, text=True, check=True)
    *contexts, why, current = done.stdout.splitlines()
    assert current == "current: 0"
    return why.removeprefix("why: "), {int(line.split()[-1]) for line in contexts}


@pytest.mark.parametrize(
    ("about", "why"),
    [
        ({"devices": "90i"}, ""),
        ({"devices": "90i", "driver": 14020}, ""),
        ({"devices": "80i 86 90 120i"}, ""),
        (
            {"devices": "90i", "driver": 12090},
            "the driver is for CUDA 12.9, the library needs CUDA 13.0",
        ),
        ({"devices": "90", "driver": 0}, "the driver is for CUDA 0.0, the library needs CUDA 13.0"),
        ({"devices": "75i"}, "GPU 0 (7.5): the kernels are built for 8.0 and later"),
        ({"devices": "90i 75"}, "GPU 1 (7.5): the kernels are built for 8.0 and later"),
        (
            {"devices": "90 120i", "image": False},
            "GPU 1 (12.0): no kernel image is available for execution on the device",
        ),
    ],
    ids=str,
)
def test_why_not(machine, about, why):
    assert ask(machine, **about)[0] == why


def test_only_devices_in_use_are_asked(machine):
    """Rank 3 works on GPU 3 while GPU 0 is current, and leaves the others' memory alone."""
    assert ask(machine, "90 90 90 90i") == ("", {3})
    assert ask(machine, "90 90") == ("", set())


# -------------------------------------------------------------------------------------------------
# In Python

STAND_IN = """
extern "C" __attribute__((visibility("default")))
const char* extrope_register(int has_gpu) {{
  return has_gpu ? {answer} : nullptr;
}}
extern "C" __attribute__((visibility("default")))
const char* extrope_signatures() {{ return ""; }}
"""
# A packaged library in each of some folders, in a torch with CUDA, each in a fork of its own.
LOAD = """
import os, sys, torch
from extrope_kernels import _ext
from extrope_kernels.ops._torch.library import missing

def registered(op, key="CUDA"):
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"extrope::{{op}}", key)

torch.version.cuda = "13.0"
for file, has_gpu in {cases!r}:
    if os.fork():
        _, status = os.wait()
        assert status == 0, (file, status)
        continue
    _ext.__file__ = file
    torch.cuda.is_available = lambda: has_gpu
    print(_ext.load("cuda"))
    print(missing("cuda") == _ext.load("cuda"), registered("rope_fwd"))
    print(_ext._paths.get("cuda"))
    names = [name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names()
             if name.startswith("extrope::")]
    loading = [name for name in names if registered(name, "CompositeExplicitAutograd")]
    print(*sorted(name for name in loading if not registered(name)))
    sys.stdout.flush()
    os._exit(0)
"""
# What a library answers, and whether the machine has a GPU.
ANSWERS = (('"the driver is old"', True), ("nullptr", True), ('"asked without a GPU"', False))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> list[tuple[Path, list[str]]]:
    """For each answer the library, and what _ext says of it and whether fallbacks are there."""
    libraries = []
    for answer, _ in ANSWERS:
        folder = tmp_path_factory.mktemp("library")
        (folder / "stand_in.cpp").write_text(STAND_IN.format(answer=answer))
        library = folder / _build.LIBRARIES["cuda"]
        source = str(folder / "stand_in.cpp")
        command = [*_build.find_compiler(), "-shared", "-fPIC", source, "-o", str(library)]
        subprocess.run(command, check=True)
        libraries.append(library)
    has_gpu = (has_gpu for _, has_gpu in ANSWERS)
    cases = [(str(x.with_name("_ext.py")), y) for x, y in zip(libraries, has_gpu)]
    process = start(LOAD.format(cases=cases), EXTROPE_JIT="0")
    out, err = process.communicate(timeout=3600)
    assert process.returncode == 0, err
    lines = out.splitlines()
    return [(library, lines[4 * n : 4 * n + 4]) for n, library in enumerate(libraries)]


def test_a_library_that_cannot_run_gives_way(loaded):
    (_, (reason, fallbacks, path, without)), *_ = loaded
    assert reason.startswith("_C_cuda.abi3.so cannot run here: the driver is old; ")
    assert fallbacks == "True True" and path == "None" and without == ""


def test_a_library_that_can_run_serves(loaded):
    """Ops that it does not have do not wait for it."""
    bindings = (_build.source_dir() / "cuda").rglob("*bind.cpp")
    text = "".join(binding.read_text() for binding in bindings)
    for library, (reason, fallbacks, path, without) in loaded[1:]:
        assert reason == "None" and fallbacks == "True False" and path == str(library)
        assert without.split() == sorted(re.findall(r'EXTROPE_OP\("(\w+)"', text))


def test_a_binding_leaves_the_device_to_torch():
    """Setting a device back opens a context on it: torch's guard alone does not."""
    sources = [path for path in (_build.source_dir() / "cuda").rglob("*.*") if path.is_file()]
    setting = [path.name for path in sources if "cudaSetDevice" in path.read_text()]
    assert setting == ["why_not.cu"]  # in a thread of its own, on a device that has a context
