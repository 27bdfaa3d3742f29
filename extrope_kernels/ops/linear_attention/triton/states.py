"""Device functions on states: a sum of k v^T, of keys, of values, and of what their extra numbers
weigh."""

import triton
import triton.language as tl


@triton.jit
def _state_pointers(pointer, slot, first, TILE: tl.constexpr):
    """(block_d, block_v) of a state (score_dim, value_dim), from value dim `first` on."""
    BLOCK_D: tl.constexpr = TILE.block_d
    BLOCK_V: tl.constexpr = TILE.block_v
    row = tl.arange(0, BLOCK_D)
    dim = first + tl.arange(0, BLOCK_V)
    base = pointer + tl.cast(slot, tl.int64) * (TILE.score_dim * TILE.value_dim)
    inside = (row < TILE.score_dim)[:, None] & (dim < TILE.value_dim)[None, :]
    return base + (row[:, None] * TILE.value_dim + dim[None, :]), inside


@triton.jit
def _sum_pointers(pointer, slot, first, DIM: tl.constexpr, BLOCK: tl.constexpr):
    dim = first + tl.arange(0, BLOCK)
    return pointer + tl.cast(slot, tl.int64) * DIM + dim, dim < DIM


@triton.jit
def no_state(TILE: tl.constexpr):
    BLOCK_D: tl.constexpr = TILE.block_d
    BLOCK_V: tl.constexpr = TILE.block_v
    state = tl.zeros((BLOCK_D, BLOCK_V), tl.float32)
    value_sum = tl.zeros((BLOCK_V,), tl.float32)
    return state, tl.zeros((BLOCK_D,), tl.float32), value_sum, value_sum


@triton.jit
def load_states(states, slot, first, TILE: tl.constexpr):
    """As store_states left them: what eps adds is in the state, and value_sum is 0."""
    BLOCK_D: tl.constexpr = TILE.block_d
    BLOCK_V: tl.constexpr = TILE.block_v
    SCORE_DIM: tl.constexpr = TILE.score_dim
    VALUE_DIM: tl.constexpr = TILE.value_dim
    pointers, inside = _state_pointers(states[0], slot, first, TILE)
    state = tl.load(pointers, mask=inside, other=0.0)
    _, key_sum, value_sum, extra_sum = no_state(TILE)
    if TILE.key_sum:
        pointers, inside = _sum_pointers(states[1], slot, 0, SCORE_DIM, BLOCK_D)
        key_sum = tl.load(pointers, mask=inside, other=0.0)
    if TILE.extra:
        pointers, inside = _sum_pointers(states[2], slot, first, VALUE_DIM, BLOCK_V)
        extra_sum = tl.load(pointers, mask=inside, other=0.0)
    return state, key_sum, value_sum, extra_sum


@triton.jit
def store_states(states, slot, first, state, key_sum, value_sum, extra_sum, TILE: tl.constexpr):
    BLOCK_D: tl.constexpr = TILE.block_d
    BLOCK_V: tl.constexpr = TILE.block_v
    SCORE_DIM: tl.constexpr = TILE.score_dim
    VALUE_DIM: tl.constexpr = TILE.value_dim
    pointers, inside = _state_pointers(states[0], slot, first, TILE)
    if TILE.phi_scores:
        state += TILE.eps * value_sum[None, :]
    tl.store(pointers, state, mask=inside)
    if TILE.key_sum:  # noqa: SIM102  (known when compiled; the other, when it runs)
        if first == 0:  # the other programs of this state have the same
            sums, inside_sum = _sum_pointers(states[1], slot, 0, SCORE_DIM, BLOCK_D)
            tl.store(sums, key_sum, mask=inside_sum)
    if TILE.extra:
        extras, inside_extra = _sum_pointers(states[2], slot, first, VALUE_DIM, BLOCK_V)
        tl.store(extras, extra_sum, mask=inside_extra)
