"""What models add to attention: sinks, caps, sliding windows, temperatures, starts, MLA's shapes.

Against the dense float64 formula, in which each of them is a switch of its own.
"""

import math

import pytest
import torch
from attention_oracle import (
    check_outputs,
    closed_form,
    frequencies,
    make_qkv,
    plain_formula,
    rounding_noise,
    worse,
)
from score_examples import EXAMPLES

from extrope_kernels import rerope_attention
from extrope_kernels.testing import assert_within_budget, device

INF = math.inf
FLOAT = torch.float32
LOW = (FLOAT, torch.bfloat16, torch.float16)
SEQLEN = 67
# Of two query heads: one that takes most of the weight, and one that takes little.
SINKS = (3.0, -1.5)
SWITCHES = {
    "sinks": {"sinks": SINKS},
    "softcap": {"softcap": 1.5},
    "sliding_window": {"sliding_window": 13},
    "sliding_window of one": {"sliding_window": 1},
    "query_scale": {"query_scale": "rows"},
    "query_scale of each sequence": {"query_scale": "batch"},
    "all": {
        "sinks": SINKS,
        "softcap": 2.0,
        "sliding_window": 29,
        "query_scale": "batch",
        "log_n": 16,
        "softmax_scale": 0.3,
    },
}


def tensors_of(options, batch, seqlen_q):
    """The options with tensors in place of what SWITCHES says of them."""
    options = dict(options)
    if "sinks" in options:
        options["sinks"] = torch.tensor(options["sinks"], device=device())
    shape = {"rows": (seqlen_q,), "batch": (batch, seqlen_q)}.get(options.get("query_scale"))
    if shape is not None:
        generator = torch.Generator().manual_seed(1)
        options["query_scale"] = (0.5 + torch.rand(shape, generator=generator)).to(device())
    return options


def relative_of(example, options, seqlen_q, seqlen_k):
    """Relative positions of the formula, and the rest of what it is told."""
    known = {n: x for n, x in options.items() if n not in ("sliding_window", "softmax_scale")}
    known["scale"] = options.get("softmax_scale")
    q_start, k_start = known.pop("q_start", None), known.pop("k_start", 0)
    if q_start is None:
        q_start = k_start + seqlen_k - seqlen_q
    known["first"] = q_start
    total = max(q_start + seqlen_q, k_start + seqlen_k)
    whole = example.relative(total, total, **example.parameters)
    whole = whole.within(options.get("sliding_window"))
    rows, keys = slice(q_start, q_start + seqlen_q), slice(k_start, k_start + seqlen_k)
    return whole.part(rows, keys), known


def run(example, q, k, v, freqs, options, backend):
    return example.attention(
        q, k, v, freqs, **example.parameters, **options, return_lse=True, backend=backend
    )


def check(backend, name, tensors, options):
    """out and lse against the formula, within the error budget."""
    example, (q, k, v) = EXAMPLES[name], tensors
    options = tensors_of(options, q.shape[0], q.shape[1])
    relative, known = relative_of(example, options, q.shape[1], k.shape[1])
    freqs = frequencies(q.shape[-1])
    exact = closed_form(q, k, v, relative, freqs, **known)
    spellings = (
        plain_formula(q, k, v, relative, freqs, **known, scale_first=first)
        for first in (False, True)
    )
    found = run(example, q, k, v, freqs, options, backend)
    # Of weights that are exp2 of a logit less lse: both are rounded.
    noise = rounding_noise("dv", v, exact[1], None, q, k, v, 1.0) if q.dtype == FLOAT else 0.0
    check_outputs(backend, q, found, worse(exact, *spellings), exact, noise)


def check_gradients(backend, name, tensors, options):
    """dq, dk, dv and dsinks against autograd through the formula, within the error budget."""
    example, (q, k, v) = EXAMPLES[name], tensors
    options = tensors_of(options, q.shape[0], q.shape[1])
    relative, known = relative_of(example, options, q.shape[1], k.shape[1])
    freqs, sinks = frequencies(q.shape[-1]), options.pop("sinks", None)
    known.pop("sinks", None)
    dout = torch.randn(*q.shape[:-1], v.shape[-1]).to(q)
    dlse = torch.randn(q.shape[0], q.shape[2], q.shape[1]).to(q.device)
    inputs = [*tensors, *([] if sinks is None else [sinks])]

    def gradients(function, leaves):
        leaves = [x.detach().clone().requires_grad_() for x in leaves]
        out, lse = function(*leaves)
        loss = (out * dout.to(out)).sum() + (lse * dlse).masked_fill(lse == -INF, 0.0).sum()
        return torch.autograd.grad(loss, leaves)

    def formula(function, **order):
        def of(q, k, v, sinks=None):
            return function(q, k, v, relative, freqs, **known, sinks=sinks, **order)

        return of

    def fused(q, k, v, sinks=None):
        return run(example, q, k, v, freqs, {**options, "sinks": sinks}, backend)

    exact = gradients(formula(closed_form), [x.double() for x in inputs])
    plain = worse(
        exact,
        *(gradients(formula(plain_formula, scale_first=x), inputs) for x in (False, True)),
    )
    lse = closed_form(*tensors, relative, freqs, **known, sinks=sinks)[1]
    scale = (known["scale"] or q.shape[-1] ** -0.5) * 1.5 * 2
    for label, got, low, want in zip(
        ("dq", "dk", "dv", "dsinks"), gradients(fused, inputs), plain, exact
    ):
        noise = rounding_noise(label, want, lse, dout, *tensors, scale)
        if label == "dsinks":
            noise *= q.shape[0] * q.shape[1]
        noise = noise if q.dtype == FLOAT else 0.0
        assert_within_budget(label, got, low, want, noise=noise)


@pytest.mark.parametrize("switch", ["sliding_window", "all"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_every_score_method(name, switch, any_backend):
    check(any_backend, name, make_qkv(2, SEQLEN), SWITCHES[switch])


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("switch", SWITCHES)
def test_dtypes(switch, dtype, any_backend):
    tensors = make_qkv(2, 41, 53, head_dim=64, dtype=dtype)
    check(any_backend, "leaky_rerope", tensors, SWITCHES[switch])


@pytest.mark.parametrize("switch", ["sinks", "sliding_window", "all"])
@pytest.mark.parametrize("name", ["self_extend", "dual_chunk"])
def test_gradients(name, switch, any_backend):
    check_gradients(any_backend, name, make_qkv(2, SEQLEN), SWITCHES[switch])


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("switch", ["softcap", "all"])
def test_gradients_of_dtypes(switch, dtype, any_backend):
    tensors = make_qkv(2, 41, 53, head_dim=64, dtype=dtype)
    check_gradients(any_backend, "leaky_rerope", tensors, SWITCHES[switch])


@pytest.mark.parametrize(
    "head_dim, head_dim_v, dtype", [(24, 8, FLOAT), (40, 64, LOW[2]), (192, 128, LOW[1])]
)
def test_another_head_dim_of_values(head_dim, head_dim_v, dtype, any_backend):
    tensors = make_qkv(2, 35, head_dim=head_dim, dtype=dtype, head_dim_v=head_dim_v)
    check(any_backend, "dual_chunk", tensors, {})
    check_gradients(any_backend, "rerope", tensors, SWITCHES["sinks"])


@pytest.mark.parametrize("head_dim", [264, 512])
def test_wide_heads(head_dim, any_backend):
    if any_backend == "triton":
        pytest.skip("its kernels take a head_dim up to 256")
    tensors = make_qkv(1, 19, head_dim=head_dim)
    check(any_backend, "rerope", tensors, {})
    check_gradients(any_backend, "rerope", tensors, {})


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
    options = {**STARTS[starts], "log_n": 16}
    check(any_backend, name, make_qkv(2, 23, 29), options)
    check_gradients(any_backend, name, make_qkv(2, 23, 29), options)


@pytest.mark.parametrize("name", ["leaky_rerope", "blockwise_causal"])
def test_starts_of_each_sequence(name, any_backend):
    """As one sequence after the other."""
    tensors, example, freqs = make_qkv(2, 23), EXAMPLES[name], frequencies(32)
    q_start, k_start = (
        torch.tensor(x, dtype=torch.int32, device=device()) for x in ((9, 31), (9, 20))
    )
    both = run(example, *tensors, freqs, {"q_start": q_start, "k_start": k_start}, any_backend)
    for b in range(2):
        options = {"q_start": int(q_start[b]), "k_start": int(k_start[b])}
        one = run(example, *(x[b : b + 1] for x in tensors), freqs, options, any_backend)
        for x, y in zip(both, one):
            torch.testing.assert_close(x[b : b + 1], y, rtol=0, atol=0)


@pytest.mark.parametrize("switch", ["sinks", "sliding_window", "all"])
def test_packed(switch, any_backend):
    """As the sequences one by one; a start for each of them."""
    lengths, example, freqs = (17, 0, 1, 30), EXAMPLES["self_extend"], frequencies(32)
    total = sum(lengths)
    tensors = [x[0] for x in make_qkv(1, total)]
    options = tensors_of(SWITCHES[switch], 1, total)
    scale = options.pop("query_scale", None)
    if scale is not None:
        scale = options["query_scale"] = scale.reshape(-1)
    cu_seqlens = torch.tensor((0, *lengths)).cumsum(0).int().to(device())
    starts = torch.tensor((0, 4, 9, 2), dtype=torch.int32, device=device())
    options |= {"q_start": starts, "k_start": starts}
    out, lse = run(example, *tensors, freqs, options | {"cu_seqlens": cu_seqlens}, any_backend)
    for n, (begin, end) in enumerate(zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:])):
        own = options | {"q_start": int(starts[n]), "k_start": int(starts[n])}
        if scale is not None:
            own["query_scale"] = scale[begin:end]
        one = [x[None, begin:end] for x in tensors]
        want, want_lse = run(example, *one, freqs, own, any_backend)
        torch.testing.assert_close(out[begin:end], want[0])
        torch.testing.assert_close(lse[:, begin:end], want_lse[0])


def test_a_row_without_keys_has_its_sink_alone(any_backend):
    """out 0 and the sink as lse; no gradient reaches q, k and v, and dsinks is that of lse."""
    q, k, v = (x.requires_grad_() for x in make_qkv(1, 5, 5))
    sinks = torch.tensor(SINKS, device=device(), requires_grad=True)
    options = {"sinks": sinks, "q_start": 0, "k_start": 9}
    out, lse = run(EXAMPLES["rerope"], q, k, v, frequencies(32), options, any_backend)
    assert not out.any()
    assert torch.equal(lse, sinks[:, None].expand(2, 5)[None])
    grads = torch.autograd.grad(out.sum() + lse.sum(), (q, k, v, sinks))
    assert not any(x.any() for x in grads[:3])
    torch.testing.assert_close(grads[3], torch.full((2,), 5.0, device=device()))


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_scales_of_any_sign(dtype, any_backend):
    """Keys that a row does not see stay hidden where its logits change their sign, or are all 0."""
    scale = (torch.arange(SEQLEN, device=device()) - SEQLEN // 2) / 20
    check(any_backend, "rerope", make_qkv(1, SEQLEN, dtype=dtype), {"query_scale": scale})


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
    _, lse = rerope_attention(
        q, k, k, frequencies(8), window=4, softmax_scale=1.0, softcap=1.0, return_lse=True,
        backend=any_backend,
    )  # fmt: skip
    exact = x.double().tanh().transpose(1, 2)
    # 6e-7 is the approximation's; the rest are roundings on the way to base 2 and back.
    allowed = (6e-7 + 4 * torch.finfo(torch.float32).eps) * exact.abs()
    assert ((lse.cpu() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("value", [math.nan, INF, -INF])
def test_a_sink_that_is_not_finite(value, any_backend):
    """As the formula has it: -inf is no sink, NaN and infinity take the row with them."""
    tensors = make_qkv(1, 9)
    options = {"sinks": torch.tensor([value, 0.5], device=device())}
    out, lse = run(EXAMPLES["rerope"], *tensors, frequencies(32), options, any_backend)
    if value == -INF:
        plain, plain_lse = run(EXAMPLES["rerope"], *tensors, frequencies(32), {}, any_backend)
        torch.testing.assert_close(out[:, :, 0], plain[:, :, 0])
        torch.testing.assert_close(lse[:, 0], plain_lse[:, 0])
    else:
        want = torch.full_like(lse[:, 0], value)
        torch.testing.assert_close(lse[:, 0], want, equal_nan=True)
    assert out[:, :, 1].isfinite().all()
