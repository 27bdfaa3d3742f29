"""A sample of the shipped GPU kernels, compiled for every chip by bench/gpu_audit.py: no GPU."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton.backends.nvidia")

from audit import report
from audit.case import Case
from audit.chips import CHIPS
from audit.entries import KERNELS, all_cases, attention, nvcc, plain_kernels, sample

from extrope_kernels import _build

ROOT = Path(__file__).parents[2]
# Triton kernels by what the audit calls them.
TRITON = {
    "rope triton": "rotate_kernel",
    "rope norm triton": "norm_rotate_kernel",
    "rope append triton": "rope_append_kernel",
    "rope cos sin triton": "cos_sin_kernel",
    "permute rows triton": "permute_kernel",
    "permute cycles triton": "cycles_kernel",
    **{f"attention {name}": f"{name}_kernel" for name in ("rotate", "forward", "dq", "dkv")},
    "merge triton": "merge_kernel",
    **{f"cache {name}": f"{name}_kernel" for name in ("decode", "append")},
    **{f"linear {name}": f"{name}_kernel" for name in ("scan", "state", "state_passing")},
    **{f"linear {name}": f"{name}_kernel" for name in ("prepare", "row_dots")},
}
COMPARED = [
    Case(f"attention {name}", chip, 128, "bfloat16", "R2")
    for name, chips in {"forward": (80, 90, 100, 120), "dq": (90,), "dkv": (80,)}.items()
    for chip in chips
]


def nvcc_is_missing() -> str:
    try:
        _build.find_nvcc()
    except _build.BuildError as reason:
        return str(reason)
    return ""


def needs_nvcc(case: Case) -> bool:
    return case.kernel.endswith("cuda")


def with_marks(cases: list[Case]) -> list:
    reason = nvcc_is_missing()
    skip = pytest.mark.skipif(bool(reason), reason=reason)
    return [pytest.param(x, id=str(x), marks=[skip] if needs_nvcc(x) else []) for x in cases]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    out = tmp_path_factory.mktemp("audit") / "rows.json"
    names = {case.kernel for case in sample() if not (needs_nvcc(case) and nvcc_is_missing())}
    asked = [word for name in sorted(names) for word in ("--kernel", name)]
    command = [sys.executable, "bench/gpu_audit.py", "--sample", *asked, "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert out.exists(), done.stdout + done.stderr
    return report.load(out)


@pytest.mark.parametrize("case", with_marks(sample()))
def test_no_fault(case, rows):
    """No overflow of shared memory, no scalar access to rows, no spill; see audit.row.faults."""
    assert not report.judge(rows)[case], rows[case]


def test_every_kernel_is_audited():
    texts = [file.read_text() for file in (ROOT / "extrope_kernels").rglob("*.py")]
    found = [name for text in texts for name in re.findall(r"^def ([a-z]\w*_kernel)\(", text, re.M)]
    assert sorted(found) == sorted(TRITON.values())
    sources = (ROOT / "csrc" / "cuda").rglob("*.cu")
    cuda = {" ".join(dict.fromkeys((x.parent.name, x.stem, "cuda"))) for x in sources}
    cuda.remove("runtime why_not cuda")  # empty, and never launched
    cuda = {"rope append cuda" if name == "append cuda" else name for name in cuda}
    assert set(TRITON) | cuda == {name for name in KERNELS if not name.startswith("plain")}


def test_the_sample_meets_every_kernel_and_chip():
    assert {case.kernel for case in sample()} == set(KERNELS)
    for op in ("rope triton", "rope cuda", "attention forward", "cache decode"):
        assert {case.capability for case in sample() if case.kernel == op} == set(CHIPS)
    assert {case.capability for case in sample()} == set(CHIPS)
    assert set(sample()) <= set(all_cases())


@pytest.mark.parametrize("case", COMPARED, ids=str)
def test_a_tile_costs_what_it_costs_without_regions(case, rows, record_property):
    """Masked and full loops, of the far and of the near region: the same work for each tile."""
    found = rows[case].loops
    one_region = Case(case.kernel, case.capability, case.head_dim, case.dtype, "R1")
    yardstick = rows[one_region].loops
    assert len(yardstick) == 2 and len(found) == 4
    for kind in ("products", "special"):
        (amount,) = {getattr(loop, kind) for loop in (*found, *yardstick)}
        assert amount > 0
    # The full loops are the shorter ones: those of far and near keys against that of plain ones.
    ratio = found[1].instructions / yardstick[0].instructions
    record_property("instructions of a full tile, ratio to one region", round(ratio, 3))
    assert ratio < 1.1


CUDA = [case for case in sample() if needs_nvcc(case) and not case.has("elements")]


@pytest.mark.parametrize("case", with_marks(CUDA))
def test_enough_loads_in_flight(case, rows):
    """A processor holds loads enough in flight to hide the memory's latency: 48 KiB at least."""
    heads, tensors = (2, 2) if case.has("gradient") else (4, 1)
    threads = rows[case].blocks * rows[case].warps * 32
    assert threads * heads * tensors * 2 * 16 >= 48 * 1024


@pytest.mark.parametrize("case", [c for c in sample() if c.kernel == "cache decode"], ids=str)
def test_products_on_tensor_cores(case, rows):
    assert case.dtype == "float32" or any(loop.products for loop in rows[case].loops)


def test_no_window_or_length_compiles_again(run_python):
    source = """
        import sys; sys.path.insert(0, "bench")
        from unittest import mock
        from audit.case import Case
        from audit.entries import attention

        case, found = Case("attention forward", 80, 64, "bfloat16", "R2"), set()
        for window, seqlen in ((2048, 8192), (1, 8191), (16, 1024)):
            with mock.patch.multiple(attention, WINDOW=window, SEQLEN=seqlen):
                found.add(attention.prepare(case)[0].made_from(80))
        assert len(found) == 1
    """
    run_python(source, TRITON_INTERPRET="0")


def test_only_what_changes_the_machine_code_compiles_again(run_python, tmp_path):
    """A row is known again by its own tile, chip and kernel, compiled once here to compare."""
    source = f"""
        import sys; sys.path.insert(0, "bench")
        from pathlib import Path
        from unittest import mock
        from audit import report, run
        from audit.case import Case
        from audit.entries import plain
        from audit.entries.triton_compiler import Launch

        run.CACHE, out = Path({str(tmp_path)!r}) / "cache", Path({str(tmp_path)!r}) / "rows.json"
        copy, other = (Case("plain copy", chip, 128, "bfloat16") for chip in (90, 80))
        compiled = []
        compile = Launch.compile
        def counted(launch, capability):
            compiled.append(launch.kernel.__name__)
            return compile(launch, capability)

        def rows(case, known, afresh=False):
            compiled.clear()
            return list(run.rows([case], [known.get(case)], afresh).values()), list(compiled)

        with mock.patch.object(Launch, "compile", counted):
            (row,), did = rows(copy, {{}})
            assert did == ["copy_kernel"]
            report.save({{copy: row}}, out, {{}})
            known = report.load_known(out)
            assert rows(copy, {{}})[1] == []  # from build/
            run.CACHE = run.CACHE / "none"
            (again,), did = rows(copy, known)  # from the file
            assert did == [] and again == row
            assert rows(copy, known, afresh=True) == ([row], ["copy_kernel"])
            with mock.patch.object(plain, "COPIED", 2**27):  # another launch of the same code
                (slower,), did = rows(copy, known)
                assert did == [] and slower.seconds["memory"] == 2 * row.seconds["memory"]
            run.CACHE = run.CACHE / "none"
            with mock.patch.object(plain, "COPY_BLOCK", 4096):
                (smaller,), did = rows(copy, known)
                assert did == ["copy_kernel"] and smaller.made_from != row.made_from
            # Another reading of the binary may find other things.
            with mock.patch.object(report, "reader", lambda: "another"):
                assert report.load_known(out) == {{}}
    """
    run_python(source, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path / "triton"))


def test_the_committed_rows_are_of_these_sources(rows):
    """Or the README's table is of other kernels: run bench/gpu_audit.py, then bench/readme.py."""
    path = ROOT / "bench" / "results" / "gpu_audit.json"
    known = report.load(path)
    assert set(sample()) <= set(known) <= set(all_cases())
    if json.loads(path.read_text())["triton"] != importlib.metadata.version("triton"):
        pytest.skip("compiled with another Triton")
    of_triton = [case for case in rows if not needs_nvcc(case)]
    stale = [str(c) for c in of_triton if known[c].made_from != rows[c].made_from]
    assert of_triton and not stale


@pytest.mark.skipif(bool(nvcc_is_missing()), reason=nvcc_is_missing())
def test_a_source_is_what_it_includes():
    """An edit of one CUDA source leaves the rows of the other as they are."""
    path = _build.source_dir() / "cuda"
    rope, permute = (
        {file.name for file in nvcc.included((path / Path(name).stem / name).resolve(), set())}
        for name in ("rope.cu", "permute.cu")
    )
    assert {"rope.cu", "rotation.h", "tokens.h", "rope_params.h"} <= rope
    assert {"permute.cu", "cycles.h", "tokens.h", "permute_params.h"} <= permute
    assert not {"permute.cu", "cycles.h"} & rope and not {"rope.cu", "rotation.h"} & permute


def test_faults_are_found(rows, monkeypatch):
    case = COMPARED[0]
    row = rows[case]
    for change, word in (
        ({"stack": 8}, "stack"),
        ({"shared": 2**18}, "shared"),
        ({"narrow": True}, "16 bytes"),
    ):
        (fault,) = report.judge({case: replace(row, **change)})[case]
        assert word in fault
    monkeypatch.setattr(report, "allowed_stack", lambda case: 48)  # as if its tile were measured
    assert not report.judge({case: replace(row, stack=48)})[case]
    assert report.judge({case: replace(row, stack=52)})[case]


def test_tiles_are_counted(monkeypatch):
    """Three tiles by hand: six on and under the diagonal; with a window of one tile, eight."""
    monkeypatch.setattr(attention, "SEQLEN", 3 * 64)
    count = attention.tiles.__wrapped__
    first, *_ = attention.layout(COMPARED[0])[0]
    for by_key in (False, True):
        assert count((first,), 1, 64, 64, by_key) == 6
        assert count((first, 1 - 64), 1, 64, 64, by_key) == 8


def test_the_yardstick_is_attention():
    """The plain kernels, interpreted, against PyTorch: they would else be no yardstick."""
    seqlen, dim, scale, group = 64, 16, 0.25, 2
    sizes = {"SEQLEN": seqlen, "QUERIES": 32, "KEYS": 16, "DIM": dim}
    q, dout = torch.randn(2, 2, seqlen, dim).unbind()
    k, v = torch.randn(2, 1, seqlen, dim).unbind()
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(
        *leaves, is_causal=True, scale=scale, enable_gqa=True
    )
    expected.backward(dout)

    out, dq, dk, dv = (torch.empty_like(x) for x in (q, q, k, v))
    lse = torch.empty(2, seqlen)
    given = (scale * 1.4426950408889634, group)
    plain_kernels.forward_kernel[(2, 2)](q, k, v, out, lse, *given, **sizes)
    delta = (dout * out).sum(-1)
    backward = (q, k, v, dout, lse, delta)
    plain_kernels.dq_kernel[(2, 2)](*backward, dq, *given, **sizes)
    plain_kernels.dkv_kernel[(4, 1)](*backward, dk, dv, *given, **sizes)
    torch.testing.assert_close(out, expected)
    # dq and dk short of the scale, which a kernel that rotates folds in elsewhere.
    for found, leaf in zip((dq * scale, dk * scale, dv), leaves):
        torch.testing.assert_close(found, leaf.grad)
