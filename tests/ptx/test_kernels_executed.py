"""The package's Triton kernels as compiled for sm_80, sm_90 and sm_100, executed on a CPU.

Results agree with the reference within the error budget, and no launch races, leaves its bounds or
skips a fence or a wait (`support.ptx.plugin` fails a test that does). `make test` runs every kernel
once on sm_90, and attention on all; the thorough tests run shapes, dtypes, options, chips and
Tritons.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.rounding import Rounding, noise_of_lse, norm
from torch import Tensor

from extrope_kernels import (
    apply_rope_qk,
    methods,
    rope_append_kvcache,
    rope_attention,
    rope_attention_with_kvcache,
    scores,
)
from extrope_kernels.scores import FIRST_KEY, PairMap, PositionMap, Region, Score
from extrope_kernels.testing import assert_within_budget

pytest.importorskip("triton.backends.nvidia")

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
IDS = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}
SCORES = {
    "rope": None,
    "rerope": scores.rerope(window=40),
    "leaky_rerope": scores.leaky_rerope(window=33, factor=4.0),
    "self_extend": scores.self_extend(window=32, factor=4.0),
    "dual_chunk": scores.dual_chunk(chunk_size=48, local_window=16),
    "string": scores.string(shift=40, window=16),
    "blockwise_causal": scores.blockwise_causal(block_size=32),
}


def randn(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


def wide(x):
    """Widen the floating tensors of a call to float64; leave all else."""
    return x.to(FP64) if isinstance(x, Tensor) and x.is_floating_point() and x.itemsize > 1 else x


def agree(names: str, call, tensors: list[Tensor], noise=None, **options) -> None:
    """Compare call(*tensors, backend="triton") with the reference, in its dtype and float64.

    call returns as many tensors as there are names. noise: by name, the error of roundings that
    the reference does without.
    """
    found = call(*tensors, backend="triton", **options)
    same = call(*tensors, backend="reference", **options)
    kept = ("k_scale", "v_scale")  # float32 whatever the dtype
    options = {name: x if name in kept else wide(x) for name, x in options.items()}
    exact = call(*map(wide, tensors), backend="reference", **options)
    for name, *values in zip(names.split(), found, same, exact, strict=True):
        if values[0].itemsize == 1:  # fp8: where a sum lies between two codes, either of them
            out, _, want = (x.float() for x in values)
            torch.testing.assert_close(out, want, rtol=2**-3, atol=2**-9, msg=name)
            continue
        seen = values[2].isfinite()
        assert torch.equal(values[0].isfinite(), seen), name
        out, near, want = (x.masked_fill(~seen, 0) for x in values)
        more = 0.0 if noise is None else noise(name, want)
        assert_within_budget(name, out, near.to(out.dtype), want, noise=more)


def of_norms(name: str, exact: Tensor) -> float:
    """Mean squares, products and means: five roundings that a rotation has not."""
    return 2.5 * torch.finfo(FP32).eps * exact.abs().max().item()


def of_heads(dim: int, floor: bool, heads: int = 2) -> dict:
    """Frequencies of each head of k, and a divisor and an offset of each pair."""
    divisors = 1 + torch.arange(dim // 2) % 7
    k_map = PairMap(divisors, floor=floor)
    q_map = PairMap(divisors, 32 - (32 // divisors if floor else 32 / divisors), floor=floor)
    near = Region(-31, PositionMap(), PositionMap())
    score = Score("of_heads", (Region(FIRST_KEY, q_map, k_map), near))
    inv_freq = methods.rope(dim).inv_freq / (1 + torch.arange(heads))[None, :, None]
    return {"score": score, "freqs": dataclasses.replace(methods.rope(dim), inv_freq=inv_freq)}


def attend(*tensors: Tensor, freqs, score, backend: str, backward: bool = True, **options):
    """out and lse; gradients of q, k, v and the sinks with `backward`."""
    q, k, v, dout = (x.detach().requires_grad_() for x in tensors)
    inputs = [q, k, v]
    if "sinks" in options:
        wide_enough = torch.promote_types(q.dtype, FP32)
        options["sinks"] = options["sinks"].to(wide_enough).requires_grad_()
        inputs.append(options["sinks"])
    out, lse = rope_attention(q, k, v, freqs, score, return_lse=True, backend=backend, **options)
    if not backward:
        return out.detach(), lse.detach()
    return out.detach(), lse.detach(), *torch.autograd.grad(out, inputs, dout)


def check_attention(
    dtype=BF16, dim=64, score="rerope", n=130, keys=None, heads=(2, 1), dv=None, freqs=None,
    **options,
):  # fmt: skip
    keys, dv = keys or n, dv or dim
    lead = () if "cu_seqlens" in options else (1,)
    shapes = ((n, heads[0], dim), (keys, heads[1], dim), (keys, heads[1], dv), (n, heads[0], dv))
    tensors = [randn(*lead, *shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]
    names = "out lse" + (" dq dk dv" if options.get("backward", True) else "")
    names += " dsinks" if "sinks" in options else ""
    method = {"freqs": freqs or methods.rope(dim)}
    method["score"] = SCORES[score] if isinstance(score, str) else score
    noise: dict[str, float] = {}
    if dtype == FP32 and not options:  # in 16 bits it is far within the budget
        *rows, dout = (wide(x).requires_grad_() for x in tensors)
        found = rope_attention(*rows, **method, return_lse=True, backend="reference")
        noise = dict(zip(("dq", "dk", "dv"), noise_of_lse(rows, *found, dout.detach())))
    agree(names, attend, tensors, lambda name, _: noise.get(name, 0.0), **method, **options)


def decode(q, k, v, k_cache, v_cache, *, freqs, score, backend, **options):
    k_cache, v_cache = k_cache.clone(), v_cache.clone()
    new = {} if k is None else {"k": k, "v": v}
    out, lse = rope_attention_with_kvcache(
        q, k_cache, v_cache, freqs, score, return_lse=True, backend=backend, **new, **options
    )  # fmt: skip
    return (out, lse) if k is None else (out, lse, k_cache, v_cache)


def check_decode(
    dtype=BF16, dim=64, score="rerope", lengths=(75, 7), new=1, heads=(4, 2), page=None, fp8=False,
    append=True, freqs=None, **options,
):  # fmt: skip
    """`new` queries at the end of a cache that, with `append`, is given their keys first."""
    batch, capacity = len(lengths), max(lengths) + new
    shape = (batch, capacity, heads[1], dim)
    if page is not None:
        pages = -(-capacity // page)
        shape = (batch * pages, page, heads[1], dim)
        order = torch.randperm(batch * pages, generator=torch.Generator().manual_seed(0))
        options["block_table"] = order.int().view(batch, pages)
    caches, unit = [randn(*shape, dtype=dtype, seed=i) for i in (5, 6)], 1.0
    if fp8:
        unit = 0.05
        caches = [(x / unit).to(torch.float8_e4m3fn) for x in caches]
        options |= {name: torch.full((heads[1],), unit) for name in ("k_scale", "v_scale")}
    options["cache_seqlens"] = torch.tensor([n + (0 if append else new) for n in lengths]).int()
    given = [randn(batch, new, h, dim, dtype=dtype, seed=h) for h in (heads[0], heads[1], heads[1])]
    given = given if append else [given[0], None, None]
    names = "out lse" + (" k_cache v_cache" if append else "")
    rounding = Rounding(given[0], wide(caches[0]), dim**-0.5)

    values = [unit * caches[1].double(), *(given[2:] if append else ())]
    largest = max(x.abs().max().item() for x in values)

    def of_operands(name: str, exact: Tensor) -> float:
        """Scaled queries are rounded, and weights to 16 bits, which the reference does not do.

        Weights add up to 1: half an eps of each moves a result by half an eps of a value at most.
        """
        if name == "lse":
            return rounding.logit
        if dtype == FP32:
            return rounding.weight(max(lengths) + new) * norm(exact)
        return torch.finfo(dtype).eps / 2 * largest if name == "out" else 0.0

    options |= {"score": SCORES[score] if isinstance(score, str) else score}
    options["freqs"] = freqs or methods.rope(dim)
    agree(names, decode, [*given, *caches], of_operands, **options)


def rotate(q, k, grad_q, grad_k, *, dim, backend, norms=(None, None), **options):
    """Rotated q and k, and the gradients of q, k and the norms' weights."""
    q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
    weights = [
        x.to(torch.promote_types(q.dtype, FP32)).requires_grad_() for x in norms if x is not None
    ]
    if weights:
        options |= dict(zip(("q_norm_weight", "k_norm_weight"), weights))
    out = apply_rope_qk(q, k, methods.rope(dim), backend=backend, **options)
    grads = torch.autograd.grad(out, (q, k, *weights), (grad_q, grad_k))
    return *(x.detach() for x in out), *grads


def check_rotation(dtype=BF16, dim=64, head_dim=None, n=37, norm=False, **options):
    head_dim = head_dim or dim
    shapes = [(2, n, 3, head_dim), (2, n, 1, head_dim)]
    tensors = [randn(*shape, dtype=dtype, seed=i) for i in (0, 1) for shape in shapes]
    names = "q k dq dk"
    if norm:
        options["norms"] = [1 + randn(head_dim, dtype=FP32, seed=i) / 4 for i in (2, 3)]
        names += " dq_weight dk_weight"
    agree(names, rotate, tensors, of_norms if norm else None, dim=dim, **options)


def append(q, k, v, k_cache, v_cache, *, dim, backend, **options):
    k_cache, v_cache = k_cache.clone(), v_cache.clone()
    freqs = methods.rope(dim)
    out = rope_append_kvcache(q, k, v, k_cache, v_cache, freqs, backend=backend, **options)
    return out, k_cache, v_cache


def check_append(dtype=BF16, dim=64, tokens=5, paged=False, **options):
    shape = (6, 8, 2, dim) if paged else (2, 23, 2, dim)
    given = [randn(2, tokens, heads, dim, dtype=dtype, seed=heads) for heads in (4, 2, 2)]
    caches = [torch.full(shape, -7.0, dtype=dtype) for _ in range(2)]
    if paged:
        options["block_table"] = torch.tensor([[3, 1, 5], [0, 2, 4]]).int()
    options["cache_seqlens"] = torch.tensor([3, 9]).int()
    agree("q k_cache v_cache", append, [*given, *caches], dim=dim, **options)


def merge(out_a, out_b, lse_a, lse_b, *, backend):
    from extrope_kernels.ops.attention.triton import merge as kernels

    merge_fwd = kernels.merge_fwd if backend == "triton" else torch.ops.extrope.merge_fwd
    return merge_fwd([out_a, out_b], [lse_a, lse_b])


def check_merge(dtype=BF16):
    outs = [randn(1, 37, 3, 64, dtype=dtype, seed=i) for i in (0, 1)]
    lses = [randn(1, 3, 37, dtype=FP32, seed=i) for i in (2, 3)]
    agree("out lse", merge, [*outs, *lses])


# What make test runs: every kernel once, shapes that cross the edge of a block


def test_attention(chip):
    check_attention()


def test_decode(chip, many_splits):
    """The last program of a sequence merges what the others stored."""
    from support.ptx import launch

    many_splits()
    check_decode(page=16, sinks=torch.tensor([0.5, -1.0, 2.0, 0.0]))
    opcodes = launch.LOG.instructions["decode_kernel"]
    assert "atom.global.gpu.acq_rel.add.u32" in opcodes


def test_attention_of_heads(chip):
    """Rotated ahead, forward: a head's own frequencies and maps are of the rotation alone."""
    check_attention(n=70, heads=(4, 2), backward=False, **of_heads(64, floor=True))


def test_attention_of_rotated_rows(chip):
    """Rows at their own positions are moved on; the near region takes them as they are."""
    check_attention(n=70, rotated="qk")
    check_decode(rotated="qk")


def test_decode_of_heads(chip):
    check_decode(**of_heads(64, floor=False))


def test_a_head_whose_frequency_is_no_number(chip):
    """A compiler must not make 0 of NaN times 0: rows of that head are NaN, others are not."""
    given = of_heads(64, floor=False)
    given["freqs"].inv_freq[0, 1, 5] = torch.nan
    check_attention(n=33, heads=(4, 2), backward=False, **given)
    check_decode(lengths=(20,), append=False, **given)


def test_rotation(chip):
    check_rotation()


def test_norm(chip):
    check_rotation(norm=True)


def test_append(chip):
    check_append(paged=True)


def test_merge(chip):
    check_merge()


# make test-all


@pytest.mark.thorough
@pytest.mark.parametrize(
    "options",
    [
        {"dim": 128, "page": 16, "new": 9},
        {"dim": 64, "fp8": True, "append": False},
        {"dim": 96, "dtype": FP32, "lengths": (150, 0, 33)},
        {"score": "string", "softcap": 20.0, "heads": (1, 1)},
    ],
    ids=lambda options: "-".join(options),
)
def test_decode_by_splits_with_options(chip, options, many_splits):
    many_splits()
    check_decode(**{"lengths": (130, 65), **options})


DIMS = [64, 96, 128, 256]
PACKED = torch.tensor([0, 1, 66, 66, 150]).int()


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=IDS.get)
@pytest.mark.parametrize("dim", DIMS)
def test_attention_of_dims(chip, dim, dtype):
    check_attention(dtype, dim, n=130 if dim < 256 else 70)


@pytest.mark.thorough
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("dim", [64, 128])
def test_attention_of_scores(chip, score, dim):
    check_attention(BF16 if dim == 128 else FP16, dim, score, n=140, heads=(1, 1))


@pytest.mark.thorough
@pytest.mark.parametrize("dim", [64, 96, 128])
def test_packed_attention(chip, dim):
    check_attention(BF16, dim, n=150, cu_seqlens=PACKED)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "options",
    [
        {"cu_seqlens": PACKED, "n": 150},
        {"dtype": FP16},
        {"interleaved": True, "dim": 128},
        {"dim": 128, "freqs": methods.rope(64), "rotary_offset": 56},
        {"dim": 64, "heads": (4, 2), **of_heads(64, floor=True)},
    ],
    ids=lambda options: "-".join(options),
)
def test_attention_of_rotated_rows_with_options(chip, options):
    check_attention(**{"n": 70, "score": "leaky_rerope", "rotated": "qk", **options})


@pytest.mark.thorough
@pytest.mark.parametrize(
    "options",
    [
        {"dtype": FP16, "page": 16, "interleaved": True},
        {"fp8": True},
        {"dim": 96, "freqs": methods.rope(32), "rotary_offset": 56},
        of_heads(64, floor=False),
    ],
    ids=lambda options: "-".join(options),
)
def test_decode_of_rotated_rows_with_options(chip, options):
    check_decode(**{"score": "leaky_rerope", "rotated": "qk", **options})


@pytest.mark.thorough
@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 5.0},
        {"sinks": torch.tensor([0.5, -1.0])},
        {"sliding_window": 70},
        {"interleaved": True},
        {"log_n": 50.0, "softmax_scale": 0.2},
        {"softcap": 9.0, "sinks": torch.tensor([2.0, 0.0]), "sliding_window": 70, "log_n": 50.0},
        {"n": 45, "keys": 170},
        {"dim": 192, "dv": 128, "n": 70},
        {"dim": 192, "dv": 128, "n": 70, "freqs": methods.rope(64), "rotary_offset": 128},
        {"dim": 64, "dv": 128, "score": "string", "n": 70},
        {"dim": 64, "freqs": methods.xpos(64), "score": "blockwise_causal", "n": 70},
    ],
    ids=lambda options: "-".join(options),
)
def test_attention_with_options(chip, options):
    check_attention(**{"dtype": BF16, "dim": 128, "n": 150, **options})


@pytest.mark.thorough
@pytest.mark.parametrize("dim, n", [(64, 90), (128, 50), (256, 40)])
@pytest.mark.parametrize("score", ["rerope", "dual_chunk"])
def test_attention_in_float32(chip, dim, n, score):
    check_attention(FP32, dim, score, n=n, heads=(1, 1))


@pytest.mark.thorough
@pytest.mark.parametrize(
    "options",
    [
        {"dim": 128},
        {"dim": 96, "cu_seqlens": PACKED, "n": 150},
        {"dim": 64, "interleaved": True, "dtype": FP32, "keys": 150},
    ],
    ids=lambda options: "-".join(options),
)
@pytest.mark.parametrize("floor", [False, True])
def test_attention_of_heads_with_options(chip, options, floor):
    options = {"dtype": BF16, "n": 130, **options}
    check_attention(heads=(4, 2), **of_heads(options["dim"], floor), **options)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "options",
    [{"dim": 128, "page": 16, "new": 9}, {"dim": 64, "fp8": True}, {"dim": 96, "dtype": FP32}],
    ids=lambda options: "-".join(options),
)
@pytest.mark.parametrize("floor", [False, True])
def test_decode_of_heads_with_options(chip, options, floor):
    check_decode(**of_heads(options["dim"], floor), **options)


@pytest.mark.thorough
@pytest.mark.parametrize("score", SCORES)
def test_decode_of_scores(chip, score):
    check_decode(score=score, dtype=FP16, lengths=(150, 31))


@pytest.mark.thorough
@pytest.mark.parametrize(
    "options",
    [
        {"dim": 128, "dtype": FP16, "lengths": (300, 17, 1), "page": 16, "heads": (8, 2)},
        {"dim": 128, "fp8": True, "page": 32, "lengths": (130, 65), "append": False},
        {"dim": 64, "fp8": True, "dtype": FP16, "append": False},
        {"dim": 64, "dtype": FP32, "lengths": (90, 33), "new": 3},
        {"dim": 128, "new": 9, "softcap": 20.0, "log_n": 20.0, "append": False},
        {"dim": 256, "sliding_window": 50, "lengths": (100, 40)},
        {"dim": 96, "new": 37, "lengths": (137, 45, 3), "page": 16},
        {"dim": 128, "new": 100, "lengths": (130,), "heads": (2, 1)},
        {"dim": 128, "sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])},
        {"dim": 96, "freqs": methods.rope(32), "rotary_offset": 56, "page": 16},
    ],
    ids=lambda options: "-".join(options),
)
def test_decode_with_options(chip, options):
    check_decode(**options)


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=IDS.get)
@pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
@pytest.mark.parametrize(
    "options",
    [
        {"dim": 128},
        {"dim": 96, "interleaved": True},
        {"dim": 32, "head_dim": 80, "rotary_offset": 40},
        {"dim": 64, "positions": torch.tensor([[1000], [16_000_000]]) + torch.arange(37)},
    ],
    ids=lambda options: "-".join(options),
)
def test_rotation_with_options(chip, dtype, norm, options):
    check_rotation(dtype, norm=norm, **options)


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=IDS.get)
@pytest.mark.parametrize("dim", DIMS)
def test_append_with_options(chip, dtype, dim):
    check_append(dtype, dim, paged=dtype == BF16, tokens=1 if dim == 96 else 5)


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [FP16, FP32], ids=IDS.get)
def test_merge_of_dtypes(chip, dtype):
    check_merge(dtype)


@pytest.mark.parametrize(
    ("dtype", "dim"), [(FP16, 64), pytest.param(BF16, 128, marks=pytest.mark.thorough)]
)
def test_older_tritons(chip, triton_version, dtype, dim, many_splits):
    """3.6 leaves out a fence, and 3.7 writes fragments after one; nothing else is found."""
    import triton
    from support.ptx import launch, plugin

    assert triton.__version__ == triton_version
    many_splits()
    for check in (check_rotation, check_append, check_attention):
        check(dtype, dim)
    check_decode(dtype, dim, "leaky_rerope")  # its keys are stored at mapped positions
    check_decode(**of_heads(64, floor=False))
    check_attention(dtype, dim, n=70, rotated="qk")
    if dim == 64:  # 3.7 gets the larger tiles right; the plugin fails on anything else
        kinds = {finding.split(": ")[0] for finding in launch.LOG.findings}
        assert kinds == plugin.known_findings()
