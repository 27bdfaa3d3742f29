"""out, lse and gradients of every score method and option: closed forms, the authors' outputs."""

import functools
import math
from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from support.attention_oracle import (
    attend,
    by_formula,
    check,
    check_both,
    closed_form,
    frequencies,
    make_qkv,
)
from support.score_examples import (
    EXAMPLES,
    PLAIN,
    blockwise_causal,
    dual_chunk,
    example,
    rerope,
    self_extend,
    string,
)
from support.vectors import load

from extrope_kernels import apply_rope_qk, rope_attention, scores
from extrope_kernels.methods import RopeFreqs, xpos
from extrope_kernels.testing import assert_within_budget, device

DATA = load("score")
VECTORS = {v["id"]: v for v in DATA["vectors"]}
INF = math.inf
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SINKS = (3.0, -1.5)  # one that takes most of the weight, and one that takes little


of_rerope = functools.partial(example, scores.leaky_rerope, rerope, factor=math.inf)
of_self_extend = functools.partial(example, scores.self_extend, self_extend)
of_chunks = functools.partial(example, scores.dual_chunk, dual_chunk)
of_blocks = functools.partial(example, scores.blockwise_causal, blockwise_causal)
of_string = functools.partial(example, scores.string, string)


# -------------------------------------------------------------------------------------------------
# The authors' outputs


def authors(vector: dict):
    """Their score method, the options of the call, and how many tokens."""
    params = vector["params"]
    if vector["method"] == "dual_chunk":
        sizes = {name: params[name] for name in ("chunk_size", "local_window")}
        return of_chunks(**sizes), {}, params["n"]
    if "group" in params:
        if params["window"] % params["group"]:
            pytest.skip("the window is not a multiple of the group")
        made = of_self_extend(window=params["window"], factor=params["group"])
    else:
        made = of_rerope(window=params["window"], factor=float(params["k"] or INF))
    log_n = params.get("training_length")
    return made, {} if log_n is None else {"log_n": log_n}, params["T"]


@pytest.mark.parametrize("name", VECTORS)
def test_the_authors_output(name, any_backend):
    vector = VECTORS[name]
    made, options, tokens = authors(vector)
    freqs = frequencies(vector["params"]["head_dim"])
    x = torch.tensor(vector["x"], device=device()).view(1, tokens, 1, -1)
    check(any_backend, made, (x, x, x), freqs, **options)
    exact, _ = by_formula(closed_form, made, (x, x, x), freqs, options)
    original = torch.tensor(vector["out"], device=device()).view_as(x)
    assert (original - exact).abs().max() < 5e-7


@pytest.mark.parametrize("name", VECTORS)
def test_the_oracle_sees_the_authors_positions(name):
    made, _, tokens = authors(VECTORS[name])
    want = [[math.nan if p is None else p for p in row] for row in VECTORS[name]["positions"]]
    seen = made.relative(tokens, tokens).seen
    torch.testing.assert_close(seen, torch.tensor(want).double(), rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("factor, label", [(INF, "rerope"), (16.0, "leaky_k16"), (8.0, "leaky_k8")])
@pytest.mark.parametrize("distance", DATA["rows"]["samples"])
def test_published_positions(distance, factor, label):
    row = DATA["rows"]["params"]
    seen = rerope(1, row["i"] + 1, row["window"], factor).seen[0]
    assert seen[row["i"] - int(distance)].item() == DATA["rows"]["samples"][distance][label]


# bca_visibility_T12_block4 of the authors of LEX: may query i (a row) see key j?
VISIBLE = """100000000000 110000000000 111000000000 111100000000 001110000000 001111000000
             000011100000 000011110000 000000111000 000000111100 000000001110 000000001111"""


def test_the_authors_visibility(any_backend):
    rows = VISIBLE.split()
    zeros, v = torch.zeros(1, 12, 1, 16), torch.eye(12, 16)[None, :, None]
    tensors = [x.to(device()) for x in (zeros, zeros, v)]
    out, _ = attend(of_blocks(block_size=4), *tensors, frequencies(16), any_backend)
    want = torch.tensor([[int(bit) for bit in row] for row in rows], device=device())
    assert torch.equal((out[0, :, 0, :12] > 0).int(), want.int())


# -------------------------------------------------------------------------------------------------
# Outputs and gradients against the closed form: every score method in calls of every kind


def query_scale(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return (0.5 + torch.rand(shape, generator=generator)).to(device())


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device())


def packed(*lengths: int, **sizes) -> dict:
    return {
        "batch": 1,
        "seqlen_q": sum(lengths),
        "cu_seqlens": ints(0, *accumulate(lengths)),
        **sizes,
    }


def everything(*rows: int) -> dict:
    """All that models add; rows: of q."""
    return {"sinks": torch.tensor(SINKS, device=device()), "softcap": 2.0, "sliding_window": 29,
            "query_scale": query_scale(*rows), "log_n": 16, "softmax_scale": 0.3}  # fmt: skip


SIZES = ("batch", "seqlen_q", "seqlen_k", "heads_q", "heads_k", "head_dim", "head_dim_v", "dtype")
FREQS = ("rotary_dim", "attention_factor", "rows")
# Sizes, frequencies and options of a call; rows: a factor of the frequencies of each sequence.
KINDS = {
    "a sequence": {"rotary_dim": 16, "attention_factor": 1.2},
    "one query": {"batch": 3, "seqlen_q": 1, "seqlen_k": 33, "heads_q": 8, "heads_k": 2},
    "the last queries": {"seqlen_q": 7, "seqlen_k": 41, "heads_q": 6, "heads_k": 3},
    "in float16": {"seqlen_q": 67, "heads_q": 4, "heads_k": 4, "head_dim": 40, "dtype": F16},
    "in bfloat16": {"seqlen_q": 130, "heads_q": 3, "head_dim": 64, "dtype": BF16,
                    "rotary_dim": 32, "attention_factor": 1.2},
    "everything": {"batch": 2, "seqlen_q": 67, **everything(2, 67)},
    "a window": {"batch": 2, "seqlen_q": 67, "sliding_window": 13},
    "packed": packed(5, 0, 17, 1, 33, heads_q=4, heads_k=2),
    "packed, with everything": packed(17, 0, 1, 30, **everything(48), rows=(0.5, 1, 1.2, 1.5),
                                      q_start=ints(0, 7, 9, 5), k_start=ints(0, 4, 9, 2)),
    "a block": {"batch": 2, "seqlen_q": 23, "seqlen_k": 29, "q_start": 11, "k_start": 5,
                "log_n": 16},
}  # fmt: skip
HEADS = {"heads_q": 1}, {"heads_q": 3}, {"heads_q": 4, "heads_k": 2}, {"heads_q": 9, "heads_k": 3}
FAR = of_rerope(window=7, factor=4.0)
# Of these only some sequences are long enough for the score's older regions; the first holds more
# keys than kernels read beside those that are seen.
ROTATED = {"rotary_dim": 6, "rotary_offset": 8}
UNEVEN = (
    of_chunks(chunk_size=80, local_window=30), of_blocks(block_size=150),
    of_string(shift=90, window=8), of_rerope(window=80, factor=4.0),
    of_self_extend(window=80, factor=4),
)  # fmt: skip
CASES = {
    **{f"window {w}, factor {f}": {"example": of_rerope(window=w, factor=f), "seqlen_q": 67}
       for w, f in ((1, 1 / 16), (2, 4.0), (15, INF), (16, 1 / 16), (17, 1.0), (66, 4.0), (67, INF),
                    (68, 4.0))},
    **{f"{n} dims": {"seqlen_q": 37, "head_dim": n, "dtype": dtype}
       for n, dtype in ((8, F32), (40, BF16), (64, F16), (72, F32), (96, BF16), (128, F16),
                        (256, F32))},
    **{f"{q} queries of {k} tokens": {"batch": 2, "seqlen_q": q, "seqlen_k": k, **heads}
       for (q, k), heads in zip(((1, 1), (2, 2), (53, 53), (1, 40), (39, 40), (5, 40), (40, 7),
                                 (3, 1)), 2 * HEADS)},
    "interleaved": {"interleaved": True, "log_n": 3, "softmax_scale": 0.1, "rotary_dim": 2,
                    "attention_factor": 0.7},
    "a scale": {"softmax_scale": 0.3, "rotary_dim": 16, "attention_factor": 1.3, "dtype": BF16},
    "values of 8 dims": {"batch": 2, "head_dim": 24, "head_dim_v": 8},
    "values of 64 dims": {"batch": 2, "head_dim": 40, "head_dim_v": 64, "dtype": F16},
    "latent attention": {"seqlen_q": 35, "head_dim": 192, "head_dim_v": 128, "rotary_dim": 64,
                         "rotary_offset": 128, "dtype": BF16, "interleaved": True},
    "dims 8 to 24": {"head_dim": 64, "rotary_dim": 16, "rotary_offset": 8, "interleaved": True},
    "dims 42 to 64": {"head_dim": 64, "rotary_dim": 22, "rotary_offset": 42, "dtype": F16},
    "wide heads": {"seqlen_q": 19, "head_dim": 264},
    "the widest heads": {"seqlen_q": 19, "head_dim": 512},
    "sinks": {"sinks": torch.tensor(SINKS, device=device()), "seqlen_k": 53, "dtype": BF16},
    "a cap": {"softcap": 1.5, "seqlen_k": 53, "dtype": F16},
    "a window of one": {"sliding_window": 1, "seqlen_k": 53, "dtype": BF16},
    "temperatures": {"query_scale": query_scale(33), "dtype": F16},
    "temperatures of each": {"batch": 2, "query_scale": query_scale(2, 33), "dtype": BF16},
    "everything in bfloat16": {"batch": 2, "seqlen_q": 41, "seqlen_k": 53, "dtype": BF16,
                               **everything(2, 41)},
    "everything in float16": {"batch": 2, "seqlen_q": 41, "seqlen_k": 53, "dtype": F16,
                              **everything(2, 41)},
    "keys before": {"seqlen_q": 23, "q_start": 40, "k_start": 0},
    "keys beside": {"seqlen_q": 23, "q_start": 7, "k_start": 7},
    "keys behind": {"seqlen_q": 23, "q_start": 3, "k_start": 30, "log_n": 16},
    "keys from 6 on": {"seqlen_q": 23, "k_start": 6},
    "starts of each sequence": {"batch": 2, "q_start": ints(9, 31), "k_start": ints(9, 20),
                                "example": of_blocks(block_size=10)},
    "a batch of pieces": {"batch": 2, "seqlen_q": 100, "seqlen_k": 600, "head_dim": 16,
                          "example": of_blocks(block_size=256), "q_start": ints(0, 500),
                          "k_start": 0},
    "frequencies of each sequence": {"batch": 2, "rows": (1.0, 0.5)},
    "a token behind an empty sequence": packed(0, 1, rows=(1.0, 0.5), q_start=ints(3, 40),
                                               k_start=ints(3, 37)),
    "empty sequences": packed(0, 0, 3),
    "packed in 16 bits": packed(64, 65, dtype=BF16, example=EXAMPLES["dual_chunk"]),
    **{f"uneven sequences of {made.score}":
       packed(70, 0, 200, **ROTATED, head_dim=16, example=made, attention_factor=factor)
       for made, factor in zip(UNEVEN, (1.0, 1.2, 1.0, 1.2, 1.2))},
}  # fmt: skip


def call_of(case: dict) -> tuple:
    """Tensors, frequencies and options."""
    case = dict(case)
    tensors = make_qkv(**{name: case.pop(name) for name in SIZES if name in case})
    if "cu_seqlens" in case:
        tensors = [x[0] for x in tensors]
    given = {name: case.pop(name) for name in FREQS if name in case}
    rows = given.pop("rows", None)
    freqs = frequencies(tensors[0].shape[-1], **given)
    if rows is not None:
        rows = torch.tensor(rows, device=device())[:, None]
        freqs = replace(freqs, inv_freq=freqs.inv_freq * rows)
    return tensors, freqs, case


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_score_method(kind, name, any_backend):
    tensors, freqs, options = call_of(KINDS[kind])
    check_both(any_backend, EXAMPLES[name], tensors, freqs, **options)


@pytest.mark.parametrize("name", CASES)
def test_shapes_and_options(name, any_backend):
    if any_backend == "triton" and "wide" in name:
        pytest.skip("its kernels take a head_dim up to 256")
    tensors, freqs, options = call_of(CASES[name])
    made = options.pop("example", FAR)
    check_both(any_backend, made, tensors, freqs, **options)


BLOCKS = [
    *(
        of_chunks(chunk_size=c, local_window=w)
        for c, w in ((12, 2), (1, 0), (10, 9), (40, 8), (99, 7))
    ),
    *(of_blocks(block_size=size) for size in (2, 8, 34, 106, 108)),
]


@pytest.mark.parametrize("made", BLOCKS, ids=lambda made: f"{made.score}")
def test_blocks_of_positions(made, any_backend):
    """With XPOS, too, where scores keep it within blocks."""
    freqs = frequencies(32, attention_factor=1.2)
    for seqlens in ((1, 50), (7, 50), (9, 4)):
        check(any_backend, made, make_qkv(1, *seqlens, 4, 2), freqs)
    check_both(any_backend, made, make_qkv(1, 61, 61, 4, 2), freqs)
    if made.score.name == "blockwise_causal":
        check_both(any_backend, made, make_qkv(1, 61, 61, 4, 2), xpos(32).to(device()))


@pytest.mark.parametrize("dtype", (F32, BF16, F16), ids=str)
def test_strided_views(dtype, any_backend):
    q, k, v = make_qkv(2, 23, None, 4, 2, 32, dtype)
    k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    q = torch.nn.functional.pad(q, (8, 8), value=torch.nan)[..., 8:40]
    check(any_backend, of_rerope(window=5), (q, k, v))
    given = of_rerope(window=5), [x.requires_grad_() for x in (q.detach(), k, v)], frequencies(32)
    out, _ = attend(given[0], *given[1], given[2], any_backend)
    summed = torch.autograd.grad(out.sum(), given[1], retain_graph=True)  # strides all zero
    dense = torch.autograd.grad(out, given[1], torch.ones_like(out))
    assert all(torch.equal(a, b) for a, b in zip(summed, dense))


@pytest.mark.parametrize("shape", [(0, 5, 4), (2, 0, 4), (2, 5, 0)], ids=str)
def test_empty(shape, any_backend):
    q = torch.empty(*shape, 32, device=device(), requires_grad=True)
    k, v = (torch.ones(*shape[:2], 2, 32, device=device(), requires_grad=True) for _ in "kv")
    out, lse = attend(of_rerope(window=4), q, k, v, frequencies(32), any_backend)
    assert out.shape == q.shape and lse.shape == (shape[0], shape[2], shape[1])
    for x, grad in zip((q, k, v), torch.autograd.grad(out.sum(), (q, k, v))):
        assert torch.equal(grad, torch.zeros_like(x))


# -------------------------------------------------------------------------------------------------
# What it reduces to, and which position every pair sees


def test_what_is_plain_attention_to_the_bit(any_backend):
    tensors = (*make_qkv(seqlen_q=41, heads_q=4, heads_k=2), frequencies(32))
    plain, lse = attend(PLAIN, *tensors, any_backend)
    check(any_backend, PLAIN, tensors[:3])
    for made in (
        *(scores.leaky_rerope(window, factor=1.0) for window in (1, 7, 40)),
        *(
            scores.leaky_rerope(window, factor)
            for window in (41, 10**9)
            for factor in (1 / 16, INF)
        ),
        scores.self_extend(7, 1),
        scores.dual_chunk(999, 0),
        scores.dual_chunk(45, 4),
        scores.blockwise_causal(82),
        scores.string(41, 3),
    ):
        found = rope_attention(*tensors, made, return_lse=True, backend=any_backend)
        assert torch.equal(found[0], plain) and torch.equal(found[1], lse), made


def test_plain_attention_is_pytorchs(any_backend):
    q, k, v = make_qkv(seqlen_q=41, heads_q=4, heads_k=2)
    freqs = frequencies(32)

    def sdpa(*tensors):
        rotated = [x.transpose(1, 2) for x in (*apply_rope_qk(*tensors[:2], freqs), tensors[2])]
        run = torch.nn.functional.scaled_dot_product_attention
        return run(*rotated, is_causal=True, enable_gqa=True).transpose(1, 2)

    out = rope_attention(q, k, v, freqs, backend=any_backend)
    assert_within_budget("out", out, sdpa(q, k, v), sdpa(q.double(), k.double(), v.double()))


PROBED = [of_rerope(window=w, factor=f) for w in (1, 5, 16, 17, 31) for f in (INF, 4.0, 0.25)]
PROBED += [of_self_extend(window=2 * w, factor=2) for w in (1, 5, 16)] + [*EXAMPLES.values()]


@pytest.mark.parametrize("made", PROBED, ids=lambda x: f"{x.score.name}-{x.parameters}")
def test_position_probe(made, any_backend):
    """One pair of dims, k at a right angle to q, so that a logit is the sine of its angle.

    v is one-hot: the output is the weights, so their logarithms give every relative position.
    """
    n, theta, gain = 32, 5e-3, 20.0
    q, k = torch.zeros(2, 1, n, 1, n, device=device()).unbind()
    q[..., 1] = gain
    k[..., 0] = 1.0
    v = torch.eye(n, device=device())[None, :, None]
    freqs = RopeFreqs(torch.tensor([theta], device=device()))
    options = {"interleaved": True, "softmax_scale": 1.0}
    out, lse = attend(made, q, k, v, freqs, any_backend, **options)
    logits = out[0, :, 0].double().log() + lse[0, 0].double()[:, None]
    seen = torch.arcsin(-logits / gain) / theta
    want = made.relative(n, n).seen.to(seen.device)
    visible = ~want.isnan()
    assert torch.equal(out[0, :, 0] > 0, visible)
    assert (seen - want)[visible].abs().max() < 0.01


@pytest.mark.parametrize(
    "dtype", [F32, *(pytest.param(x, marks=pytest.mark.thorough) for x in (BF16, F16))], ids=str
)
@pytest.mark.parametrize("factor", [16.0, pytest.param(INF, marks=pytest.mark.thorough)])
def test_positions_around_a_million(dtype, factor, fast_backend):
    """Two queries at the end of 1,000,003 keys; those near them have large logits, others none."""
    if fast_backend == "triton" and device() == "cpu":
        pytest.skip("60,000 interpreted tiles; the rotation has its own test at such positions")
    total, near = 1_000_003, 40
    q, k, v = make_qkv(1, 2, total, 1, 1, 8, dtype)
    k[:, :-near] = 0
    made = of_rerope(window=near, factor=factor)
    check(fast_backend, made, (q, k, v), frequencies(8), softmax_scale=6.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_finite_where_released_xpos_overflows(dtype, any_backend):
    """Amplitudes of absolute positions overflow fp32 after 512 * log(2**128) / log(3.5) tokens."""
    q, k, v = make_qkv(1, 300, None, 1, 1, 8, dtype)
    freqs, made = xpos(8, scale_base=1).to(device()), of_blocks(block_size=8)
    out, _ = attend(made, q, k, v, freqs, any_backend)
    exact, _ = closed_form(q, k, v, made.relative(300, 300), freqs)
    assert (out - exact).abs().max() < 8 * torch.finfo(dtype).eps * exact.abs().max()


# -------------------------------------------------------------------------------------------------
# Sinks, caps and temperatures at their ends, and what is not finite


def test_a_row_without_keys_has_its_sink_alone(any_backend):
    """out 0 and the sink as lse; no gradient reaches q, k and v, and dsinks is that of lse."""
    q, k, v = (x.requires_grad_() for x in make_qkv(1, 5, 5))
    sinks = torch.tensor(SINKS, device=device(), requires_grad=True)
    options = {"sinks": sinks, "q_start": 0, "k_start": 9}
    out, lse = attend(EXAMPLES["rerope"], q, k, v, frequencies(32), any_backend, **options)
    assert not out.any()
    assert torch.equal(lse, sinks[:, None].expand(2, 5)[None])
    grads = torch.autograd.grad(out.sum() + lse.sum(), (q, k, v, sinks))
    assert not any(x.any() for x in grads[:3])
    torch.testing.assert_close(grads[3], torch.full((2,), 5.0, device=device()))


@pytest.mark.parametrize("dtype", (F32, BF16, F16), ids=str)
def test_scales_of_any_sign(dtype, any_backend):
    """Keys that a row does not see stay hidden where its logits change their sign, or are all 0."""
    scale = (torch.arange(67, device=device()) - 33) / 20
    check(any_backend, EXAMPLES["rerope"], make_qkv(1, 67, dtype=dtype), query_scale=scale)


def test_secondary_tensors_with_the_negative_bit(any_backend):
    """A view that torch negates lazily has the values that it shows."""

    def negated(x):
        return torch.complex(torch.zeros_like(x), -x).conj().imag

    sinks, scale = torch.tensor(SINKS, device=device()), query_scale(9)
    tensors = (*make_qkv(1, 9), frequencies(32))
    views = {"sinks": negated(sinks), "query_scale": negated(scale)}
    assert all(x.is_neg() for x in views.values())
    found = attend(EXAMPLES["rerope"], *tensors, any_backend, **views)
    want = attend(EXAMPLES["rerope"], *tensors, any_backend, sinks=sinks, query_scale=scale)
    # Torch takes the reference's logaddexp of such views by other instructions.
    allowed = 2 * torch.finfo(torch.float32).eps if any_backend == "reference" else 0
    torch.testing.assert_close(found, want, rtol=allowed, atol=allowed)


@pytest.mark.parametrize("mixed", (False, True))
def test_a_cap_is_as_exact_near_0_as_elsewhere(mixed, any_backend):
    """A row with one key has its logit for lse: tanh from 1e-6 to where it has long been 1."""
    if any_backend == "triton" and device() == "cpu":
        pytest.skip("interpreted for minutes; test_triton_softmax.py asks its tanh itself")
    x = torch.logspace(-6, 1.5, 32 * 64)
    x = x[torch.randperm(len(x))] if mixed else x
    x = (x * torch.tensor((1.0, -1.0)).repeat(len(x) // 2)).view(32, 1, 64)
    q, k = torch.zeros(32, 1, 64, 8), torch.zeros(32, 1, 1, 8)
    q[..., 0], k[..., 0] = x, 1.0
    q, k = q.to(device()), k.to(device())
    options = {"softmax_scale": 1.0, "softcap": 1.0}
    _, lse = attend(EXAMPLES["rerope"], q, k, k, frequencies(8), any_backend, **options)
    exact = x.double().tanh().transpose(1, 2)
    approximation = 1.2e-7 if any_backend == "cpu" else 6e-7
    # The rest are roundings on the way to base 2 and back.
    allowed = (approximation + 4 * torch.finfo(torch.float32).eps) * exact.abs()
    assert ((lse.cpu() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("value", [math.nan, INF, -INF])
def test_a_sink_that_is_not_finite(value, any_backend):
    """As the formula has it: -inf is no sink, NaN and infinity take the row with them."""
    tensors = (*make_qkv(1, 9), frequencies(32), any_backend)
    sinks = torch.tensor([value, 0.5], device=device())
    out, lse = attend(EXAMPLES["rerope"], *tensors, sinks=sinks)
    if value == -INF:
        plain, plain_lse = attend(EXAMPLES["rerope"], *tensors)
        torch.testing.assert_close(out[:, :, 0], plain[:, :, 0])
        torch.testing.assert_close(lse[:, 0], plain_lse[:, 0])
    else:
        want = torch.full_like(lse[:, 0], value)
        torch.testing.assert_close(lse[:, 0], want, equal_nan=True)
    assert out[:, :, 1].isfinite().all()


@pytest.mark.parametrize("bits", [0x7FC00001, 0x7FFFFFFF, -1], ids=hex)
def test_nan_stays_nan_whatever_its_bits(bits, any_backend):
    """One in a key: the rows that see it are NaN, and no others."""
    q, k, v = make_qkv(1, 9)
    k[0, 4, 0, 3] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    out, lse = attend(EXAMPLES["rerope"], q, k, v, frequencies(32), any_backend)
    assert out[:, 4:].isnan().all() and lse[..., 4:].isnan().all()
    assert out[:, :4].isfinite().all() and lse[..., :4].isfinite().all()


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_nan_stays_in_its_sequence(name):
    """In the reference; in kernels, where values share a tile, it may not."""
    tensors = dict(zip("qkv", (x[0] for x in make_qkv(1, 30, None, 2, 1))))
    tensors[name][4] = torch.nan
    tensors = [x.requires_grad_() for x in tensors.values()]
    options = {"cu_seqlens": ints(0, 10, 30)}
    out, _ = attend(EXAMPLES["rerope"], *tensors, frequencies(32), "reference", **options)
    assert out[:10].isnan().any() and out[10:].isfinite().all()
    for grad in torch.autograd.grad(out.sum(), tensors):
        assert grad[10:].isfinite().all()
