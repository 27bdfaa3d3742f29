"""Triton's interpreter is on before anything imports a kernel; outputs start out as NaN."""

import contextlib
import os
import subprocess
import sys
import textwrap
from collections import Counter, defaultdict
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from zlib import crc32

# A thread that waits for the next of many small loops is not to spin: two processes of two threads
# on two cores spent three quarters of their time so. OpenMP reads it as torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from extrope_kernels import _build, _ext
from extrope_kernels.testing import attention_backends, available_backends

settings.register_profile("ci", max_examples=20, derandomize=True, deadline=None, database=None)
settings.register_profile(
    "thorough", max_examples=int(os.environ.get("EXTROPE_EXAMPLES", "500")), deadline=None
)
settings.load_profile("ci")


def pytest_terminal_summary(terminalreporter, config):
    """Seconds of each folder, and the cases that a thorough run of generated tests went through."""
    seconds: Counter[str] = Counter()
    for report in chain(*terminalreporter.stats.values()):
        if isinstance(report, pytest.TestReport):
            seconds[report.nodeid.partition("::")[0].rpartition("/")[0]] += report.duration
    if len(seconds) > 1:
        terminalreporter.section("seconds of each folder, over all processes")
        for folder, total in seconds.most_common():
            terminalreporter.write_line(f"{total:8.0f} {folder}")
    generated = sys.modules.get("support.generated")
    if generated is not None and config.getoption("hypothesis_profile", None):
        terminalreporter.section("generated cases")
        for name, count in sorted(generated.CASES.items()):
            terminalreporter.write_line(f"{count:8} {name}")
        terminalreporter.write_line(f"{sum(generated.CASES.values()):8} in all")


def pytest_configure(config):
    """EXTROPE_GPU_MEMORY: how many GiB of the GPU this process may hold."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        prepare_builtins_once_a_launch()
    config.addinivalue_line("markers", "gpu_memory(gibibytes): on a GPU, needs so much of it")
    if torch.cuda.is_available() and "EXTROPE_GPU_MEMORY" in os.environ:
        share = float(os.environ["EXTROPE_GPU_MEMORY"]) / total_gpu_memory()
        torch.cuda.set_per_process_memory_fraction(min(share, 1.0))


def prepare_builtins_once_a_launch():
    """Let Triton's interpreter replace the builtins of its language at a launch alone.

    It would at each call of a device function, too: two fifths of the time of a kernel.
    """
    with contextlib.suppress(ImportError):
        from triton import language
        from triton.runtime import interpreter

        prepare = interpreter._patch_lang
        names = SimpleNamespace(__globals__={"tl": language, "core": language.core})
        interpreter._patch_lang = lambda fn: prepare(names)
        call = lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)  # noqa: E731
        interpreter.InterpretedFunction.__call__ = call


def pytest_runtest_setup(item):
    marker = item.get_closest_marker("gpu_memory")
    if marker is None or not torch.cuda.is_available():
        return
    bound = float(os.environ.get("EXTROPE_GPU_MEMORY", total_gpu_memory()))
    if marker.args[0] > bound:
        pytest.skip(f"needs {marker.args[0]} GiB of the GPU, may hold {bound:.1f}")


def total_gpu_memory():
    return torch.cuda.get_device_properties(0).total_memory / 2**30


@pytest.fixture
def no_library():
    """For tests of what runs without a compiled library: a wheel brings one."""
    if (Path(_ext.__file__).parent / _build.LIBRARIES["cpu"]).exists():
        pytest.skip("the wheel has a library")


@pytest.fixture(scope="module")
def modules(tmp_path_factory):
    """The folder of the CUDA kernels, compiled for the host."""
    from support.emulation import harness

    folder = tmp_path_factory.mktemp("emulation")
    try:
        harness.build(folder)
    except harness.MissingTool as reason:
        pytest.skip(str(reason))
    return folder


@pytest.fixture(autouse=True)
def nan_in_fresh_memory():
    """Let torch fill uninitialised memory with NaN, so that what was never written shows."""
    torch.manual_seed(0)
    # use_deterministic_algorithms would be as good, but for Inductor, which it imports for seconds.
    torch.set_deterministic_debug_mode("warn")
    yield
    torch.set_deterministic_debug_mode("default")


@pytest.fixture
def one_thread():
    """For tensors so small that threads only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def many_splits(monkeypatch):
    """Triton splits sequences of a few dozen keys, as it does long ones: over `most` slots."""
    from extrope_kernels.ops._torch.layouts import forget
    from extrope_kernels.ops.decode.triton import schedule

    def split(most: int = 128) -> None:
        monkeypatch.setattr(schedule, "LEAST_KEYS", 16)
        monkeypatch.setattr(schedule, "MOST_SPLITS", most)
        forget()

    yield split
    forget()


def pytest_generate_tests(metafunc):
    """`backend` runs over every implementation of the rotation that can run here.

    `any_backend` and `fast_backend` run over those of attention, with and without the reference.
    Interpreted, Triton has files of its own, test_*_triton.py; here it is thorough.
    """
    slow = () if torch.cuda.is_available() else (pytest.mark.thorough,)
    attention = {
        name: pytest.param(name, marks=slow if name == "triton" else ())
        for name in attention_backends()
        if name != "flash_attn"
    }
    if "any_backend" in metafunc.fixturenames:
        metafunc.parametrize("any_backend", list(attention.values()))
    if "fast_backend" in metafunc.fixturenames:
        fast = [param for name, param in attention.items() if name != "reference"]
        metafunc.parametrize("fast_backend", fast)
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", [x for x in available_backends() if x != "reference"])


# Folders of slow files, before all others: at the end one worker would be left with one of these.
FIRST = (
    "ptx",
    "installation",
    "gpu",
    "pages",
    "transformers",
    "distributed",
    "attention",
    "decode",
)


def pytest_collection_modifyitems(config, items):
    leave_out_triton_cases(config, items)
    order = {name: place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: order.get(item.path.parent.name, len(FIRST)))


# Of interpreted Triton cases one in so many runs, by the parameter that names the backend: those of
# the rotation, of attention, and of files about Triton alone, which have none.
ONE_IN = {"backend": 11, "any_backend": 23, "fast_backend": 23, None: 3}


def leave_out_triton_cases(config, items):
    """Interpret a sample of the Triton cases: each takes seconds, and a GPU runs them all in a few.

    A case is in it by a hash of its own id, so that no other case decides; one that alone shows
    something is marked `always`. Of a test with none, or of a file about the rotation, the case
    with the lowest hash runs. A command with -k, or with a file, and EXTROPE_ALL_CASES=1 keep all.
    """
    named = any(".py" in argument for argument in config.args)
    all_cases = os.environ.get("EXTROPE_ALL_CASES") == "1"
    if torch.cuda.is_available() or all_cases or named or config.option.keyword:
        return
    groups = defaultdict(list)
    for item in items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        by = next((name for name in ONE_IN if params.get(name) == "triton"), None)
        if by is not None or (params and item.path.stem.endswith("_triton")):
            test = "" if by == "backend" else item.originalname
            groups[by, item.path, test].append((crc32(item.nodeid.encode()), item))
    dropped = set()
    for (by, *_), cases in groups.items():
        lowest = min(cases, key=lambda case: case[0])[1]
        of = ONE_IN[by]
        chosen = {x for number, x in cases if number % of == 0 or x.get_closest_marker("always")}
        dropped.update({x for _, x in cases} - (chosen or {lowest}))
    config.hook.pytest_deselected(items=dropped)
    items[:] = [item for item in items if item not in dropped]


@pytest.fixture
def run_narrower(run_python):
    """Run tests with the CPU kernels held down to some instructions; skip where that is no less."""
    names = ("baseline", "avx2", "avx512", "avx512_bf16")

    def run(narrower: str, *arguments: str) -> None:
        assert _ext.load("cpu") is None
        index = names.index(narrower)
        if torch.ops.extrope.cpu_capability() == index:
            pytest.skip("chosen here: the other tests are about these kernels")
        report = run_python(
            f"""
            import sys
            import pytest, torch
            from extrope_kernels import _ext
            assert _ext.load("cpu") is None
            chosen = torch.ops.extrope.cpu_capability()
            if chosen < {index}:
                sys.exit(print("the processor has no", {narrower!r}))
            assert chosen == {index}
            sys.exit(pytest.main(["-q", "-x", *{arguments!r}]))
            """,
            EXTROPE_CPU_CAPABILITY=narrower,
        )
        if "the processor has no" in report:
            pytest.skip(report.strip())

    return run


@pytest.fixture
def run_python():
    """Run Python source in a fresh process at the root; its output is the failure's text."""

    def run(source: str, **environment: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(source)],
            cwd=Path(__file__).parents[1],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run
