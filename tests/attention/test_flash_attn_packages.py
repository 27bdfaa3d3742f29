"""The flash-attention packages behind the composition: error budgets, who runs where, refusals."""

import inspect
import sys
from dataclasses import replace

import pytest
import torch
from attention_engines import TorchEngine
from flash_attn_cases import CU_SEQLENS, call_of, make, run
from flash_attn_stubs import stub_modules

from extrope_kernels.ops._shared.attention_call import row_scale
from extrope_kernels.ops.attention import flash_attn, frames, reference
from extrope_kernels.ops.attention.flash_attn import engine_check, engines
from extrope_kernels.scores import FIRST_KEY
from extrope_kernels.testing import assert_within_budget

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def packages(monkeypatch):
    """Stubs of all three, as installed; what was known of engines is forgotten before and after."""

    def forget():
        engines.why_not.cache_clear()
        engine_check._findings.cache_clear()

    modules = stub_modules()
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    forget()
    yield modules
    forget()


def in_dtype(q, k, v, call, dout, dlse):
    """The formula with every step rounded to the dtype: flash-attention's own yardstick."""
    packed = call.cu_seqlens is not None
    leaves = q, k, v = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    i, _ = frames.positions(q, k, call)
    scale = row_scale(i, call)[:, None, None]
    group, logits = q.shape[-2] // v.shape[-2], torch.tensor(-torch.inf, device=v.device)
    for r, (q_r, k_r) in enumerate(zip(*frames.rotate(q, k, call))):
        batched = [x[None] if packed else x for x in (q_r, k_r)]
        visible = reference._visible(r, *batched, call)
        q_r = (q_r * scale).to(v.dtype)
        scores = torch.einsum("...ihd,...jhd->...hij", q_r, k_r.repeat_interleave(group, -2))
        logits = torch.where(visible, scores * call.softmax_scale, logits.to(v.dtype))
    weights = torch.softmax(logits, -1)
    out = torch.einsum("...hij,...jhd->...ihd", weights, v.repeat_interleave(group, -2))
    lse = torch.logsumexp(logits.float(), -1)
    loss = (out * dout).sum() + (0.0 if dlse is None else (lse * dlse).sum())
    grads = torch.autograd.grad(loss, leaves)
    return {"out": out.detach(), "lse": lse.detach(), **dict(zip(("dq", "dk", "dv"), grads))}


def assert_package_within_budget(q, k, v, call, dout, dlse, engine=None):
    got = run(flash_attn, q, k, v, call, dout, dlse, engine=engine)
    same_dtype = in_dtype(q, k, v, call, dout, dlse)
    wide_dlse = None if dlse is None else dlse.double()
    exact = run(reference, q.double(), k.double(), v.double(), call, dout.double(), wide_dlse)
    for name, x in got.items():
        assert x.dtype == (torch.float32 if name == "lse" else v.dtype), name
        assert_within_budget(name, x, same_dtype[name], exact[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cu_seqlens", [None, CU_SEQLENS], ids=["dense", "packed"])
@pytest.mark.parametrize("dlse", [False, True], ids=["", "dlse"])
@pytest.mark.parametrize("package", engines.ENGINES, ids=lambda engine: engine.name)
def test_packages_within_the_error_budget(packages, monkeypatch, package, dlse, cu_seqlens, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    *given, lse_grad = make((FIRST_KEY, -2), cu_seqlens=cu_seqlens, dtype=dtype)
    lse_grad = lse_grad.float() if dlse else None
    assert_package_within_budget(*given, lse_grad, engine=package)


@pytest.mark.parametrize("package", engines.ENGINES, ids=lambda engine: engine.name)
def test_installed_packages_have_the_recorded_parameters(package):
    if package.missing():
        pytest.skip(package.missing())
    for name, stub in vars(stub_modules()[package.module]).items():
        if name.startswith("_flash_attn") or name.startswith("flash_attn"):
            function = getattr(package._functions(), name)
            function = getattr(function, "_init_fn", function)
            assert set(inspect.signature(stub).parameters) <= set(
                inspect.signature(function).parameters
            )


@pytest.mark.skipif(flash_attn.missing() is not None, reason=str(flash_attn.missing()))
@pytest.mark.parametrize("cu_seqlens", [None, [0, 100, 100, 613]], ids=["dense", "packed"])
@pytest.mark.parametrize("window", [1, 100, 300])
def test_the_installed_package_within_the_error_budget(window, cu_seqlens):
    inputs = make((FIRST_KEY, 1 - window), 300, 613, cu_seqlens=cu_seqlens, dtype=torch.bfloat16)
    q, k, v, call, dout, dlse = inputs
    cu_seqlens = None if cu_seqlens is None else call.cu_seqlens.cuda()
    call = replace(call, inv_freq=call.inv_freq.cuda(), cu_seqlens=cu_seqlens)
    q, k, v, dout, dlse = (x.cuda() for x in (q, k, v, dout, dlse.float()))
    assert_package_within_budget(q, k, v, call, dout, dlse)


# -------------------------------------------------------------------------------------------------
# Choice and refusals


@pytest.mark.parametrize(
    ("capability", "head_dim", "reasons"),
    [
        ((8, 0), 64, {"flash-attn 4": "compute capability", "flash-attn 3": "needs compute"}),
        ((9, 0), 256, {"flash-attn 3": "head_dim up to 192, got 256"}),
        ((10, 0), 160, {"flash-attn 4": "up to 128, or 256", "flash-attn 3": "capability 9.x"}),
        ((12, 0), 64, {"flash-attn 4": "repeatable backward", "flash-attn 3": "capability 9.x"}),
        ((7, 5), 64, {name: "capability" for name in ("flash-attn 2", "flash-attn 3")}),
    ],
)
def test_who_runs_where(packages, capability, head_dim, reasons):
    for engine in engines.ENGINES:
        why = engines.why_not(engine, capability, head_dim)
        if engine.name in reasons:
            assert why.startswith(engine.name) and reasons[engine.name] in why
        elif capability[0] >= 8:
            assert why is None


def test_missing_says_why_in_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert flash_attn.missing() == "flash-attention needs a CUDA GPU"
    engines.why_not.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    for name in stub_modules():
        monkeypatch.setitem(sys.modules, name, None)  # an import of it fails
    why = flash_attn.missing()
    engines.why_not.cache_clear()
    assert "\n" not in why and all(engine.name in why for engine in engines.ENGINES)


def test_a_package_may_fail_as_it_likes_to_be_imported(monkeypatch):
    def broken(name):
        raise KeyError("made for another CUDA")

    monkeypatch.setattr(engines.importlib, "import_module", broken)
    for engine in engines.ENGINES:
        assert engine.missing() == "cannot be imported: 'made for another CUDA'"


def test_missing_is_none_where_a_package_is(packages, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    assert flash_attn.missing() is None


@pytest.mark.parametrize(
    ("starts", "granularity"), [((FIRST_KEY, -3), 3), ((FIRST_KEY, -4, -2), 1), ((-3,), 3)]
)
def test_refuses_other_regions(engine, starts, granularity):
    q, k, v, *_ = make(starts)
    with pytest.raises(NotImplementedError, match="one or two regions of granularity 1, got"):
        flash_attn.forward(q, k, v, call_of(starts, granularity), engine)


def test_refuses_what_no_package_takes():
    q, k, v, call, *_ = make((FIRST_KEY,), dtype=torch.float32)
    with pytest.raises(NotImplementedError, match=r"v must be one of .*got torch.float32"):
        flash_attn.forward(q, k, v, call)
    q, k, v = (x.half() for x in (q, k, v))
    with pytest.raises(NotImplementedError, match="q must be on a CUDA GPU, got cpu"):
        flash_attn.forward(q, k, v, call)


def test_refuses_a_gradient_of_lse_that_has_no_dims_left():
    engine = TorchEngine("narrow")
    engine.max_head_dim = 16
    with pytest.raises(NotImplementedError, match="head_dim up to 8 with narrow, got 16"):
        run(flash_attn, *make((FIRST_KEY,)), engine=engine)
