"""Position strategies: pure functions that say which position every token gets.

Each takes sizes and an optional `torch.Generator` of the CPU, where all numbers are drawn, and
returns int64 positions (float32 for `giraffe_randomized`) for `apply_rope`, on `device`. The same
state of the generator gives the same result on every device; without one, torch's own is used.

Where logits depend on the distance between query and key alone, as under every rotation here,
`shape` and `random_padding` change nothing but rounding: all tokens of a sequence move together.
`randomized`, `pose` and `giraffe_randomized` change the distances.
"""

from .giraffe_randomized import giraffe_randomized
from .pose import pose
from .random_padding import random_padding
from .randomized import randomized
from .shape import shape

__all__ = ["giraffe_randomized", "pose", "random_padding", "randomized", "shape"]
