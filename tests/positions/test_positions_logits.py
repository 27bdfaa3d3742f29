"""What positions do to attention under a rotation whose logits depend on the distance alone."""

import pytest
import torch
from position_checks import seeded
from torch.nn.functional import scaled_dot_product_attention

from extrope_kernels import apply_rope_qk, methods, positions

RELATIVE = {
    "rope": methods.rope(16),
    "pi": methods.pi(16, factor=4),
    "ntk_aware": methods.ntk_aware(16, factor=4),
    "yarn": methods.yarn(16, factor=4, original_max_position_embeddings=64),
    "llama3": methods.llama3(16, factor=8, original_max_position_embeddings=64),
    "xpos": methods.xpos(16),
}
each_rotation = pytest.mark.parametrize("freqs", RELATIVE.values(), ids=RELATIVE)


def normal(*sizes):
    generator = seeded(3)
    return [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]


def rounding(q, k, largest):
    """What rounding alone may change in a logit of rotated q and k, at positions up to `largest`.

    Angle and rotation each round; the angle's error grows with the position.
    """
    norms = q.norm(dim=-1).max() * k.norm(dim=-1).max()
    return (8 * torch.finfo(torch.float64).eps * largest * norms).item()


def logits(freqs, places=None):
    """q.k at the given positions, (3, 2, 16, 16), and what rounding alone may change."""
    q, k = apply_rope_qk(*normal((3, 16, 2, 16), (3, 16, 2, 16)), freqs, positions=places)
    largest = 16 if places is None else places.max().item()
    return torch.einsum("bihd,bjhd->bhij", q, k), rounding(q, k, largest)


@each_rotation
@pytest.mark.parametrize(
    "places",
    [
        positions.shape(3, 16, 100, generator=seeded()),
        positions.random_padding(3, 16, 100, generator=seeded())[0][:, :16],
    ],
    ids=["shape", "random_padding"],
)
def test_moving_together_changes_no_logit(places, freqs):
    assert places[:, 0].min() > 0
    plain, _ = logits(freqs)
    moved, allowed = logits(freqs, places)
    assert (moved - plain).abs().max() <= allowed


@each_rotation
@pytest.mark.parametrize(
    "places",
    [
        positions.randomized(16, 100, generator=seeded()),
        positions.randomized(16, 100, batch=3, generator=seeded()),
        positions.pose(3, 200, 16, 100, generator=seeded())[0],
        positions.giraffe_randomized(3, 16, generator=seeded()),
        positions.random_padding(3, 16, 100, num_fixed_prefix=2, generator=seeded())[0][:, :16],
    ],
    ids=["randomized", "randomized_per_sequence", "pose", "giraffe", "random_padding_prefix"],
)
def test_other_distances_change_logits(places, freqs):
    plain, _ = logits(freqs)
    moved, allowed = logits(freqs, places)
    changed = (moved - plain).abs().amax(dim=(1, 2, 3))
    assert (changed > 1e6 * allowed).all()


@each_rotation
def test_masked_padding_changes_no_output(freqs):
    """A padded batch laid out anew gives every token the attention output that it had."""
    tokens = [16, 5, 11]
    inputs = normal(*[(3, 24, 2, 16)] * 3)
    outputs = []
    for training in (False, True):
        places, mask = positions.random_padding(
            3, tokens, 24, training=training, generator=seeded(1)
        )
        index = places[..., None, None].expand_as(inputs[0])
        q, k, v = (torch.empty_like(x).scatter_(1, index, x) for x in inputs)
        q, k = apply_rope_qk(q, k, freqs)
        visible = mask[:, None, None, :] & torch.ones(24, 24, dtype=torch.bool).tril()
        out = scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=visible
        )
        outputs.append(out.transpose(1, 2).gather(1, index))
        assert training == bool((places[:, 0] > 0).any())
    # A change of all logits by d changes every weight by a factor of exp(2 d) at most.
    allowed = 2 * rounding(q, k, 24) * inputs[2].abs().max().item()
    for row, n in enumerate(tokens):
        assert (outputs[0][row, :n] - outputs[1][row, :n]).abs().max() <= allowed
