"""The entries of the yardsticks, at the tiles that the attention kernels are shipped with."""

from __future__ import annotations

from ..case import CAPABILITIES, Case, Kernel, Source, Traffic, empty, itemsize
from . import attention
from .attention import HEADS_K, HEADS_Q, SEQLEN

COPIED = 2**26  # bytes
COPY_BLOCK = 8192  # bytes: 64 of each thread
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


def prepare_attention(case: Case) -> tuple[Source, Traffic]:
    from extrope_kernels.ops.attention.triton.configs import config

    from . import plain_kernels
    from .triton_compiler import Launch

    name, dim = case.kernel.split()[-1], case.head_dim
    setting = config(name, dim, itemsize(case.dtype), case.capability)
    q, k = (empty(heads * SEQLEN * dim, dtype=case.dtype) for heads in (HEADS_Q, HEADS_K))
    sums = empty(HEADS_Q * SEQLEN)
    args = {
        "forward": (q, k, k, q, sums),
        "dq": (q, k, k, q, sums, sums, empty(HEADS_Q * SEQLEN * dim)),
        "dkv": (q, k, k, q, sums, sums, empty(HEADS_K * SEQLEN * dim), k),
    }[name]
    own, heads = (setting.block_n, HEADS_K) if name == "dkv" else (setting.block_m, HEADS_Q)
    launch = Launch(
        getattr(plain_kernels, f"{name}_kernel"),
        (SEQLEN // own, heads),
        (*args, 0.1, HEADS_Q // HEADS_K, SEQLEN, setting.block_m, setting.block_n, dim),
        {
            "num_warps": setting.warps,
            "num_stages": setting.stages,
            "enable_fp_fusion": True,
        },
    )
    return launch, attention.traffic(case, setting.block_m, setting.block_n)


def prepare_copy(case: Case) -> tuple[Source, Traffic]:
    from .plain_kernels import copy_kernel
    from .triton_compiler import Launch

    size = COPY_BLOCK // itemsize(case.dtype)
    x = empty(COPIED // itemsize(case.dtype), dtype=case.dtype)
    launch = Launch(copy_kernel, (COPIED // COPY_BLOCK,), (x, x, size), OPTIONS)
    traffic = Traffic(
        bytes=2 * COPIED,
        blocks=COPIED // COPY_BLOCK,
        passes=(),
        loaded=COPY_BLOCK,
        stored=COPY_BLOCK,
    )
    return launch, traffic


def _attention_cases(name: str) -> list[Case]:
    kernel = f"plain attention {name}"
    return [
        Case(kernel, chip, dim, dtype)
        for dtype, dims in (("bfloat16", attention.HEAD_DIMS), ("float32", (128,)))
        for dim in dims
        for chip in CAPABILITIES
    ]


def _in_sample(case: Case) -> bool:
    usual = case.head_dim == 128 and case.dtype == "bfloat16"
    chip = {"forward": 90, "dq": 86, "dkv": 80}[case.kernel.split()[-1]]
    return usual and case.capability == chip


KERNELS = [
    Kernel(
        name="plain copy",
        cases=[Case("plain copy", chip, 128, "bfloat16") for chip in CAPABILITIES],
        prepare=prepare_copy,
        sample=lambda case: case.capability == 90,
    ),
    *(
        Kernel(
            name=f"plain attention {name}",
            cases=_attention_cases(name),
            prepare=prepare_attention,
            sample=_in_sample,
        )
        for name in attention.NAMES
    ),
]
