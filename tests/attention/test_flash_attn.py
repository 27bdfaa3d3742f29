"""The composition over flash-attention: against the reference, on engines made of PyTorch and on
stand-ins for the packages; who runs where, and refusals.
"""

import sys
from dataclasses import replace

import pytest
import torch
from support.attention_engines import (
    CU_SEQLENS,
    ENGINES,
    N,
    TorchEngine,
    assert_agrees,
    call_of,
    make,
    run,
)
from support.flash_attn_stubs import installed_source, signatures, stub_module, stub_modules

from extrope_kernels.methods import rope
from extrope_kernels.ops.attention import flash_attn, places, reference
from extrope_kernels.ops.attention.flash_attn import engines
from extrope_kernels.scores import FIRST_KEY, Region
from extrope_kernels.scores.base import PairRow
from extrope_kernels.testing import assert_within_budget

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=ENGINES)
def engine(request):
    return ENGINES[request.param]


LAYOUTS = [(FIRST_KEY,), (-2,), (0,), (5,)]
LAYOUTS += [(FIRST_KEY, 1 - window) for window in (1, 2, 5, N - 1, N, N + 1)]
LAYOUTS += [(-6, -2), (-3, -3), (FIRST_KEY, 1), (FIRST_KEY, 4), (-2, 1)]
LAYOUTS += [(FIRST_KEY, -6, -2), (-8, -4, -4)]


@pytest.mark.parametrize("starts", LAYOUTS, ids=str)
@pytest.mark.parametrize(
    ("seqlens", "dlse"),
    [((N, N), False), ((N, N), True), ((4, N), True), ((N, 4), True), ((1, N), False)],
    ids=str,
)
def test_agrees_with_the_reference(starts, seqlens, dlse):
    assert_agrees(ENGINES["no dlse"], make(starts, *seqlens), dlse)


@pytest.mark.parametrize("starts", LAYOUTS, ids=str)
@pytest.mark.parametrize("dlse", [False, True], ids=["", "dlse"])
def test_agrees_with_the_reference_packed(engine, starts, dlse):
    assert_agrees(engine, make(starts, cu_seqlens=CU_SEQLENS), dlse)


SWITCHES = {
    "sinks": {"sinks": torch.tensor([3.0, -1.0, 0.0, -torch.inf], dtype=torch.float64)},
    "softcap": {"softcap": 0.7},
    "sliding_window of the near region": {"sliding_window": 2},
    "sliding_window of both": {"sliding_window": 5},
    "no query_scale": {"query_scale": None},
    "rotary_offset": {"rotary_offset": 3, "inv_freq": rope(10).inv_freq},
}


OF_PAIRS = PairRow(0, floor=False, row=0)
SWITCHES["frequencies of heads and divisors of pairs"] = {
    "inv_freq": rope(16).inv_freq * torch.tensor([1.0, 0.5])[None, :, None],
    "pair_maps": 1 + torch.arange(16).view(1, 2, 8).double().sqrt(),
}


@pytest.mark.parametrize("cu_seqlens", [None, CU_SEQLENS], ids=["dense", "packed"])
@pytest.mark.parametrize("switch", SWITCHES)
def test_options(engine, switch, cu_seqlens):
    """Sinks join as a set of keys of their own, windows as bands, caps are the engine's."""
    options = SWITCHES[switch]
    *tensors, call, dout, dlse = make((FIRST_KEY, -2), cu_seqlens=cu_seqlens)
    if "pair_maps" in options:
        regions = (Region(FIRST_KEY, OF_PAIRS, OF_PAIRS), call.regions[1])
        options = {**options, "score": replace(call.score, regions=regions)}
    assert_agrees(engine, (*tensors, call._replace(**options), dout, dlse))


@pytest.mark.parametrize("heads", [(1, 1), (3, 1), (3, 3), (8, 2)], ids=str)
@pytest.mark.parametrize("cu_seqlens", [None, CU_SEQLENS], ids=["dense", "packed"])
def test_heads(engine, heads, cu_seqlens):
    assert_agrees(engine, make((FIRST_KEY, -2), heads=heads, cu_seqlens=cu_seqlens))


@pytest.mark.parametrize("sizes", [(0, N), (N, 0), (0, 0), None], ids=str)
def test_nothing_to_attend(engine, sizes):
    inputs = make((FIRST_KEY, -2), *(sizes or ()), cu_seqlens=None if sizes else [0, 0])
    got = run(flash_attn, *inputs, engine=engine)
    assert (got.pop("lse") == -torch.inf).all()
    assert all((x == 0).all() for x in got.values())
    assert got["dv"].shape == inputs[2].shape and got["dq"].shape == inputs[0].shape


def test_strided_inputs(engine):
    q, k, v, call, dout, dlse = make((FIRST_KEY, -2), heads=(2, 2))
    heads_first = q.transpose(1, 2).contiguous().transpose(1, 2)
    fused = torch.cat((k, v), dim=-1)
    keys, values = fused[..., :16], fused[..., 16:]
    dout = dout[:1].expand(2, -1, -1, -1)
    assert_agrees(engine, (heads_first, keys, values, call, dout, dlse))


def test_a_window_of_everything_is_one_plain_call():
    engine = TorchEngine("counted")
    q, k, v, call, *_ = make((FIRST_KEY, -N))
    out, lse = flash_attn.forward(q, k, v, call, engine)
    assert engine.calls == [None]
    near = call.regions[1]._replace(start=FIRST_KEY)
    plain = call._replace(score=replace(call.score, regions=(near,)))
    for got, want in zip((out, lse), flash_attn.forward(q, k, v, plain, engine)):
        assert torch.equal(got, want)


# -------------------------------------------------------------------------------------------------
# The packages: error budgets


@pytest.fixture
def packages(monkeypatch):
    """Stubs of all three, as installed; what was known of engines is forgotten before and after."""

    modules = stub_modules()
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    engines.why_not.cache_clear()
    yield modules
    engines.why_not.cache_clear()


def in_dtype(q, k, v, call, dout, dlse):
    """The formula with every step rounded to the dtype: flash-attention's own yardstick."""
    packed = call.cu_seqlens is not None
    leaves = q, k, v = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    i, j = places.positions(q, k, call)
    scale = call.query_scale[:, None, None]
    group, logits = q.shape[-2] // v.shape[-2], torch.tensor(-torch.inf, device=v.device)
    own = torch.ones(len(q), len(q), dtype=torch.bool) if packed else torch.tensor(True)
    if packed:  # only its own sequence's keys
        sequence = (torch.arange(len(q))[:, None] >= call.cu_seqlens.cpu()[1:]).sum(1)
        own = sequence[:, None] == sequence
    firsts = [x[:, None] for x in call.first_keys(i)]
    for first, end, q_r, k_r in zip(firsts, firsts[1:], *places.rotate(q, k, call)):
        visible = (first <= j) & (j < end) & own.to(j.device)
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
def test_the_installed_package_has_the_parameters(packages, monkeypatch, package):
    """Its source is read, which takes no GPU."""
    source = installed_source(package.module)
    if source is None:
        pytest.skip(f"{package.name} is not installed")
    module = stub_module(package.module, signatures(source))
    monkeypatch.setitem(sys.modules, package.module, module)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    for cu_seqlens in (None, CU_SEQLENS):
        *given, _ = make((FIRST_KEY, -2), cu_seqlens=cu_seqlens, dtype=torch.bfloat16)
        assert_package_within_budget(*given, None, engine=package)


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0), (12, 0)], ids=str)
@pytest.mark.parametrize("package", engines.ENGINES, ids=lambda engine: engine.name)
def test_a_package_takes_every_call_that_is_not_refused(packages, monkeypatch, package, capability):
    """Windows, a cap and the gradient of lse, at the head_dims at which packages differ."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    for head_dim in (8, 128, 136, 184, 192, 256):
        if package.refuses(capability, head_dim) or head_dim > package.max_head_dim:
            continue
        options = {"dtype": torch.bfloat16, "head_dim": head_dim, "softcap": 5.0}
        *given, dlse = make((FIRST_KEY, -2), **options)
        takes_dlse = package.takes_dlse or head_dim + 8 <= package.max_head_dim
        run(flash_attn, *given, dlse.float() if takes_dlse else None, engine=package)


@pytest.mark.skipif(flash_attn.missing() is not None, reason=str(flash_attn.missing()))
@pytest.mark.parametrize("cu_seqlens", [None, [0, 100, 100, 613]], ids=["dense", "packed"])
@pytest.mark.parametrize("window", [1, 100, 300])
def test_the_installed_package_within_the_error_budget(window, cu_seqlens):
    inputs = make((FIRST_KEY, 1 - window), 300, 613, cu_seqlens=cu_seqlens, dtype=torch.bfloat16)
    q, k, v, call, dout, dlse = inputs
    cu_seqlens = None if cu_seqlens is None else call.cu_seqlens.cuda()
    call = call._replace(inv_freq=call.inv_freq.cuda(), cu_seqlens=cu_seqlens)
    q, k, v, dout, dlse = (x.cuda() for x in (q, k, v, dout, dlse.float()))
    assert_package_within_budget(q, k, v, call, dout, dlse)


# -------------------------------------------------------------------------------------------------
# Who runs where, and refusals


@pytest.mark.parametrize(
    ("capability", "head_dim", "reasons"),
    [
        ((8, 0), 64, {"flash-attn 4": "compute capability", "flash-attn 3": "needs compute"}),
        ((9, 0), 256, {"flash-attn 3": "head_dim up to 192, got 256"}),
        ((10, 0), 256, {"flash-attn 4": "windows up to head_dim 128", "flash-attn 3": "192"}),
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


def test_missing_says_why_in_one_line(packages, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert flash_attn.missing() == "flash-attention needs a CUDA GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    assert flash_attn.missing() is None
    engines.why_not.cache_clear()
    for name in packages:
        monkeypatch.setitem(sys.modules, name, None)  # an import of it fails
    why = flash_attn.missing()
    assert why == "; ".join(f"{each.name} is not installed (optional)" for each in engines.ENGINES)

    def broken(name):
        raise KeyError("made for another CUDA")  # a package may fail as it likes

    monkeypatch.setattr(engines.importlib, "import_module", broken)
    for engine in engines.ENGINES:
        assert engine.missing() == "cannot be imported: 'made for another CUDA'"


@pytest.mark.parametrize("starts", [(FIRST_KEY, -3), (-3,)])
def test_refuses_other_regions(engine, starts):
    q, k, v, *_ = make(starts)
    with pytest.raises(NotImplementedError, match="a score's granularity must be 1, got 3"):
        flash_attn.forward(q, k, v, call_of(starts, 3), engine)


def test_refuses_what_it_cannot_compose():
    q, k, v, call, *_ = make((FIRST_KEY, -2))
    engine, start = TorchEngine("narrow"), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="q_start and k_start must be None, got one"):
        flash_attn.forward(q, k, v, call._replace(q_start=start), engine)
    with pytest.raises(NotImplementedError, match="v must have q's head_dim 16, got 8"):
        flash_attn.forward(q, k, v[..., :8], call, engine)
    with pytest.raises(NotImplementedError, match=r"v must be one of .*got torch.float32"):
        flash_attn.forward(q.float(), k.float(), v.float(), call)
    with pytest.raises(NotImplementedError, match="q must be on a CUDA GPU, got cpu"):
        flash_attn.forward(q.half(), k.half(), v.half(), call)
    engine.max_head_dim = 16  # without room for the gradient of lse
    with pytest.raises(NotImplementedError, match=r"head_dim must be at most 8 .* narrow, got 16"):
        run(flash_attn, *make((FIRST_KEY,)), engine=engine)
