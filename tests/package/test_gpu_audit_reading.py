"""What bench/gpu_audit.py reads out of machine code, and what follows from that for a chip."""

from __future__ import annotations

from dataclasses import replace

import pytest
from audit import sass
from audit.case import Binary, Traffic
from audit.chips import CARDS, CHIPS
from audit.reading import Code, Stretch
from audit.row import row as derive


@pytest.mark.parametrize(("products", "rate"), [(16, 1.0), (128, CARDS[90].of_a_warp)])
def test_products_of_single_warps_have_a_rate_of_their_own(products, rate):
    """A tile of 128 x 64 keys at head_dim 128 on H100, by 8 warps: wgmma, or mma.sync."""
    operations, passes = 2 * 2 * 128 * 64 * 128, 1000
    stretch = Stretch(instructions=1, products=products, special=0, wide=0)
    code = Code(
        *("attention forward", 90, 128, "bfloat16", "R2"),
        **{"registers": 1, "stack": 0, "shared": 0, "warps": 8, "tensor_memory": 0},
        **{"loads": {}, "stores": {}, "outside": stretch, "around": stretch, "loops": (stretch,)},
        **{"digest": "", "made_from": ""},
    )
    traffic = Traffic(0, 1, (passes,), loaded=0, stored=0, operations=operations)
    seconds = derive(code, traffic).seconds["tensor"]
    assert seconds == pytest.approx(passes * operations / (CARDS[90].tensor * rate))


def test_what_lies_around_a_loop_is_counted():
    code = ["MOV", "HMMA", "MUFU", "LDG.E.128", "BRA 0x20", "MUFU", "BRA 0x10", "EXIT", "BRA 0x80"]
    listing = "\n".join(f"/*{16 * i:04x}*/ {line} ;" for i, line in enumerate(code))
    (inner,), around = sass.loops(listing)
    assert (inner.instructions, inner.special, inner.loads) == (3, 1, {16: 1})
    assert (around.instructions, around.products, around.special) == (3, 1, 1)
    assert sass.whole(listing).instructions == 9


@pytest.mark.parametrize(
    ("change", "blocks"),
    [
        ({}, 8),  # by warps
        ({"registers": 100}, 2),  # of 104 a thread
        ({"shared": 100 * 1024}, 2),
        ({"tensor_memory": 512}, 1),
    ],
)
def test_residence(change, blocks):
    binary = Binary(registers=32, stack=0, local=0, shared=0, warps=8, sass="")
    assert CHIPS[100].residence(replace(binary, **change)) == blocks
