"""Which keys and queries of two blocks of a sequence meet."""

from __future__ import annotations

import pytest

from extrope_kernels.ops.attention import BlockCall
from extrope_kernels.scores import FIRST_KEY

TOKENS = 40


@pytest.mark.parametrize("granularity, start", [(1, FIRST_KEY), (1, -7), (8, -8), (8, 0)])
@pytest.mark.parametrize("window", [None, 1, 5, 13])
def test_which_queries_and_keys_meet(granularity, start, window):
    options = {"granularity": granularity, "starts": [start], "sliding_window": window}
    call = BlockCall("op", options, None)
    seen = {
        query: [
            key
            for key in range(query + 1)
            if key >= query // granularity * granularity + start
            and (window is None or query - key < window)
        ]
        for query in range(TOKENS)
    }
    for query, keys in seen.items():
        assert max(call.first_key(query), 0) == keys[0]
    for end in range(1, TOKENS):
        last = max(query for query, keys in seen.items() if keys[0] < end)
        assert min(call.queries_end(end), TOKENS) == last + 1
