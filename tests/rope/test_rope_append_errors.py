"""`rope_append` as an op, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from append_cases import CONTIGUOUS, FILLER, Step, ints
from rope_oracle import INTERPRETED

from extrope_kernels import rope_append_kvcache, scores
from extrope_kernels.testing import device


def op_of(backend: str):
    return getattr(torch.ops.extrope, f"rope_append{'_triton' if backend == 'triton' else ''}")


def op_arguments(case: str) -> tuple[list, dict]:
    """The op's positional arguments, and its options."""
    step = Step(norms="head")
    tensors = [step.q, step.k, step.v, *step.caches(torch.float32), *step.weights.values()]
    if case == "lengths":
        return [*tensors, step.freqs.inv_freq, ints(3, 9)], {"attention_factor": 1.1}
    if case == "slots":
        slots, positions = ints(*range(10)).view(2, 5), ints(*range(5))
        return [*tensors, step.freqs.inv_freq, None, None, slots, None, None, positions], {}
    tensors[0], tensors[5] = None, None
    stored = {"stored": [float(n) for n in scores.rerope(4, 2.0).stored], "interleaved": True}
    return [*tensors, step.freqs.inv_freq, ints(3, 9), None, None, None, ints(1, 2)], stored


@pytest.mark.parametrize("case", ("lengths", "slots", "stored"))
def test_opcheck(backend, case):
    tensors, options = op_arguments(case)
    torch.library.opcheck(op_of(backend), tuple(tensors), options)


def test_compile_in_one_graph(backend):
    step = Step(norms="head", call=CONTIGUOUS)

    def run(q, k, v, k_cache, v_cache, lengths):
        call = {"cache_seqlens": lengths, **step.weights, "backend": backend}
        return rope_append_kvcache(q * 2, k, v, k_cache, v_cache, step.freqs, **call)

    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        caches = step.caches(torch.float32)
        out = function(step.q, step.k, step.v, *caches, CONTIGUOUS["cache_seqlens"])
        results.append([out, *caches])
    for x, y in zip(*results):
        assert torch.equal(x, y)


def test_gradients_are_refused(backend):
    tensors, options = op_arguments("lengths")
    tensors[0].requires_grad_()
    with pytest.raises(NotImplementedError, match="inference"):
        op_of(backend)(*tensors, **options).sum().backward()
    with pytest.raises(ValueError, match="q that requires grad"):
        rope_append_kvcache(*tensors[:5], None, cache_seqlens=3, backend=backend)
    weight = tensors[6].requires_grad_()  # a model's own
    call = {"cache_seqlens": 3, "k_norm_weight": weight, "backend": backend}
    assert not rope_append_kvcache(tensors[0].detach(), *tensors[1:5], None, **call).requires_grad


PAGED, TABLE = Step(blocks=(12, 4)), ints(1, 12, 3, 4).view(2, 2)
REFUSED = {
    "past the end": (Step(), {"cache_seqlens": ints(3, 19)}, "cache_seqlens"),
    "negative": (Step(), {"cache_seqlens": ints(3, -1)}, "cache_seqlens"),
    "no slots": (Step(), {"positions": ints(*range(5))}, "cache_seqlens or slot_mapping"),
    "slot": (
        Step(),
        {**CONTIGUOUS, "slot_mapping": ints(*range(37, 47)).view(2, 5)},
        "slot_mapping",
    ),
    "slot below -1": (
        Step(),
        {**CONTIGUOUS, "slot_mapping": ints(*range(-2, 8)).view(2, 5)},
        "slot_mapping",
    ),
    "no positions": (Step(), {"slot_mapping": ints(*range(10)).view(2, 5)}, "positions"),
    "page": (
        PAGED,
        {"cache_seqlens": 3, "block_table": ints(1, 12, 3, 4).view(2, 2)},
        "block_table",
    ),
    "two places": (
        PAGED,
        {"slot_mapping": ints(*range(10)).view(2, 5), "block_table": ints(1, 2).view(2, 1)},
        "block_table and slot_mapping",
    ),
    "offsets": (Step(), {**CONTIGUOUS, "positions": ints(3, 4)}, "positions"),
    "fractions": (
        Step(),
        {**CONTIGUOUS, "positions": torch.rand(5, device=device()), "score": scores.rerope(4, 2.0)},
        "positions",
    ),
    "padding": (Step(), {**CONTIGUOUS, "cache_leftpad": ints(-1, 0)}, "cache_leftpad"),
    "packed": (Step(tokens=(5,)), {"cache_seqlens": 3}, "cu_seqlens or slot_mapping"),
    "boundaries": (
        Step(tokens=(5,)),
        {"cache_seqlens": 3, "cu_seqlens": ints(0, 4, 6)},
        "cu_seqlens",
    ),
    "boundaries from 1": (
        Step(tokens=(5,)),
        {"cache_seqlens": 3, "cu_seqlens": ints(1, 4, 5)},
        "cu_seqlens",
    ),
}


@pytest.mark.skipif(not INTERPRETED, reason="values on a GPU are not looked at")
@pytest.mark.parametrize("name", REFUSED)
def test_is_refused_before_anything_is_written(name, backend):
    step, call, named = REFUSED[name]
    caches = step.caches(torch.float32)
    for which in (backend, "reference"):
        given = {"freqs": step.freqs, **call, "backend": which}
        with pytest.raises(ValueError, match=rf"^rope_append_kvcache: .*{named}"):
            rope_append_kvcache(step.q, step.k, step.v, *caches, **given)
    assert all((x == FILLER).all() for x in caches)


STEP, CACHE = Step(), Step().caches(torch.float32)[0]
SCALES = torch.ones(2, device=device())
FP8 = CACHE.to(torch.float8_e4m3fn)
WRONG = {
    "v tokens": ({"v": STEP.v[:, :4]}, "v must have k's tokens and heads"),
    "v dtype": ({"v": STEP.v.half()}, "v must be torch.float32 on"),
    "q dtype": ({"q": STEP.q.half()}, "k must have q's dtype torch.float16"),
    "q dims": ({"q": STEP.q[..., :16]}, "k must have q's shape"),
    "k strides": (
        {"k": STEP.k.transpose(2, 3).contiguous().transpose(2, 3)},
        "k must be contiguous in its last dimension",
    ),
    "heads": ({"k_cache": CACHE[:, :, :1]}, "k_cache must have the heads and head_dim that are"),
    "dtype": ({"v_cache": CACHE.half()}, "v_cache must be torch.float32"),
    "expanded": ({"k_cache": CACHE[:1].expand(2, -1, -1, -1)}, "k_cache must not be expanded"),
    "slots": ({"v_cache": CACHE[:, :22]}, "v_cache must have k_cache's blocks and slots"),
    "batch": ({"k_cache": CACHE[:1], "v_cache": CACHE[:1]}, "k_cache must be .batch, max_len"),
    "lengths": ({"cache_seqlens": ints(3, 9, dtype=torch.int64)}, "cache_seqlens must be int32"),
    "some lengths": ({"cache_seqlens": ints(3)}, "cache_seqlens must be int32 .2,. on"),
    "padding": ({"cache_leftpad": ints(3)}, "cache_leftpad must be int32 .2,. on"),
    "table": ({"block_table": ints(0, 1)}, "block_table must be int32 .2, max_blocks. on"),
    "page size": (
        {"block_table": TABLE, "k_cache": CACHE[:, :0], "v_cache": CACHE[:, :0]},
        "k_cache must have a block_size >= 1, got 0",
    ),
    "slot_mapping": (
        {"slot_mapping": ints(*range(5))},
        "slot_mapping must be int32 or int64 .2, 5",
    ),
    "no q": ({"q": None, "q_norm_weight": SCALES}, "q_norm_weight needs a q, got None"),
    "scales": ({"k_scale": SCALES, "v_scale": SCALES}, "k_scale and v_scale are for caches in"),
    "scale": (
        {"k_cache": FP8, "v_cache": FP8, "k_scale": SCALES, "v_scale": -SCALES},
        "v_scale must be positive numbers",
    ),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("which", (None, "reference"))
def test_what_has_no_meaning(name, which):
    changes, message = WRONG[name]
    given = {"q": STEP.q, "k": STEP.k, "v": STEP.v, "k_cache": CACHE, "v_cache": CACHE}
    given |= {"freqs": STEP.freqs, **CONTIGUOUS, **changes, "backend": which}
    with pytest.raises(ValueError, match=f"^rope_append_kvcache: {message}"):
        rope_append_kvcache(**given)
    assert (CACHE == FILLER).all()
