"""What is compiled, and how. To add a kernel: a file beside these, and its list in ENTRIES."""

from ..case import Case, Kernel
from . import (
    attention,
    decode,
    linear_attention,
    merge,
    permute,
    plain,
    rope,
    rope_append,
    rope_cos_sin,
    rope_norm,
    rope_norm_cuda,
)

ENTRIES = (
    *plain.KERNELS,
    *attention.KERNELS,
    *merge.KERNELS,
    *decode.KERNELS,
    *linear_attention.KERNELS,
    *rope.KERNELS,
    *rope_norm.KERNELS,
    *rope_append.KERNELS,
    *rope_cos_sin.KERNELS,
    *rope_norm_cuda.KERNELS,
    *permute.KERNELS,
)
KERNELS: dict[str, Kernel] = {kernel.name: kernel for kernel in ENTRIES}


def all_cases() -> list[Case]:
    """The sample first, then the usual type and head_dim."""
    first = set(sample())
    cases = [case for kernel in ENTRIES for case in kernel.cases]
    return sorted(
        cases,
        key=lambda case: (case not in first, case.dtype != "bfloat16", case.head_dim != 128),
    )


def sample() -> list[Case]:
    """What every run of the tests compiles."""
    return [case for kernel in ENTRIES for case in kernel.cases if kernel.sample(case)]
