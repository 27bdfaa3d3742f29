"""The gallery has every method, and distances are those of the methods' formulas."""

import gallery
import pytest
import torch

from extrope_kernels import methods, scores

DISTANCE = torch.arange(gallery.TOKENS)[:, None] - torch.arange(gallery.TOKENS)
SEEN = DISTANCE >= 0


@pytest.mark.parametrize(
    ("registry", "examples"),
    [(methods.METHODS, gallery.FREQUENCIES), (scores.SCORES, gallery.SCORES)],
    ids=["methods", "scores"],
)
def test_every_method_has_an_example_and_a_picture(registry, examples):
    for name in registry:
        gallery.example(registry, examples, name)
        picture = gallery.DOCS / "gallery" / f"{name}.png"
        assert picture.exists(), f"run python bench/gallery.py: {picture.name} is missing"
    assert list(examples) == list(registry)


def test_the_page_is_that_of_the_registries():
    """Or run python bench/gallery.py."""
    assert (gallery.DOCS / "gallery.md").read_text() == gallery.page()


def test_distances_are_those_of_the_formulas():
    near = DISTANCE < 16
    i, j = torch.arange(gallery.TOKENS)[:, None], torch.arange(gallery.TOKENS)
    wanted = {
        "rerope": DISTANCE.clamp(max=16),
        "leaky_rerope": torch.where(near, DISTANCE, 16 + (DISTANCE - 16) / 8),
        "self_extend": torch.where(near, DISTANCE, i // 8 - j // 8 + 14),
        "string": torch.where(DISTANCE < 32, DISTANCE, DISTANCE - 32 + 4),
        "blockwise_causal": DISTANCE.where(j >= (i // 16 - 1) * 16, torch.nan),
    }
    for name, expected in wanted.items():
        found = gallery.distances(gallery.example(scores.SCORES, gallery.SCORES, name)).squeeze(-1)
        expected = expected.double().where(SEEN, torch.nan)
        torch.testing.assert_close(found, expected, equal_nan=True, msg=name)
