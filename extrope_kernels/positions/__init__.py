"""Position strategies: pure functions that give every token of a training sequence a position.

Each takes sizes and an optional `torch.Generator` of the CPU, where all numbers are drawn, and
returns int64 positions (float32 for `giraffe_randomized`) for `apply_rope`, on `device`. The same
state of the generator gives the same result on every device; without one, torch's own is used.

`randomized`, `pose` and `giraffe_randomized` change the distances between tokens. `shape` and
`random_padding` move all tokens of a sequence together: under a rotation, whose logits depend on
distances alone, they change nothing but rounding.
"""

from .giraffe_randomized import giraffe_randomized
from .pose import pose
from .random_padding import random_padding
from .randomized import randomized
from .shape import shape

__all__ = ["giraffe_randomized", "pose", "random_padding", "randomized", "shape"]
