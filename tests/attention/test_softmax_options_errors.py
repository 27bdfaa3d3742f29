"""Sinks, caps, windows, scales and starts that no attention takes."""

import pytest
import torch
from attention_oracle import frequencies, make_qkv
from score_examples import EXAMPLES
from test_softmax_options import INF, run

from extrope_kernels.testing import device

WRONG = [
    ({"softcap": -1.0}, ValueError, "softcap must be >= 0 (0: none), got -1.0"),
    ({"softcap": INF}, ValueError, "softcap must be >= 0 (0: none), got inf"),
    ({"softcap": 1e-46}, ValueError, "softcap must be 0 (none) or from 1e-30 to 1e30, got 1e-46"),
    ({"softcap": 1e39}, ValueError, "softcap must be 0 (none) or from 1e-30 to 1e30, got 1e+39"),
    ({"softcap": "a"}, TypeError, "softcap must be a number, got str"),
    ({"sliding_window": 0}, ValueError, "sliding_window must be >= 1, got 0"),
    ({"sliding_window": 2**62}, ValueError, f"sliding_window must be < 2**62, got {2**62}"),
    ({"sinks": torch.zeros(3)}, ValueError, "sinks must be torch.float32 (2,)"),
    ({"sinks": [1.0, 2.0]}, TypeError, "sinks must be a Tensor, got list"),
    ({"query_scale": torch.ones(3)}, ValueError, "query_scale must be float32 (9,) or (1, 9)"),
    ({"q_start": -1}, ValueError, "q_start must be between 0 and 2**31, got -1"),
    ({"k_start": 1.5}, TypeError, "k_start must be an int or a Tensor, got float"),
    ({"k_start": torch.zeros(2)}, ValueError, "k_start must be an int, or int32 (1,)"),
    ({"softcup": 1.0}, TypeError, "got an unexpected keyword argument 'softcup'"),
]


@pytest.mark.parametrize("options, error, message", WRONG, ids=lambda x: str(x)[:30])
def test_wrong_arguments(options, error, message, any_backend):
    options = {n: x.to(device()) if hasattr(x, "to") else x for n, x in options.items()}
    with pytest.raises(error) as refused:
        run(EXAMPLES["rerope"], *make_qkv(1, 9), frequencies(32), options, any_backend)
    assert str(refused.value).startswith(f"rerope_attention: {message}")
