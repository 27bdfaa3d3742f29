"""What the rotation's ops refuse beside single wrong arguments (see tests/all_ops)."""

import math
from dataclasses import replace

import pytest
import torch
from support.append_cases import CONTIGUOUS, FILLER, Step, ints

from extrope_kernels import (
    RopeFreqs,
    apply_rope,
    apply_rope_qk,
    methods,
    rope_append_kvcache,
    scores,
)
from extrope_kernels.ops.rope import norm, reference
from extrope_kernels.testing import device, make_qk

FREQS = methods.rope(64).to(device())
XPOS = methods.xpos(64).to(device())
SECTIONS = methods.with_sections(FREQS, (16, 8, 8))
NORM = {"q_norm_weight": torch.ones(64, device=device())}


@pytest.mark.parametrize("named", (None, "reference"))
@pytest.mark.parametrize(
    "freqs, error, message",
    [
        (RopeFreqs(torch.ones(1, 4, 32, device=device())), ValueError, r"q heads \(4\), got 2"),
        (replace(XPOS, decay_origin=math.nan), ValueError, "decay_origin must be finite, got nan"),
        (replace(XPOS, decay_origin=torch.zeros(())), TypeError, "must be a number, got Tensor"),
    ],
)
def test_frequencies_that_do_not_go_with_both_tensors(freqs, error, message, named):
    with pytest.raises(error, match=f"^rope: .*{message}"):
        apply_rope_qk(*make_qk(2, 5, 4, 2), freqs, backend=named)


@pytest.mark.parametrize("table", (torch.ones(5, 64), (torch.ones(5, 64),) * 2))
def test_tables_in_the_place_of_frequencies(table):
    q, k = make_qk(1, 5, 2)
    told = r"freqs must be a RopeFreqs, as methods.rope\(head_dim\) makes one, got .* cosines and"
    with pytest.raises(TypeError, match=f"^rope: {told}"):
        apply_rope(q, table)
    with pytest.raises(TypeError, match=f"^rope: {told}"):
        apply_rope_qk(q, k, table)


@pytest.mark.parametrize("largest", (-1, 3))
def test_an_axis_out_of_range(backend, largest):
    """On a CPU the axes are in reach; elsewhere they are clamped, as reading them would stall."""
    x, _ = make_qk(1, 3, 1)
    axes = SECTIONS.axes.clone()
    axes[5] = largest
    options = {"positions": torch.randint(0, 99, (3, 1, 3), device=device()), "backend": backend}
    if device() == "cpu":
        apply_rope(x, SECTIONS, **options)  # a call of the same layout was right
        with pytest.raises(ValueError, match=f"rope: axes must be from 0 to 2 .* got {largest}"):
            apply_rope(x, replace(SECTIONS, axes=axes), **options)
        return
    out = apply_rope(x, replace(SECTIONS, axes=axes), **options)
    near = replace(SECTIONS, axes=axes.clamp(0, 2))
    assert torch.equal(out, apply_rope(x, near, **options))


@pytest.mark.parametrize("norm", [{}, NORM], ids=["", "norm"])
def test_an_offset_past_float64(backend, norm):
    """A number that is the same in every layout: right calls before let no wrong one through."""
    q, k = make_qk()
    options = {"backend": "triton" if norm and backend == "cuda" else backend, **norm}
    for sign in (-1, 1):
        apply_rope_qk(q, k, FREQS, positions=sign * 2**53, **options)
        for offset in (sign * (2**53 + 1), sign * (2**63 - 1)):
            told = rf"^rope: an offset of positions must be within 2\*\*53, got {offset}$"
            with pytest.raises(ValueError, match=told):
                apply_rope_qk(q, k, FREQS, positions=offset, **options)


@pytest.mark.skipif(device() == "cuda", reason="values on a GPU are not looked at")
@pytest.mark.parametrize("dtype", (torch.int64, torch.float32, torch.float64))
def test_positions_past_float64(backend, dtype):
    """From 2**58 on the kernels' cosines and sines were of any size."""
    q, _ = make_qk()
    for shape in (q.shape[:2], (q.shape[1],), (q.shape[0], 1)):  # the last are offsets
        for far in (-(2**53), 2**53):
            positions = torch.zeros(shape, dtype=dtype)
            positions[..., -1] = far
            assert apply_rope(q, FREQS, positions=positions, backend=backend).isfinite().all()
            positions[..., -1] = 2 * far
            told = r"^rope: positions must be within 2\*\*53, got"
            with pytest.raises(ValueError, match=told):
                apply_rope(q, FREQS, positions=positions, backend=backend)
    axes = torch.zeros(3, *q.shape[:2], dtype=dtype)
    axes[-1, -1, -1] = 2**60
    with pytest.raises(ValueError, match=r"^rope: positions must be within 2\*\*53, got"):
        apply_rope(q, SECTIONS, positions=axes, backend=backend)


BARE_FWD = [torch.ops.extrope.rope_fwd, torch.ops.extrope.rope_fwd_triton, reference.rope_fwd]


@pytest.mark.parametrize("origin", (math.inf, -math.inf, math.nan))
@pytest.mark.parametrize("op", BARE_FWD, ids=("cpu", "triton", "reference"))
def test_the_raw_ops_want_a_finite_origin(op, origin):
    q, k = make_qk()
    options = {"log_decay": torch.ones(32, device=device()), "decay_origin": origin}
    with pytest.raises((RuntimeError, ValueError), match=r"^rope: decay_origin must be finite"):
        op(q, k, FREQS.inv_freq, **options)
    if op is reference.rope_fwd:
        return
    append = torch.ops.extrope.rope_append
    append = append if op is BARE_FWD[0] else torch.ops.extrope.rope_append_triton
    given = (None, STEP.k, STEP.v, CACHE, OTHER, STEP.freqs.inv_freq, CONTIGUOUS["cache_seqlens"])
    with pytest.raises((RuntimeError, ValueError), match=r"decay_origin must be finite"):
        append(*given, decay_origin=origin)
    assert (CACHE == FILLER).all()


@pytest.mark.parametrize("name", ("positions", "log_decay"))
def test_what_has_no_gradient_says_so(backend, name):
    q, _ = make_qk()
    leaf = torch.ones(13 if name == "positions" else 32, device=device(), requires_grad=True)
    given = replace(FREQS, log_decay=leaf if name == "log_decay" else None)
    at = leaf if name == "positions" else None
    with pytest.raises(ValueError, match=f"rope: {name} must not require grad"):
        apply_rope(q.requires_grad_(), given, positions=at, backend=backend)


def test_frequencies_of_no_heads(backend):
    x = torch.empty(2, 5, 0, 8, device=device())
    given = RopeFreqs(torch.empty(1, 0, 4, device=device()))
    with pytest.raises(ValueError, match=r"inv_freq must be .* got \(1, 0, 4\)"):
        apply_rope(x, given, backend=backend)
    assert apply_rope(x, RopeFreqs(FREQS.inv_freq[:4]), backend=backend).shape == x.shape


def test_a_named_backend_of_another_device():
    other = "cuda" if device() == "cpu" else "cpu"
    runs_on = f"rope: backend '{other}' runs on {other} tensors"
    with pytest.raises(NotImplementedError, match=runs_on):
        apply_rope(make_qk()[0], FREQS, backend=other)


@pytest.mark.skipif(device() != "cpu", reason="a GPU says it in PyTorch's words")
@pytest.mark.parametrize("norm", [{}, NORM], ids=["", "norm"])
def test_out_of_memory_says_how_much_for_what(norm):
    x = torch.zeros(64).expand(2**20, 2**20, 8, 64)
    size = rf"cannot allocate {2**49 * 4} bytes for a result of shape \(1048576, 1048576, 8, 64\)"
    with pytest.raises(RuntimeError, match=f"^rope: {size}$"):
        apply_rope_qk(x, x, FREQS, backend="cpu", **norm)


# -------------------------------------------------------------------------------------------------
# In place


def test_inplace_refuses_what_autograd_needs(backend):
    q, _ = make_qk()
    with pytest.raises(ValueError, match="rope: inplace=True is for inference"):
        apply_rope(q.requires_grad_(), FREQS, inplace=True, backend=backend)
    with torch.no_grad():
        apply_rope(q, FREQS, inplace=True, backend=backend)


QKV = torch.zeros(2, 6, 5, 64, device=device())
OWN = "inplace=True needs q and k of their own"
SHARING = {
    "one tensor": (QKV, QKV, OWN),
    "a view of it": (QKV, QKV[:], OWN),
    "a common head": (QKV[:, :, :3], QKV[:, :, 2:4], OWN),
    "common tokens": (QKV[:, :4], QKV[:, 2:], OWN),
    "dense in part": (*(QKV[0, :, :4].clone().view(1, 6, 4, 64),) * 2, OWN),
    "expanded": (QKV[:, :, :1].expand(2, 6, 3, 64), QKV[:, :, 1:], "q must not be expanded"),
    "shapes": (QKV[:, :, 1:], QKV[:1, :, :1], r"k must be \(batch 2, .* to go with q, got \(1"),
    "slices of a projection": (QKV[:, :, :3], QKV[:, :, 3:], None),
    "tokens": (QKV[:, :3], QKV[:, 3:], None),
    "alternate heads": (QKV[:, :, 0::2], QKV[:, :, 1::2], None),
}


@pytest.mark.parametrize("name", SHARING)
def test_inplace_and_memory_that_is_shared(backend, name):
    q, k, refusal = SHARING[name]
    options = {"inplace": True, "backend": backend, "positions": 1}
    if refusal is None:
        apply_rope_qk(q, k, FREQS, **options)
        return
    QKV.fill_(1.0)
    for which in (backend, "reference"):
        with pytest.raises(ValueError, match=f"rope: {refusal}"):
            apply_rope_qk(q, k, FREQS, **options | {"backend": which})
    assert (QKV == 1).all()


# -------------------------------------------------------------------------------------------------
# The ops themselves


@pytest.mark.parametrize(
    "op",
    (
        "rope_bwd", "rope_bwd_triton", reference.rope_bwd,
        "rope_norm_bwd", "rope_norm_bwd_triton", norm.rope_norm_bwd,
    ),
)  # fmt: skip
def test_raw_bwd_wants_inputs_that_fit(op):
    q, k = make_qk(2, 5, 4, 2)
    op = getattr(torch.ops.extrope, op) if isinstance(op, str) else op
    weights = [torch.ones(64, device=device())] * 2 if "norm" in op.__name__ else []
    for saved in ((q[:, :4], k), (q, k[:, :, :1]), (q, None), (q.half(), k)):
        with pytest.raises((RuntimeError, ValueError), match=r"rope: (q|k) must"):
            op(q, k, *saved, *weights, FREQS.inv_freq)


@pytest.mark.parametrize("saved", (make_qk(2, 5, 4, 2)[1], torch.empty(2, 5, 2, 64, device="meta")))
@pytest.mark.parametrize("suffix", ("", "_triton", "_reference"))
def test_raw_bwd_takes_no_saved_keys_alone(suffix, saved):
    q, k = make_qk(2, 5, 4, 2)
    by_reference = suffix == "_reference"
    op = reference.rope_bwd if by_reference else getattr(torch.ops.extrope, f"rope_bwd{suffix}")
    with pytest.raises((RuntimeError, ValueError), match="rope: k must be given with grad_k and q"):
        op(q, k, None, saved, FREQS.inv_freq)


@pytest.mark.parametrize("name", ["rope_inplace", "rope_norm_inplace"])
def test_raw_inplace_and_autograd(name):
    """It refuses what a graph needs, and what autograd has saved may not be used after it."""
    weights = (torch.ones(64, device=device()), None) if "norm" in name else ()
    op = getattr(torch.ops.extrope, name)
    leaf = torch.randn(1, 5, 3, 64, device=device(), requires_grad=True)
    for x in (leaf, leaf * 1):
        with pytest.raises(RuntimeError, match="rope: inplace=True is for inference"):
            op(x, None, *weights, FREQS.inv_freq)
    saved = torch.randn(1, 5, 3, 64, device=device())
    out = leaf * saved
    op(saved, None, *weights, FREQS.inv_freq)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    with pytest.raises((RuntimeError, ValueError), match="expanded"):
        op(saved[:, :, :1].expand(1, 5, 3, 64), None, *weights, FREQS.inv_freq)


# -------------------------------------------------------------------------------------------------
# The fused step: nothing is written

STEP, (CACHE, OTHER) = Step(), Step().caches(torch.float32)
TEN, PACKED = ints(*range(10)).view(2, 5), Step(tokens=(5,))
APPEND = {
    "no slots": ({"cache_seqlens": None, "positions": TEN[0]}, "cache_seqlens or slot_mapping"),
    "no positions": ({"cache_seqlens": None, "slot_mapping": TEN}, "positions or cache_seqlens"),
    "two places": (
        {"slot_mapping": TEN, "block_table": TEN[:, :2]},
        "block_table and slot_mapping both say",
    ),
    "fractions": (
        {"positions": TEN[0] + 0.5, "score": scores.leaky_rerope(4, 2.0)},
        "positions must be whole numbers",
    ),
    "no boundaries": (
        {name: getattr(PACKED, name) for name in "qkv"} | {"cache_seqlens": 3},
        "packed k needs cu_seqlens or slot_mapping",
    ),
    "page size": (
        {"block_table": TEN[:, :2], "k_cache": CACHE[:, :0], "v_cache": OTHER[:, :0]},
        "k_cache must have a block_size >= 1, got 0",
    ),
    "axes": (
        {"freqs": methods.with_sections(methods.rope(32), [4, 6, 6]).to(device())},
        "freqs must have no axes",
    ),
    "queries of another size": (
        {"freqs": None, "q": STEP.q[..., :8]},
        r"q must be \(batch 2, seqlen 5, heads_q, head_dim 32\) to go with k",
    ),
    "origin": (
        {"freqs": replace(methods.xpos(32).to(device()), decay_origin=math.nan)},
        "decay_origin must be finite, got nan",
    ),
}


@pytest.mark.parametrize("name", APPEND)
def test_append_refuses_what_does_not_go_together(name):
    changes, message = APPEND[name]
    given = {"q": STEP.q, "k": STEP.k, "v": STEP.v, "k_cache": CACHE, "v_cache": OTHER}
    given |= {"freqs": STEP.freqs, **CONTIGUOUS, **changes}
    for which in (None, "reference"):
        with pytest.raises(ValueError, match=f"^rope_append_kvcache: .*{message}"):
            rope_append_kvcache(**given, backend=which)
    assert (CACHE == FILLER).all() and (OTHER == FILLER).all()


@pytest.mark.parametrize("op", ["rope_append", "rope_append_triton"])
@pytest.mark.parametrize("divisor", [-1.0, 0.0, 2**-23, math.nan])
def test_the_raw_append_refuses_positions_that_no_kernel_makes(op, divisor):
    given = (None, STEP.k, STEP.v, CACHE, OTHER, STEP.freqs.inv_freq, CONTIGUOUS["cache_seqlens"])
    with pytest.raises((RuntimeError, ValueError), match=r"^rope_append: .* divisor >= 2\*\*-22"):
        getattr(torch.ops.extrope, op)(*given, map_kinds=[2], map_divisors=[divisor])
    assert (CACHE == FILLER).all() and (OTHER == FILLER).all()


@pytest.mark.skipif(device() == "cuda", reason="values on a GPU are not looked at")
@pytest.mark.parametrize("op", ["rope_append", "rope_append_triton"])
def test_the_raw_append_refuses_positions_past_float64(op):
    given = (None, STEP.k, STEP.v, CACHE, OTHER, STEP.freqs.inv_freq, CONTIGUOUS["cache_seqlens"])
    for far, by in ((2**54, {}), (2**40, {"map_kinds": [2], "map_divisors": [2**-22]})):
        positions = torch.full(STEP.k.shape[:2], far)
        with pytest.raises((RuntimeError, ValueError), match=r"positions must be within 2\*\*53"):
            getattr(torch.ops.extrope, op)(*given, positions=positions, **by)
    for offset in (1e30, -1e30):
        by = {"map_kinds": [2], "map_offsets": [offset]}
        with pytest.raises((RuntimeError, ValueError), match=r"an offset within 2\*\*53"):
            getattr(torch.ops.extrope, op)(*given, **by)
    assert (CACHE == FILLER).all() and (OTHER == FILLER).all()


@pytest.mark.parametrize("op", ["rope_append", "rope_append_triton"])
def test_the_raw_append_writes_to_no_cache_that_requires_grad(op):
    cache = CACHE.clone().requires_grad_()
    given = (None, STEP.k, STEP.v, cache, OTHER, STEP.freqs.inv_freq, CONTIGUOUS["cache_seqlens"])
    with pytest.raises(ValueError, match=f"^{op}: must write to no tensor that requires grad"):
        getattr(torch.ops.extrope, op)(*given)
    assert (cache == FILLER).all() and (OTHER == FILLER).all()


def test_append_has_no_gradient(backend):
    step = Step()
    tensors = [step.q.requires_grad_(), step.k, step.v, *step.caches(torch.float32)]
    with pytest.raises(ValueError, match="rope_append_kvcache: q must not require grad"):
        rope_append_kvcache(*tensors, None, cache_seqlens=3, backend=backend)


def test_append_by_triton_needs_dims_to_pair():
    k, cache = torch.zeros(1, 2, 2, 1, device=device()), torch.zeros(2, 1, 8, 2, 1, device=device())
    with pytest.raises(NotImplementedError, match=r"a head_dim of at least 2, .* got 1 and 1"):
        rope_append_kvcache(k, k, k, *cache, None, cache_seqlens=0, backend="triton")
