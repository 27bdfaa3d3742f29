"""The composition over flash-attention calls against the reference, on engines made of PyTorch."""

import inspect
import math
import sys

import pytest
import torch
from attention_engines import TorchEngine, aten_backward, aten_forward
from flash_attn_stubs import stub_modules

from extrope_kernels.ops.attention import flash_attn, reference
from extrope_kernels.ops.attention.flash_attn import engine_check, engines
from extrope_kernels.ops.attention.regions import FIRST_KEY, Layout
from extrope_kernels.testing import assert_within_budget

ENGINES = {
    "shifts": TorchEngine("shifts", negative_right=True, dlse=True),
    "cuts": TorchEngine("cuts"),
    "base 2": TorchEngine("base 2", lse_unit=math.log(2.0)),
    "base 2, shifts": TorchEngine("base 2, shifts", lse_unit=math.log(2.0), negative_right=True),
    "aten": TorchEngine("aten", (aten_forward, aten_backward)),
}
N = 11
ONE_REGION = [(FIRST_KEY,), (-2,), (0,), (5,)]
REROPE = [(FIRST_KEY, 1 - window) for window in (1, 2, 5, N - 1, N, N + 1)]
OTHERS = [(-6, -2), (-3, -3), (FIRST_KEY, 1), (FIRST_KEY, 4), (-2, 1)]
LAYOUTS = ONE_REGION + REROPE + OTHERS
CU_SEQLENS = [0, 0, 3, 3, 14, 15, 20, 20]


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors this small only wait for one another's threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=ENGINES)
def engine(request):
    return ENGINES[request.param]


def make(starts, seqlen_q=N, seqlen_k=N, heads=(4, 2), cu_seqlens=None, dtype=torch.float64):
    """q, k, v, layout, dout, dlse; packed with cu_seqlens. Every region has frames of its own."""
    generator = torch.Generator().manual_seed(len(starts) * 31 + seqlen_q)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    batch = () if cu_seqlens else (2,)
    if cu_seqlens:
        seqlen_q = seqlen_k = cu_seqlens[-1]
    q = [randn(*batch, seqlen_q, heads[0], 16) for _ in starts]
    k = [randn(*batch, seqlen_k, heads[1], 16) for _ in starts]
    v = randn(*batch, seqlen_k, heads[1], 16)
    layout = Layout(
        starts=starts,
        granularity=1,
        softmax_scale=0.3,
        row_scale=1.0 + torch.rand(seqlen_q, generator=generator),
        cu_seqlens=torch.tensor(cu_seqlens, dtype=torch.int32) if cu_seqlens else None,
    )
    return q, k, v, layout, randn(*q[0].shape), randn(*batch, heads[0], seqlen_q).double()


def run(module, q, k, v, layout, dout, dlse, **options):
    out, lse = module.forward(q, k, v, layout, **options)
    dq, dk, dv = module.backward(dout, dlse, q, k, v, out, lse, layout, **options)
    return {
        "out": out,
        "lse": lse,
        **{f"dq[{r}]": x for r, x in enumerate(dq)},
        **{f"dk[{r}]": x for r, x in enumerate(dk)},
        "dv": dv,
    }


def assert_agrees(engine, inputs, dlse=True):
    if not dlse:
        inputs = (*inputs[:-1], None)
    expected, got = run(reference, *inputs), run(flash_attn, *inputs, engine=engine)
    for name, x in got.items():
        assert x.is_contiguous(), name
        torch.testing.assert_close(x, expected[name], msg=lambda text: f"{name}: {text}")  # noqa: B023


@pytest.mark.parametrize("starts", LAYOUTS, ids=str)
@pytest.mark.parametrize(
    ("seqlens", "dlse"),
    [((N, N), False), ((N, N), True), ((4, N), True), ((N, 4), True), ((1, N), False)],
    ids=str,
)
@pytest.mark.parametrize("name", ["cuts", "aten"])
def test_agrees_with_the_reference(name, starts, seqlens, dlse):
    assert_agrees(ENGINES[name], make(starts, *seqlens), dlse)


@pytest.mark.parametrize("starts", LAYOUTS, ids=str)
@pytest.mark.parametrize("dlse", [False, True], ids=["", "dlse"])
def test_agrees_with_the_reference_packed(engine, starts, dlse):
    assert_agrees(engine, make(starts, cu_seqlens=CU_SEQLENS), dlse)


@pytest.mark.parametrize("heads", [(1, 1), (3, 1), (3, 3), (8, 2)], ids=str)
@pytest.mark.parametrize("cu_seqlens", [None, CU_SEQLENS], ids=["dense", "packed"])
def test_heads(engine, heads, cu_seqlens):
    assert_agrees(engine, make((FIRST_KEY, -2), heads=heads, cu_seqlens=cu_seqlens))


@pytest.mark.parametrize("sizes", [(0, N), (N, 0), (0, 0)], ids=str)
def test_nothing_to_attend(engine, sizes):
    inputs = make((FIRST_KEY, -2), *sizes)
    got = run(flash_attn, *inputs, engine=engine)
    assert (got.pop("lse") == -torch.inf).all()
    assert all((x == 0).all() for x in got.values())
    assert got["dv"].shape == inputs[2].shape and got["dq[1]"].shape == inputs[0][1].shape


def test_packed_without_tokens(engine):
    got = run(flash_attn, *make((FIRST_KEY, -2), cu_seqlens=[0, 0]), engine=engine)
    assert got["out"].shape == (0, 4, 16) and got["lse"].shape == (4, 0)


def test_strided_inputs_and_shared_frames(engine):
    q, k, v, layout, dout, dlse = make((FIRST_KEY, -2), heads=(2, 2))
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in q]
    fused = torch.cat((k[0], v), dim=-1)
    keys, values = fused[..., :16], fused[..., 16:]
    dout = dout[:1].expand(2, -1, -1, -1)
    assert_agrees(engine, (heads_first, [keys, keys], values, layout, dout, dlse))


def test_a_window_of_everything_is_one_plain_call():
    engine = TorchEngine("counted")
    q, k, v, layout, *_ = make((FIRST_KEY, -N))
    examined = engine_check.examine(engine, v)
    engine.calls.clear()
    out, lse = flash_attn.forward(q, k, v, layout, engine)
    assert examined.lse_unit == 1.0 and engine.calls == [(None, 0)]
    plain = Layout((FIRST_KEY,), 1, layout.softmax_scale, layout.row_scale, None)
    for got, want in zip((out, lse), flash_attn.forward(q[1:], k[1:], v, plain, engine)):
        assert torch.equal(got, want)


def test_repeats_bit_for_bit(engine):
    inputs = make((FIRST_KEY, -2), cu_seqlens=CU_SEQLENS)
    first, second = (run(flash_attn, *inputs, engine=engine) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


# -------------------------------------------------------------------------------------------------
# The packages


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


def in_dtype(q, k, v, layout, dout, dlse):
    """The formula with every step rounded to the dtype: flash-attention's own yardstick."""
    packed = layout.cu_seqlens is not None
    leaves = [x.detach().clone().requires_grad_() for x in (*q, *k, v)]
    q, k, v = leaves[: len(q)], leaves[len(q) : -1], leaves[-1]
    row_scale = 1.0 if layout.row_scale is None else layout.row_scale[:, None, None]
    group, logits = q[0].shape[-2] // v.shape[-2], torch.tensor(-torch.inf, device=v.device)
    for r, (q_r, k_r) in enumerate(zip(q, k)):
        batched = [x[None] if packed else x for x in (q_r, k_r)]
        visible = reference._visible(r, *batched, layout)
        q_r = (q_r * row_scale).to(v.dtype)
        scores = torch.einsum("...ihd,...jhd->...hij", q_r, k_r.repeat_interleave(group, -2))
        logits = torch.where(visible, scores * layout.softmax_scale, logits.to(v.dtype))
    weights = torch.softmax(logits, -1)
    out = torch.einsum("...hij,...jhd->...ihd", weights, v.repeat_interleave(group, -2))
    lse = torch.logsumexp(logits.float(), -1)
    loss = (out * dout).sum() + (0.0 if dlse is None else (lse * dlse).sum())
    grads = torch.autograd.grad(loss, leaves)
    names = [f"d{x}[{r}]" for x in "qk" for r in range(len(q))] + ["dv"]
    return {"out": out.detach(), "lse": lse.detach(), **dict(zip(names, grads))}


def assert_package_within_budget(q, k, v, layout, dout, dlse, engine=None):
    got = run(flash_attn, q, k, v, layout, dout, dlse, engine=engine)
    same_dtype = in_dtype(q, k, v, layout, dout, dlse)
    wide = ([x.double() for x in frames] for frames in (q, k))
    wide_dlse = None if dlse is None else dlse.double()
    exact = run(reference, *wide, v.double(), layout, dout.double(), wide_dlse)
    for name, x in got.items():
        expected = torch.float32 if name[:2] in ("ls", "dq", "dk") else v.dtype
        assert x.dtype == expected, name
        # A package rounds the gradients of frames to the dtype.
        x = x.to(same_dtype[name].dtype)
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
    q, k, v, layout, dout, dlse = inputs
    cu_seqlens = None if cu_seqlens is None else layout.cu_seqlens.cuda()
    layout = Layout(layout.starts, 1, 0.3, layout.row_scale.cuda(), cu_seqlens)
    q, k = ([x.cuda() for x in frames] for frames in (q, k))
    assert_package_within_budget(q, k, v.cuda(), layout, dout.cuda(), dlse.float().cuda())


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


def test_missing_is_none_where_a_package_is(packages, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    assert flash_attn.missing() is None


@pytest.mark.parametrize(
    ("starts", "granularity"), [((FIRST_KEY, -3), 3), ((FIRST_KEY, -4, -2), 1), ((-3,), 3)]
)
def test_refuses_other_layouts(engine, starts, granularity):
    q, k, v, layout, *_ = make(starts)
    layout = Layout(starts, granularity, 1.0, None, None)
    with pytest.raises(NotImplementedError, match="one or two regions of granularity 1, got"):
        flash_attn.forward(q, k, v, layout, engine)


def test_refuses_what_no_package_takes():
    q, k, v, layout, *_ = make((FIRST_KEY,), dtype=torch.float32)
    with pytest.raises(NotImplementedError, match=r"v must be one of .*got torch.float32"):
        flash_attn.forward(q, k, v, layout)
    q, k, v = [x.half() for x in q], [x.half() for x in k], v.half()
    with pytest.raises(NotImplementedError, match="q must be on a CUDA GPU, got cpu"):
        flash_attn.forward(q, k, v, layout)


def test_refuses_a_gradient_of_lse_that_has_no_lanes_left():
    engine = TorchEngine("narrow")
    engine.max_head_dim = 16
    with pytest.raises(NotImplementedError, match="head_dim up to 8 with narrow, got 16"):
        run(flash_attn, *make((FIRST_KEY,)), engine=engine)
