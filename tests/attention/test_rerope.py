"""ReRoPE, Leaky and InvLeaky ReRoPE, SelfExtend: against closed forms and the authors' outputs."""

import math

import pytest
import torch
from attention_oracle import both_orders, check_outputs, closed_form, frequencies, make_qkv
from score_examples import rerope
from vectors import load

from extrope_kernels import apply_rope_qk, rerope_attention
from extrope_kernels.methods import RopeFreqs
from extrope_kernels.testing import assert_within_budget, device

DATA = load("score")
VECTORS = {v["id"]: v for v in DATA["vectors"] if v["method"] != "dual_chunk"}
INF = math.inf
LOW = (torch.float32, torch.bfloat16, torch.float16)


def call(q, k, v, freqs, backend, *, window, factor=INF, grouped=False, **options):
    return rerope_attention(
        q, k, v, freqs, window=window, factor=factor, grouped=grouped, backend=backend, **options
    )


def check(backend, q, k, v, freqs, window, factor=INF, grouped=False, **options):
    """Compare out and lse with the closed form, within the error budget."""
    relative = rerope(q.shape[1], k.shape[1], window, factor, grouped)
    known = {"scale": options.get("softmax_scale"), "log_n": options.get("log_n")}
    known["interleaved"] = options.get("interleaved", False)
    wanted = closed_form(q, k, v, relative, freqs, **known)
    plain = both_orders(q, k, v, relative, freqs, wanted, **known)
    found = call(
        q, k, v, freqs, backend, window=window, factor=factor, grouped=grouped,
        return_lse=True, **options,
    )  # fmt: skip
    check_outputs(backend, q, found, plain, wanted)


# -------------------------------------------------------------------------------------------------
# The authors' outputs


@pytest.mark.parametrize("name", VECTORS)
def test_the_authors_output(name, any_backend):
    vector = VECTORS[name]
    params = vector["params"]
    x = torch.tensor(vector["x"], device=device()).view(1, params["T"], 1, params["head_dim"])
    grouped = "group" in params
    factor = params["group"] if grouped else params["k"] or INF
    options = {"window": params["window"], "factor": float(factor)}
    if grouped and params["window"] % params["group"]:
        pytest.skip("the window is not a multiple of the group")
    if "training_length" in params:
        options["log_n"] = params["training_length"]
    freqs = frequencies(params["head_dim"])
    check(any_backend, x, x, x, freqs, grouped=grouped, **options)
    known = {"log_n": options.pop("log_n", None)}
    exact, _ = closed_form(
        x, x, x, rerope(params["T"], params["T"], **options, grouped=grouped), freqs, **known
    )
    original = torch.tensor(vector["out"], device=device()).view_as(x)
    assert (original - exact).abs().max() < 5e-7


@pytest.mark.parametrize("name", VECTORS)
def test_the_oracle_sees_the_authors_positions(name):
    vector = VECTORS[name]
    params = vector["params"]
    grouped = "group" in params
    factor = float(params["group"] if grouped else params["k"] or INF)
    relative = rerope(params["T"], params["T"], params["window"], factor, grouped)
    want = torch.tensor(
        [[math.nan if p is None else p for p in row] for row in vector["positions"]],
        dtype=torch.float64,
    )
    assert torch.equal(relative.seen.isnan(), want.isnan())
    assert torch.allclose(relative.seen.nan_to_num(), want.nan_to_num(), atol=0, rtol=1e-6)


@pytest.mark.parametrize("factor, label", [(INF, "rerope"), (16.0, "leaky_k16"), (8.0, "leaky_k8")])
@pytest.mark.parametrize("distance", DATA["rows"]["samples"])
def test_published_positions(distance, factor, label):
    row = DATA["rows"]["params"]
    seen = rerope(row["i"] + 1, row["i"] + 1, row["window"], factor).seen[row["i"]]
    want = DATA["rows"]["samples"][distance][label]
    assert seen[row["i"] - int(distance)].item() == want


# -------------------------------------------------------------------------------------------------
# The closed form


@pytest.mark.parametrize("factor", [1 / 16, 1.0, 4.0, 16.0, INF])
@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 66, 67, 68])
def test_windows_and_factors(window, factor, any_backend):
    q, k, v = make_qkv(seqlen_q=67, heads_q=2)
    check(any_backend, q, k, v, frequencies(32), window, factor)


@pytest.mark.skipif(
    device() != "cpu", reason="about the CPU's tiles: 384 rows and heads x 192 keys"
)
@pytest.mark.parametrize("window", [127, 128, 191, 192, 193, 383, 384, 385])
def test_windows_around_the_tiles_of_the_cpu(window):
    q, k, v = make_qkv(seqlen_q=389, heads_q=2, head_dim=16)
    check("cpu", q, k, v, frequencies(16), window)


@pytest.mark.skipif(device() != "cpu", reason="about the CPU's blocks of 4, 8 or 32 keys")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads_q", [1, 4])
@pytest.mark.parametrize("window", [1, 7, 8, 9, 31, 32, 33, 47, 48, 49, 63, 64, 65, 161])
def test_windows_around_the_blocks_of_the_cpu(window, heads_q, dtype):
    """Where some rows of a block of keys are near and others far, or on neither side."""
    q, k, v = make_qkv(1, 131, 165, heads_q, 1, 16, dtype)
    check("cpu", q, k, v, frequencies(16), window)


@pytest.mark.skipif(device() != "cpu", reason="about the CPU's blocks of 4, 8 or 32 keys")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_key_counts_once_for_any_window(dtype):
    """Logits of 0, and values that name their key."""
    n = 96
    q, k, _ = make_qkv(1, n, None, 2, 1, n, dtype)
    seen = torch.ones(n, n).tril()
    for window in range(1, n + 1):
        out, lse = call(0 * q, k, torch.eye(n).to(dtype)[None, :, None], frequencies(n), "cpu",
                        window=window, return_lse=True)  # fmt: skip
        assert torch.allclose(lse.exp(), seen.sum(1).expand_as(lse), rtol=1e-5), window
        want = seen / seen.sum(1, keepdim=True)
        assert torch.allclose(out[0].float(), want[:, None].expand(n, 2, n), rtol=2.0**-7), window


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("head_dim", [8, 32, 40, 64, 72, 96, 128, 256])
def test_head_dims(head_dim, dtype, any_backend):
    q, k, v = make_qkv(seqlen_q=37, head_dim=head_dim, dtype=dtype)
    check(any_backend, q, k, v, frequencies(head_dim), 11, 4.0)


@pytest.mark.parametrize("heads_q, heads_k", [(1, 1), (3, 1), (4, 2), (6, 6), (9, 3)])
@pytest.mark.parametrize("seqlen", [1, 2, 31, 53])
def test_heads_and_lengths(seqlen, heads_q, heads_k, any_backend):
    q, k, v = make_qkv(2, seqlen, None, heads_q, heads_k)
    check(any_backend, q, k, v, frequencies(32), 7, 4.0)


@pytest.mark.parametrize("group, window", [(1, 5), (3, 9), (4, 8), (16, 16)])
def test_self_extend(group, window, any_backend):
    q, k, v = make_qkv(seqlen_q=59)
    check(any_backend, q, k, v, frequencies(32), window, float(group), grouped=True)


@pytest.mark.parametrize("seqlen_q, seqlen_k", [(1, 40), (5, 40), (39, 40), (40, 7), (3, 1)])
@pytest.mark.parametrize("factor", [INF, 4.0])
def test_queries_are_the_last_of_the_sequence(seqlen_q, seqlen_k, factor, any_backend):
    q, k, v = make_qkv(2, seqlen_q, seqlen_k, 4, 2)
    check(any_backend, q, k, v, frequencies(32), 9, factor)


@pytest.mark.parametrize(
    "changes",
    [
        {"softmax_scale": 0.3},
        {"log_n": 8},
        {"interleaved": True},
        {"interleaved": True, "log_n": 3, "softmax_scale": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("rotary_dim, attention_factor", [(32, 1.0), (16, 1.3), (2, 0.7)])
def test_options(changes, rotary_dim, attention_factor, any_backend):
    q, k, v = make_qkv(seqlen_q=29)
    freqs = frequencies(32, rotary_dim=rotary_dim, attention_factor=attention_factor)
    check(any_backend, q, k, v, freqs, 6, 2.0, **changes)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_strided_views_are_not_copied(dtype, any_backend):
    q, k, v = make_qkv(2, 23, None, 4, 2, 32, dtype)
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    padded = torch.full((2, 23, 4, 48), torch.nan, dtype=dtype, device=q.device)
    padded[..., 8:40] = q
    check(any_backend, padded[..., 8:40], *views[1:], frequencies(32), 5)


# -------------------------------------------------------------------------------------------------
# Packed sequences


@pytest.mark.parametrize("shape", [(0, 5, 4), (2, 0, 4), (2, 5, 0)])
def test_empty(shape, any_backend):
    q = torch.empty(*shape, 32, device=device(), requires_grad=True)
    k, v = (torch.ones(*shape[:2], 2, 32, device=device(), requires_grad=True) for _ in "kv")
    out, lse = call(q, k, v, frequencies(32), any_backend, window=4, return_lse=True)
    assert out.shape == q.shape and lse.shape == (shape[0], shape[2], shape[1])
    for x, grad in zip((q, k, v), torch.autograd.grad(out.sum(), (q, k, v))):
        assert torch.equal(grad, torch.zeros_like(x))


# -------------------------------------------------------------------------------------------------
# What it reduces to


def test_factor_one_is_plain_attention(any_backend):
    q, k, v = make_qkv(seqlen_q=41, heads_q=4, heads_k=2)
    options = {"freqs": frequencies(32), "backend": any_backend}
    plain = call(q, k, v, **options, window=41)
    for window in (1, 7, 40):
        assert torch.equal(call(q, k, v, **options, window=window, factor=1.0), plain)
        grouped = call(q, k, v, **options, window=window, factor=1.0, grouped=True)
        assert torch.equal(grouped, plain)


@pytest.mark.parametrize("factor", [1 / 16, 4.0, INF])
@pytest.mark.parametrize("window", [41, 42, 10**9])
def test_a_window_past_the_sequence_is_plain_attention(window, factor, any_backend):
    q, k, v = make_qkv(seqlen_q=41)
    plain = call(q, k, v, frequencies(32), any_backend, window=1, factor=1.0)
    out = call(q, k, v, frequencies(32), any_backend, window=window, factor=factor)
    assert torch.equal(out, plain)


def test_plain_attention_is_pytorchs(any_backend):
    q, k, v = make_qkv(seqlen_q=41, heads_q=4, heads_k=2)
    freqs = frequencies(32)

    def sdpa(*tensors):
        rotated = [x.transpose(1, 2) for x in (*apply_rope_qk(*tensors[:2], freqs), tensors[2])]
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(*rotated, is_causal=True, enable_gqa=True).transpose(1, 2)

    out = call(q, k, v, freqs, any_backend, window=41)
    assert_within_budget("out", out, sdpa(q, k, v), sdpa(q.double(), k.double(), v.double()))


# -------------------------------------------------------------------------------------------------
# Which position did every pair see?


@pytest.mark.parametrize("window", [1, 5, 16, 17, 31])
@pytest.mark.parametrize("factor, grouped", [(INF, False), (4.0, False), (1 / 4, False), (1, True)])
def test_position_probe(window, factor, grouped, any_backend):
    """One pair of dims, k at a right angle to q, so that a logit is the sine of its angle.

    v is one-hot: the output is the weights, so their logarithms give every relative position.
    """
    n, theta, gain = 32, 5e-3, 20.0
    q, k = torch.zeros(2, 1, n, 1, n, device=device()).unbind()
    q[..., 1] = gain
    k[..., 0] = 1.0
    v = torch.eye(n, device=device())[None, :, None]
    freqs = RopeFreqs(torch.tensor([theta], device=device()))
    if grouped:
        factor, window = 2.0, 2 * window
    out, lse = call(
        q, k, v, freqs, any_backend, window=window, factor=factor, grouped=grouped,
        interleaved=True, softmax_scale=1.0, return_lse=True,
    )  # fmt: skip
    logits = out[0, :, 0].double().log() + lse[0, 0].double()[:, None]
    seen = torch.arcsin(-logits / gain) / theta
    want = rerope(n, n, window, factor, grouped).seen.to(seen.device)
    visible = ~want.isnan()
    assert torch.equal(out[0, :, 0] > 0, visible)
    assert (seen - want)[visible].abs().max() < 0.01


# -------------------------------------------------------------------------------------------------
# Long positions, and repeats


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("factor", [INF, 16.0])
def test_positions_around_a_million(dtype, factor, fast_backend):
    """Two queries at the end of 1,000,003 keys; those near them have large logits, others none."""
    if fast_backend == "triton" and device() == "cpu":
        pytest.skip("60,000 interpreted tiles; the rotation has its own test at such positions")
    total, near = 1_000_003, 40
    q, k, v = make_qkv(1, 2, total, 1, 1, 8, dtype)
    k[:, :-near] = 0
    check(fast_backend, q, k, v, frequencies(8), near, factor, softmax_scale=6.0)


def test_bitwise_equal_across_repeats(fast_backend):
    interpreted = fast_backend == "triton" and device() == "cpu"
    q, k, v = make_qkv(2, 150 if not interpreted else 40, None, 6, 2, 64)
    options = {"window": 37, "factor": 4.0, "return_lse": True}
    first = call(q, k, v, frequencies(64), fast_backend, **options)
    for _ in range(100 if not interpreted else 1):
        again = call(q, k, v, frequencies(64), fast_backend, **options)
        assert all(torch.equal(a, b) for a, b in zip(first, again))
