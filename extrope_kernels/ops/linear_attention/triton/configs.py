"""Chunks, value dims, warps and pipeline stages per chip, dimensions and width of the elements."""

from typing import NamedTuple


class Config(NamedTuple):
    """What the kernels of one scan are launched with."""

    chunk: int  # tokens
    chunks: int  # of a part
    block_v: int  # of the value dim, at most, in one program
    warps: int
    stages: int


MAX_CHUNK = 64  # tokens
INTERPRETED = Config(16, 3, 32, 1, 1)


def config(
    dim: int, value_dim: int, itemsize: int, capability: int | str | None, phi_scores: bool
) -> Config:
    """The setting for heads of `dim` and `value_dim`; capability as of `chip_of`, phi_scores as of
    `Scan`: not in the gradients of q and k.

    bench/results/triton_versions.json tells what each Triton spills.
    """
    if capability is None:
        return INTERPRETED
    if isinstance(capability, str):
        raise NotImplementedError(f"linear_attn: Triton's kernels have no tiles for {capability}")
    if itemsize == 4:
        # Products are at least 16 deep with Triton 3.6 and 3.7, so chunks of 16 tokens.
        return Config(16, 64, 64 if dim <= 64 else 32, 8, 1)
    if dim <= 64 and 100 <= capability < 120:
        # Tensor cores with a memory for their sums leave registers for more tokens.
        return Config(64, 16, 64, 8, 1)
    # The wider the fewer: all blocks of a head load its q and k, and weigh them. Where a warp alone
    # makes products it holds all of q, which a group of warps shares.
    groups = 90 <= capability < 120
    if dim > 128:
        return Config(16, 64, 32, 4 if groups and not phi_scores else 8, 1)
    if groups or dim <= 64:
        return Config(16, 64, 64, 4, 1)
    return Config(16, 64, 64, 8, 1) if phi_scores else Config(16, 64, 32, 4, 1)
