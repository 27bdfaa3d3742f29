"""Every backend reads every field of a call: forward, backward and decode differ without it."""

from __future__ import annotations

import pytest
import torch
from support.attention_engines import TorchEngine

from extrope_kernels import methods, scores
from extrope_kernels.ops.attention import AttentionCall, flash_attn, make_call, op
from extrope_kernels.ops.cache.call import KVCache
from extrope_kernels.ops.decode import op as decode_op
from extrope_kernels.testing import available_backends, device

TOKENS, PAIRS = 20, 6  # of 16 dims: the others pass through
FREQS = methods.rope(2 * PAIRS).to(device())
SCORE = scores.self_extend(6, 3)  # rounds down: absolute positions matter
DECAY = -torch.linspace(0.01, 0.02, PAIRS, device=device())
DPE = make_call(FREQS, scores.dpe(6, [1, 2, 3, 4, 5, 6]))


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device())


# For each field the call with it, and what the one without it has in its place.
FIELDS = {
    "inv_freq": ({}, FREQS.inv_freq / 2),
    "cu_seqlens": ({"cu_seqlens": ints(0, 7, TOKENS)}, ints(0, 11, TOKENS)),
    "log_decay": (
        {"score": scores.dual_chunk(8, 2), "rotated": "k", "log_decay": DECAY},
        DECAY / 2,
    ),
    "sinks": ({"sinks": torch.linspace(0, 3, 4, device=device())}, None),
    "query_scale": ({"query_scale": torch.linspace(0.5, 2, TOKENS, device=device())}, None),
    "pair_maps": ({"score": DPE.score, "pair_maps": DPE.pair_maps}, 2 * DPE.pair_maps),
    "q_start": ({"q_start": ints(31), "k_start": ints(20)}, ints(32)),
    "k_start": ({"q_start": ints(31), "k_start": ints(20)}, ints(22)),
    "score": ({}, scores.rerope(6)),
    "rotated": ({"score": scores.leaky_rerope(6, 2.0), "rotated": "qk"}, "k"),
    "softmax_scale": ({"softmax_scale": 0.5}, None),
    "attention_factor": ({"attention_factor": 1.5}, 1.0),
    "interleaved": ({"interleaved": True}, False),
    "rotary_offset": ({"rotary_offset": 4}, 0),
    "softcap": ({"softcap": 0.5}, 0.0),
    "sliding_window": ({"sliding_window": 9}, None),
    "float32_results": ({"float32_results": True}, False),
}
# The saved lse has the sinks in it, and their own gradient is `grad_of_sinks` of any backend.
# A cache says where queries and keys are, and its results have q's dtype.
ELSEWHERE = {"backward": ("sinks",), "decode": ("q_start", "k_start", "float32_results")}
REFUSED = {"flash_attn": ("q_start", "k_start")}
BACKENDS = (*available_backends(), "flash_attn")


def rows(packed: bool, heads: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    leading = (TOKENS,) if packed else (1, TOKENS)
    return torch.randn(*leading, heads, 16, generator=generator).to(device(), torch.float16)


def forward(call: AttentionCall, backend: str) -> tuple[torch.Tensor, ...]:
    packed = call.cu_seqlens is not None
    qkv = (rows(packed, heads, n) for n, heads in enumerate((4, 2, 2)))
    if backend == "flash_attn":
        return flash_attn.forward(*qkv, call, engine=TorchEngine("dlse", dlse=True))
    return op.forward(*qkv, call, backend)


def backward(call: AttentionCall, backend: str) -> tuple[torch.Tensor, ...]:
    """Gradients by outputs of another call, so that they depend on this one by themselves."""
    packed = call.cu_seqlens is not None
    q, k, v, out, dout = (rows(packed, heads, n) for n, heads in enumerate((4, 2, 2, 4, 4)))
    lse = out[..., 0].float().transpose(-1, -2).abs().contiguous() + 4
    given = (dout, None, q, k, v, out, lse)
    if backend == "flash_attn":
        return flash_attn.backward(*given, call, engine=TorchEngine("dlse", dlse=True))
    return op.backward(*given, call, backend)


def decode(call: AttentionCall, backend: str) -> tuple[torch.Tensor, ...]:
    packed = call.cu_seqlens is not None
    sequences = len(call.cu_seqlens) - 1 if packed else 1
    k, v = (rows(False, 2, n).repeat(sequences, 2, 1, 1) for n in (1, 2))
    cache = KVCache(k, v, ints(*[2 * TOKENS] * sequences))
    return decode_op.decode(rows(packed, 4, 0), None, None, cache, call, backend)


RUNS = {run.__name__: run for run in (forward, backward, decode)}


def test_every_field_has_a_row():
    assert tuple(FIELDS) == AttentionCall._fields


def test_schemas_are_as_they_were():
    """Graphs that were exported name them, and compiled libraries read them by order."""
    of_call = (
        "Tensor inv_freq, Tensor? {}, Tensor? log_decay, Tensor? sinks, Tensor? query_scale, "
        "Tensor? pair_maps"
    )
    options = (
        "*, float? softmax_scale=None, float attention_factor=1., bool interleaved=False, "
        "int? rotary_offset=None, float softcap=0., int? sliding_window=None, "
        "bool float32_results=False, int granularity, int[] region_starts, int[] map_kinds, "
        "int[]? map_moduli=None, float[]? map_divisors=None, bool[]? map_floors=None, "
        "float[]? map_offsets=None, float[]? map_caps=None, int[]? map_rows=None"
    )
    starts = "Tensor? q_start, Tensor? k_start"
    call = f"{of_call.format('cu_seqlens')}, {starts}, {options}"
    wanted = {
        "attention_fwd": f"(Tensor q, Tensor k, Tensor v, {call}) -> (Tensor out, Tensor lse)",
        "attention_bwd": (
            "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
            f"{call}) -> (Tensor dq, Tensor dk, Tensor dv)"
        ),
        "decode": (
            "(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? k, Tensor? v, "
            f"{of_call.format('cu_seqlens_q')}, Tensor cache_seqlens, Tensor? block_table, "
            f"Tensor? cache_leftpad, Tensor? k_scale, Tensor? v_scale, {options}) "
            "-> (Tensor out, Tensor lse)"
        ),
    }
    for name, schema in wanted.items():
        assert str(getattr(torch.ops.extrope, name).default._schema) == f"extrope::{name}{schema}"


@pytest.mark.parametrize("named", BACKENDS)
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("field", FIELDS)
def test_is_read(field, run, named):
    if field in ELSEWHERE.get(run, ()):
        pytest.skip("has another place")
    if field in REFUSED.get(named, ()):
        pytest.skip("is refused")
    given, otherwise = dict(FIELDS[field][0]), FIELDS[field][1]
    if named == "flash_attn":
        if run == "decode":
            pytest.skip("it has no cache")
        if field == "log_decay":  # it takes no chunks
            given["score"] = SCORE
    with_it = AttentionCall(FREQS.inv_freq, score=SCORE.plain)._replace(**given)
    without = with_it._replace(**{field: otherwise})
    for got, other in zip(RUNS[run](with_it, named), RUNS[run](without, named)):
        assert got.isfinite().all()
        if got.dtype != other.dtype or not torch.equal(got, other):
            return
    pytest.fail(f"{run} of {named} is the same without {field}")
