"""Generated caches and the queries at their end, against the definition."""

from __future__ import annotations

import rounding
from attention_cases import methods
from decode_oracle import Case, check, make
from generated import LOW, backends, generated, seeds
from hypothesis import strategies as st

from extrope_kernels.testing import available_backends


@st.composite
def caches(draw) -> Case:
    sizes = draw(st.lists(st.integers(0, 60), min_size=1, max_size=3))
    heads_k = draw(st.integers(1, 3))
    head_dim = draw(st.sampled_from((8, 24, 32, 64, 128)))
    function, _, parameters = draw(methods())
    pads = st.lists(st.integers(0, 9), min_size=len(sizes), max_size=len(sizes))
    return Case(
        lengths=tuple(sizes),
        seqlen_q=draw(st.integers(0, 4)),
        heads_q=heads_k * draw(st.integers(1, 8)),
        heads_k=heads_k,
        head_dim=head_dim,
        rotary_dim=2 * draw(st.integers(1, head_dim // 2)),
        dtype=draw(st.sampled_from(LOW)),
        attention=function.__name__,
        parameters=parameters,
        log_n=draw(st.sampled_from((None, 2, 16.5))),
        softmax_scale=draw(st.sampled_from((None, 0.05, 0.4))),
        interleaved=draw(st.booleans()),
        attention_factor=draw(st.sampled_from((1.0, 0.7, 1.3))),
        page_size=draw(st.sampled_from((None, 1, 5, 16))),
        leftpad=tuple(draw(pads)) if draw(st.booleans()) and sizes else None,
        freqs_per_sequence=draw(st.booleans()),
        softcap=draw(st.sampled_from((0.0, 0.0, 0.8, 30.0))),
        sliding_window=draw(st.one_of(st.none(), st.integers(1, 50))),
        sinks=draw(st.booleans()),
        query_scale=draw(st.booleans()),
        head_dim_v=draw(st.sampled_from((None, None, 8, 64))),
        seed=draw(seeds()),
    )


@generated(case=caches(), backend=backends(available_backends()))
def test_cache(case, backend):
    inputs = make(case)
    noise = rounding.of_cache(case, inputs, inputs.k_cache, inputs.v_cache)
    check(case, backend, inputs, noise)
