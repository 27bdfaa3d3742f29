"""out, lse and gradients of every score method and option: closed forms, the authors' outputs."""

import functools
import math

import pytest
import torch
from attention_oracle import (
    attend,
    check,
    check_both,
    closed_form,
    definition,
    frequencies,
    make_qkv,
)
from score_examples import (
    EXAMPLES,
    PLAIN,
    blockwise_causal,
    dual_chunk,
    example,
    rerope,
    self_extend,
)
from vectors import load

from extrope_kernels import apply_rope_qk, rope_attention, scores
from extrope_kernels.methods import RopeFreqs, xpos
from extrope_kernels.testing import assert_within_budget, device

DATA = load("score")
VECTORS = {v["id"]: v for v in DATA["vectors"]}
INF = math.inf
LOW = (torch.float32, torch.bfloat16, torch.float16)
SINKS = (3.0, -1.5)  # one that takes most of the weight, and one that takes little
of_rerope = functools.partial(example, scores.rerope, rerope)
of_self_extend = functools.partial(example, scores.self_extend, self_extend)
of_chunks = functools.partial(example, scores.dual_chunk, dual_chunk)
of_blocks = functools.partial(example, scores.blockwise_causal, blockwise_causal)


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
    relative, known = definition(made, x, x, options)
    exact, _ = closed_form(x, x, x, relative, freqs, **known)
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
# The closed form: parameters of score methods, shapes, dtypes


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"batch": 2, "seqlen_q": 1},
        {"seqlen_q": 7, "seqlen_k": 41, "heads_q": 6, "heads_k": 3},
        {"seqlen_q": 67, "heads_q": 4, "heads_k": 4, "head_dim": 40, "dtype": torch.float16},
        {"seqlen_q": 130, "heads_q": 3, "head_dim": 64, "dtype": torch.bfloat16},
    ],
    ids=range(5),
)
def test_every_score_method(name, shape, any_backend):
    tensors = make_qkv(**shape)
    head_dim = tensors[0].shape[-1]
    freqs = frequencies(head_dim, rotary_dim=head_dim // 2, attention_factor=1.2)
    check_both(any_backend, EXAMPLES[name], tensors, freqs)


@pytest.mark.parametrize("factor", [1 / 16, 1.0, 4.0, INF])
@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 66, 67, 68])
def test_windows_and_factors(window, factor, any_backend):
    made = of_rerope(window=window, factor=factor)
    check_both(any_backend, made, make_qkv(seqlen_q=67), with_lse=False)


BLOCKS = [
    *(
        of_chunks(chunk_size=c, local_window=w)
        for c, w in ((12, 2), (1, 0), (10, 9), (40, 8), (99, 7))
    ),
    *(of_blocks(block_size=size) for size in (2, 8, 34, 106, 108)),
]


@pytest.mark.parametrize("seqlens", [(1, 1), (61, 61), (1, 50), (7, 50), (9, 4)], ids=str)
@pytest.mark.parametrize("made", BLOCKS, ids=lambda made: f"{made.score.name}-{made.parameters}")
def test_blocks_of_positions(made, seqlens, any_backend):
    """With XPOS, too, where scores keep it within blocks."""
    tensors = make_qkv(1, *seqlens, 4, 2)
    compare = check_both if seqlens == (61, 61) else check
    compare(any_backend, made, tensors, frequencies(32, attention_factor=1.2))
    if made.score.name == "blockwise_causal":
        compare(any_backend, made, tensors, xpos(32).to(device()))


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("head_dim", [8, 40, 64, 72, 96, 128, 256])
def test_head_dims(head_dim, dtype, any_backend):
    tensors = make_qkv(seqlen_q=37, head_dim=head_dim, dtype=dtype)
    check_both(any_backend, of_rerope(window=11, factor=4.0), tensors, with_lse=False)


@pytest.mark.parametrize("heads_q, heads_k", [(1, 1), (3, 1), (4, 2), (9, 3)])
@pytest.mark.parametrize(
    "seqlens", [(1, 1), (2, 2), (53, 53), (1, 40), (39, 40), (5, 40), (40, 7), (3, 1)], ids=str
)
def test_heads_and_lengths(seqlens, heads_q, heads_k, any_backend):
    """Queries are the last of their sequence; with fewer keys the first ones see none."""
    tensors = make_qkv(2, *seqlens, heads_q, heads_k)
    check_both(any_backend, of_rerope(window=7, factor=4.0), tensors, with_lse=False)


@pytest.mark.parametrize(
    "options",
    [
        {"softmax_scale": 0.3},
        {"log_n": 8},
        {"interleaved": True},
        {"interleaved": True, "log_n": 3, "softmax_scale": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("rotary_dim, attention_factor", [(32, 1.0), (16, 1.3), (2, 0.7)])
def test_options(options, rotary_dim, attention_factor, any_backend):
    freqs = frequencies(32, rotary_dim=rotary_dim, attention_factor=attention_factor)
    made = of_rerope(window=6, factor=2.0)
    check_both(any_backend, made, make_qkv(seqlen_q=29), freqs, **options)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_strided_views(dtype, any_backend):
    q, k, v = make_qkv(2, 23, None, 4, 2, 32, dtype)
    k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    padded = torch.full((2, 23, 4, 48), torch.nan, dtype=dtype, device=q.device)
    padded[..., 8:40] = q
    check(any_backend, of_rerope(window=5), (padded[..., 8:40], k, v))


@pytest.mark.parametrize("shape", [(0, 5, 4), (2, 0, 4), (2, 5, 0)], ids=str)
def test_empty(shape, any_backend):
    q = torch.empty(*shape, 32, device=device(), requires_grad=True)
    k, v = (torch.ones(*shape[:2], 2, 32, device=device(), requires_grad=True) for _ in "kv")
    out, lse = attend(of_rerope(window=4), q, k, v, frequencies(32), any_backend)
    assert out.shape == q.shape and lse.shape == (shape[0], shape[2], shape[1])
    for x, grad in zip((q, k, v), torch.autograd.grad(out.sum(), (q, k, v))):
        assert torch.equal(grad, torch.zeros_like(x))


@pytest.mark.parametrize(
    "head_dim, head_dim_v, dtype", [(24, 8, LOW[0]), (40, 64, LOW[2]), (192, 128, LOW[1])]
)
def test_another_head_dim_of_values(head_dim, head_dim_v, dtype, any_backend):
    tensors = make_qkv(2, 35, head_dim=head_dim, dtype=dtype, head_dim_v=head_dim_v)
    check_both(any_backend, EXAMPLES["dual_chunk"], tensors)


@pytest.mark.parametrize(
    "head_dim, rotary_dim, rotary_offset, dtype",
    [(192, 64, 128, LOW[1]), (64, 16, 8, LOW[0]), (64, 22, 42, LOW[2])],
)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_rotated_dims_in_their_place(
    head_dim, rotary_dim, rotary_offset, dtype, interleaved, any_backend
):
    """As in latent attention: 64 of 192 dims from 128 on, and others; of rows with gaps."""
    tensors = make_qkv(2, 35, head_dim=head_dim, dtype=dtype, head_dim_v=head_dim // 2)
    tensors = [torch.nn.functional.pad(x, (8, 8), value=torch.nan)[..., 8:-8] for x in tensors]
    freqs = frequencies(head_dim, rotary_dim=rotary_dim, attention_factor=1.2)
    by = {"rotary_offset": rotary_offset, "interleaved": interleaved}
    check_both(any_backend, of_rerope(window=11, factor=4.0), tensors, freqs, **by)


@pytest.mark.parametrize("head_dim", [264, 512])
def test_wide_heads(head_dim, any_backend):
    if any_backend == "triton":
        pytest.skip("its kernels take a head_dim up to 256")
    check_both(any_backend, EXAMPLES["rerope"], make_qkv(1, 19, head_dim=head_dim))


# -------------------------------------------------------------------------------------------------
# What it reduces to, and which position every pair sees


def test_what_is_plain_attention_to_the_bit(any_backend):
    tensors = (*make_qkv(seqlen_q=41, heads_q=4, heads_k=2), frequencies(32))
    plain, lse = attend(PLAIN, *tensors, any_backend)
    check(any_backend, PLAIN, tensors[:3])
    for made in (
        *(scores.rerope(window, factor=1.0) for window in (1, 7, 40)),
        *(scores.rerope(window, factor) for window in (41, 10**9) for factor in (1 / 16, INF)),
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
    "dtype", [LOW[0], *(pytest.param(x, marks=pytest.mark.thorough) for x in LOW[1:])], ids=str
)
@pytest.mark.parametrize("factor", [INF, 16.0])
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
# What models add: sinks, caps, windows, temperatures, starts


def query_scale(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return (0.5 + torch.rand(shape, generator=generator)).to(device())


def switched(switch: str, batch: int, seqlen_q: int) -> dict:
    """Options by the name of what they switch on."""
    sinks = torch.tensor(SINKS, device=device())
    return {
        "sinks": {"sinks": sinks},
        "softcap": {"softcap": 1.5},
        "sliding_window": {"sliding_window": 13},
        "window of one": {"sliding_window": 1},
        "query_scale": {"query_scale": query_scale(seqlen_q)},
        "query_scale of each": {"query_scale": query_scale(batch, seqlen_q)},
        "all": {
            "sinks": sinks, "softcap": 2.0, "sliding_window": 29, "log_n": 16,
            "query_scale": query_scale(batch, seqlen_q), "softmax_scale": 0.3,
        },
    }[switch]  # fmt: skip


SWITCHES = ("sinks", "softcap", "sliding_window", "window of one", "query_scale",
            "query_scale of each", "all")  # fmt: skip


@pytest.mark.parametrize("switch", ["sliding_window", "all"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_every_score_method_with(name, switch, any_backend):
    check_both(any_backend, EXAMPLES[name], make_qkv(2, 67), **switched(switch, 2, 67))


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("switch", SWITCHES)
def test_dtypes(switch, dtype, any_backend):
    tensors = make_qkv(2, 41, 53, head_dim=64, dtype=dtype)
    check_both(any_backend, EXAMPLES["leaky_rerope"], tensors, **switched(switch, 2, 41))


STARTS = {
    "behind": {"q_start": 40, "k_start": 0},  # keys end before the queries begin
    "beside": {"q_start": 7, "k_start": 7},
    "before": {"q_start": 3, "k_start": 30},  # no query sees a key
    "across": {"q_start": 11, "k_start": 5},
    "keys alone": {"k_start": 6},
}


@pytest.mark.parametrize("starts", STARTS)
@pytest.mark.parametrize("name", ["self_extend", "dual_chunk"])
def test_starts(name, starts, any_backend):
    check_both(any_backend, EXAMPLES[name], make_qkv(2, 23, 29), **STARTS[starts], log_n=16)


@pytest.mark.parametrize("name", ["leaky_rerope", "blockwise_causal"])
def test_starts_of_each_sequence(name, any_backend):
    """As one sequence after the other; what starts hold counts, not where it lies."""
    tensors, freqs = make_qkv(2, 23), frequencies(32)
    starts = torch.tensor((9, 31, 9, 20), dtype=torch.int32, device=device())
    both = attend(
        EXAMPLES[name], *tensors, freqs, any_backend, q_start=starts[:2], k_start=starts[2:]
    )
    for b in range(2):
        own = {"q_start": int(starts[b]), "k_start": int(starts[b + 2])}
        one = attend(EXAMPLES[name], *(x[b : b + 1] for x in tensors), freqs, any_backend, **own)
        for x, y in zip(both, one):
            assert torch.equal(x[b : b + 1], y)


def test_frequencies_of_each_batch_row(any_backend):
    q, k, v = make_qkv(2, 20, None, 2, 1)
    inv_freq = frequencies(32).inv_freq * torch.tensor([[1.0], [0.5]], device=q.device)
    out, _ = attend(EXAMPLES["rerope"], q, k, v, RopeFreqs(inv_freq), any_backend)
    for row in range(2):
        part = [x[row : row + 1] for x in (q, k, v)]
        one, _ = attend(EXAMPLES["rerope"], *part, RopeFreqs(inv_freq[row]), any_backend)
        assert torch.equal(out[row : row + 1], one)


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


@pytest.mark.parametrize("dtype", LOW, ids=str)
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
    assert all(torch.equal(x, y) for x, y in zip(found, want))


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
    # 6e-7 is the approximation's; the rest are roundings on the way to base 2 and back.
    allowed = (6e-7 + 4 * torch.finfo(torch.float32).eps) * exact.abs()
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
