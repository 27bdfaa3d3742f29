"""Compile the shipped Triton kernels without a GPU, and bound their times: bench/gpu_audit.py

Public functions run on CPU tensors as on each chip (EXTROPE_TRITON_CHIP), down to a driver that
launches nothing and keeps the binaries. With nvcc it compiles CUDA C++'s rotation too. A full run
writes bench/results/gpu_audit.csv, of bounds, not measurements; docs/gpu_audit.md shows them, and
what --chip and --triton are for. Ends with status 1 if a kernel does not compile or has a fault.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import re
import subprocess
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

if __name__ == "__main__":  # Triton's decorator chooses between interpreter and compiler at once
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.setdefault("EXTROPE_TRITON_CHIP", "90")

import machine_code
import null_driver
import shapes
import torch
from machine_code import AMD_SHARED, CARDS, CHIPS, Code, Traffic
from null_driver import Launch, NullDriver
from shapes import BATCH, HEADS_K, HEADS_Q, KEYS, KEYS_WINDOW, PAGE_SIZE, SEQLEN
from torch import Tensor

import extrope_kernels as ek
from extrope_kernels import _build, methods, scores

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "bench" / "results" / "gpu_audit.csv"
TRITONS = ("3.6.0", "3.7.1", "3.8.0", "3.9.0")  # one for each supported torch
HEAD_DIMS = (128, 64, 256)
STACK = 16  # bytes that a thread may spill
# By Triton, kernel, variant, chip and head_dim: what an older one alone spills. ptxas keeps to 168
# registers there, for three blocks on an SM; with more, fewer fit.
SPILLS = {
    ("3.6.0", "decode", "ReRoPE, fp8", 90, 128): 80,
    ("3.6.0", "decode", "ReRoPE, fp8", 100, 128): 48,
    ("3.7.1", "decode", "ReRoPE, fp8", 100, 128): 48,
    ("3.8.0", "decode", "ReRoPE, fp8", 90, 128): 72,
    ("3.8.0", "decode", "ReRoPE, fp8", 100, 128): 40,
}
SCORES = {  # attention's regions of keys: one, two, three
    "no window": None,
    "ReRoPE": scores.rerope(shapes.WINDOW),
    "dual chunk": scores.dual_chunk(shapes.CHUNK, shapes.LOCAL),
}
CACHED = {
    "RoPE": None,
    "ReRoPE": scores.rerope(KEYS_WINDOW),
    "Leaky ReRoPE": scores.leaky_rerope(KEYS_WINDOW, 4.0),
}
CHUNK_TOKENS = 64


@dataclass(frozen=True)
class Case:
    """A call whose kernels are compiled."""

    variant: str
    head_dim: int
    call: Callable[[Case], object]
    score: scores.Score | None = None
    dtype: torch.dtype = torch.bfloat16

    def rows(self, heads: int, *shape: int) -> Tensor:
        """Make tensors whose memory is never touched."""
        return torch.empty(*(shape or (1, SEQLEN)), heads, self.head_dim, dtype=self.dtype)

    @property
    def freqs(self):
        return methods.rope(self.head_dim)


# -------------------------------------------------------------------------------------------------
# Calls


def rotate(case: Case) -> None:
    ek.apply_rope_qk(
        case.rows(HEADS_Q), case.rows(HEADS_K), case.freqs, backend="triton",
        interleaved=case.variant == "interleaved",
    )  # fmt: skip


def rotate_back(case: Case) -> None:
    """Rotate back with the gradient of the angles, which needs the forward's input."""
    q, k = case.rows(HEADS_Q), case.rows(HEADS_K)
    torch.ops.extrope.rope_bwd_triton(q, k, q, k, case.freqs.inv_freq)


def norm(case: Case) -> None:
    weights = [torch.empty(case.head_dim).requires_grad_() for _ in "qk"]
    qk = [case.rows(heads).requires_grad_() for heads in (HEADS_Q, HEADS_K)]
    out = ek.apply_rope_qk(
        *qk, case.freqs, q_norm_weight=weights[0], k_norm_weight=weights[1], backend="triton"
    )
    torch.autograd.grad(out, qk, [x.detach() for x in out])


def append(case: Case) -> None:
    batch, tokens = (BATCH, 1) if case.variant == "one token" else (1, SEQLEN)
    pages = batch * -(-2 * tokens // PAGE_SIZE)
    ek.rope_append_kvcache(
        *(case.rows(heads, batch, tokens) for heads in (HEADS_Q, HEADS_K, HEADS_K)),
        *(case.rows(HEADS_K, pages, PAGE_SIZE) for _ in "kv"), case.freqs,
        cache_seqlens=torch.zeros(batch, dtype=torch.int32),
        block_table=torch.zeros(batch, pages // batch, dtype=torch.int32),
        backend="triton",
    )  # fmt: skip


def attend(case: Case) -> None:
    leaves = [case.rows(heads).requires_grad_() for heads in (HEADS_Q, HEADS_K, HEADS_K)]
    out = ek.rope_attention(*leaves, case.freqs, case.score, backend="triton")
    torch.autograd.grad(out, leaves, out.detach())


def decode(case: Case) -> None:
    """Attend from two sequences over a paged cache, with the append of their new tokens."""
    tokens, pages = CHUNK_TOKENS if "chunk" in case.variant else 1, KEYS // PAGE_SIZE
    caches = [case.rows(HEADS_K, BATCH * pages, PAGE_SIZE) for _ in "kv"]
    scales = {}
    if "fp8" in case.variant:
        caches = [x.view(torch.int8)[..., : case.head_dim].contiguous() for x in caches]
        caches = [x.view(torch.float8_e4m3fn) for x in caches]
        scales = dict.fromkeys(("k_scale", "v_scale"), torch.ones(HEADS_K))
    q, k = (case.rows(heads, BATCH, tokens) for heads in (HEADS_Q, HEADS_K))
    ek.rope_attention_with_kvcache(
        q, *caches, case.freqs, case.score, k=k, v=k, backend="triton",
        cache_seqlens=torch.zeros(BATCH, dtype=torch.int32),
        block_table=torch.zeros(BATCH, pages, dtype=torch.int32), **scales,
    )  # fmt: skip


def merge(case: Case) -> None:
    from extrope_kernels.ops.attention.triton import merge as triton_merge

    outs, lses = [case.rows(HEADS_Q)] * 2, [torch.empty(1, HEADS_Q, SEQLEN)] * 2
    triton_merge.merge_fwd(outs, lses)


def cases(chip: int | str = 0) -> list[Case]:
    """List the cases: every row of configs.json for 16 bits; more at the usual head_dim."""
    cached = CACHED | dict.fromkeys(("ReRoPE, chunk", "ReRoPE, fp8"), CACHED["ReRoPE"])
    found = []
    for dim in HEAD_DIMS:
        found += [Case(words, dim, rotate) for words in ("half-split", "interleaved")]
        found.append(Case("with the angles' gradient", dim, rotate_back))
        found.append(Case("", dim, norm))
        found += [Case(words, dim, append) for words in ("chunk", "one token")]
        found += [Case(name, dim, attend, score) for name, score in SCORES.items()
                  if name != "dual chunk" or dim == 128]  # fmt: skip
        found += [Case(name, dim, decode, score) for name, score in cached.items()]
        found.append(Case("two sets", dim, merge))
    found.append(Case("ReRoPE, float32", 128, attend, SCORES["ReRoPE"], torch.float32))
    if isinstance(chip, str):  # where float32 has tiles for each head_dim
        found += [Case("RoPE, float32", dim, decode, None, torch.float32) for dim in HEAD_DIMS]
    return found


# -------------------------------------------------------------------------------------------------
# Work of a launch


def _rows(case: Case, heads: int, tokens: int = SEQLEN, itemsize: int = 0) -> int:
    """Return the bytes of the rows of `heads` heads."""
    return tokens * heads * case.head_dim * (itemsize or case.dtype.itemsize)


def rope_traffic(case: Case, launch: Launch) -> Traffic:
    """Count a rotation: a pass rotates one head in a tile of tokens; a gradient reads more."""
    tiles, shares = launch.grid[:2]
    heads, tokens, copies = [HEADS_Q, HEADS_K], SEQLEN, 2
    if case.call is rotate_back or launch.name == "norm_rotate_backward_kernel":
        copies = 3
    elif case.call is append:
        heads, tokens = [*heads, HEADS_K], BATCH if case.variant == "one token" else SEQLEN
    moved = copies * _rows(case, sum(heads), tokens)
    return Traffic(moved, tiles * shares, tuple(tiles * n for n in heads))


def attention_traffic(case: Case, launch: Launch) -> Traffic:
    """Count attention: each tile of own rows goes through all tiles of other rows that it sees."""
    name, size, tile = launch.name.removesuffix("_kernel"), case.dtype.itemsize, launch["BLOCKS"]
    score = case.score or scores.leaky_rerope(SEQLEN, 1.0)
    starts = tuple(region.start for region in score.regions)
    q_rows, k_rows = _rows(case, HEADS_Q), _rows(case, HEADS_K)
    per_row = 4 * SEQLEN * HEADS_Q  # lse, delta
    rotated = len(starts) * (q_rows + k_rows)
    wide_q, wide_k = (4 * len(starts) * rows // size for rows in (q_rows, k_rows))
    moved = {
        "forward": len(starts) * k_rows + k_rows + 2 * q_rows + per_row,
        "dq": rotated + k_rows + 2 * q_rows + 2 * per_row + wide_q,
        "dkv": rotated + k_rows + q_rows + k_rows + wide_k + 2 * per_row,
    }
    by_key = name == "dkv"
    own, other = (tile.block_n, tile.block_m) if by_key else (tile.block_m, tile.block_n)
    depth = {"forward": 2, "dq": 3, "dkv": 4}[name] * case.head_dim
    return Traffic(
        moved[name],
        -(-SEQLEN // own) * (HEADS_K if by_key else HEADS_Q),
        (HEADS_Q * tiles(starts, score.granularity, own, other, by_key),),
        2 * tile.block_m * tile.block_n * depth,
    )


@lru_cache
def tiles(starts: tuple[int, ...], granularity: int, own: int, other: int, by_key: bool) -> int:
    """Count the tiles of `other` rows that all tiles of `own` rows of one head go through."""

    def first_key(position: int, region: int) -> int:
        key = position + 1
        if region < len(starts):
            key = min(key, position // granularity * granularity + starts[region])
        return max(key, 0)

    found = 0
    for region in range(len(starts)):
        low, high = ([first_key(i, r) for i in range(SEQLEN)] for r in (region, region + 1))
        for first in range(0, SEQLEN, own):
            last = min(first + own, SEQLEN) - 1
            if by_key:  # the queries whose keys begin before the tile's last and end after it
                begin, end = bisect_right(high, first), bisect_right(low, last)
            else:
                begin, end = low[first], high[last]
            found += -(-max(end - begin, 0) // other)
    return found


def rotate_traffic(case: Case, launch: Launch) -> Traffic:
    """Count q and k once, and a copy for each region; gradients come from float32."""
    tile = launch["TILE"]
    maps = [(HEADS_K, len(tile.k_maps)), (HEADS_Q, len(tile.q_maps))]
    raw = _rows(case, sum(heads for heads, count in maps if count))
    itemsize = 4 if launch["BACKWARD"] else case.dtype.itemsize
    copies = _rows(case, sum(heads * count for heads, count in maps), itemsize=itemsize)
    each = -(-SEQLEN // tile.tokens)
    passes = tuple(each * sum(h * n for h, n in maps) for _, count in maps if count)
    return Traffic(raw + copies, math.prod(launch.grid), passes)


def decode_traffic(case: Case, launch: Launch) -> Traffic:
    """Count the cache once, and float32 results of programs that share a sequence."""
    tokens = CHUNK_TOKENS if "chunk" in case.variant else 1
    model, size = launch["MODEL"], launch["BLOCKS"]
    score = case.score or scores.leaky_rerope(KEYS_WINDOW, 1.0)
    block = (KEYS - 1) // score.granularity * score.granularity
    bounds = [max(0, block + region.start) for region in score.regions] + [KEYS]
    keys = [end - begin for begin, end in pairwise(bounds)]  # seen by the last query, by region
    cached = 1 if "fp8" in case.variant else case.dtype.itemsize
    moved = 2 * _rows(case, HEADS_K, BATCH * KEYS, cached)
    moved += 2 * _rows(case, HEADS_Q, BATCH * tokens)
    row_blocks = -(-tokens * HEADS_Q // HEADS_K // size.block_m)
    each = BATCH * HEADS_K * row_blocks / size.block_n
    # The shortest loop first: one that rotates no key.
    by_length = sorted(zip(model.rotates_keys, keys), key=lambda region: region[0])
    passes = [count * each for _, count in by_length]
    if size.splits:
        blocks, items = -(-KEYS // size.block_n), max(launch["num_items"] - BATCH, 1)
        splits = -(-blocks // max(-(-BATCH * blocks // items), launch["least_blocks"]))
        splits = splits if splits > 1 else 0
        moved += 2 * splits * _rows(case, HEADS_Q, BATCH * tokens, 4)
        # The loop that merges is shorter still.
        passes.insert(0, -(-splits // size.merge_splits) * BATCH * HEADS_K * row_blocks)
    operations = 2 * size.block_m * size.block_n * 2 * case.head_dim
    return Traffic(moved, math.prod(launch.grid), tuple(passes), operations)


def cache_append_traffic(case: Case, launch: Launch) -> Traffic:
    tokens = CHUNK_TOKENS if "chunk" in case.variant else 1
    cached = 1 if "fp8" in case.variant else case.dtype.itemsize
    moved = 2 * BATCH * tokens * HEADS_K * case.head_dim * (cached + case.dtype.itemsize)
    return Traffic(moved, math.prod(launch.grid))


def merge_traffic(case: Case, launch: Launch) -> Traffic:
    return Traffic(3 * _rows(case, HEADS_Q) + 3 * 4 * SEQLEN * HEADS_Q, math.prod(launch.grid[:2]))


TRAFFIC: dict[str, tuple[str, Callable[[Case, Launch], Traffic]]] = {
    "rope rotate_kernel": ("rotation", rope_traffic),
    "norm_rotate_kernel": ("norm and rotation", rope_traffic),
    "norm_rotate_backward_kernel": ("norm and rotation", rope_traffic),
    "rope_append_kernel": ("rotation and append", rope_traffic),
    "rotate_kernel": ("attention's rotation", rotate_traffic),
    "forward_kernel": ("attention", attention_traffic),
    "dq_kernel": ("attention, dQ", attention_traffic),
    "dkv_kernel": ("attention, dK and dV", attention_traffic),
    "decode_kernel": ("decode", decode_traffic),
    "decode's append": ("decode's append", cache_append_traffic),
    "merge_kernel": ("merge", merge_traffic),
}


# -------------------------------------------------------------------------------------------------
# Compile


@dataclass
class AmdRow:
    """A kernel on an AMD chip; the driver refuses one that takes too much shared memory."""

    kernel: str
    variant: str
    chip: int | str
    head_dim: int
    registers: int
    stack: int
    shared: int

    def __str__(self) -> str:
        return "  ".join(map(str, asdict(self).values()))

    def fault(self) -> str:
        return ""  # these tiles were never tuned: stack is shown, not forbidden


@dataclass
class Row(AmdRow):
    warps_of_sm: int
    widest_load: int
    widest_store: int
    products: int  # of the shortest main loop
    special: int
    instructions: int
    memory_us: float
    tensor_us: float
    special_us: float
    issue_us: float
    bound_us: float
    bound_by: str

    def __str__(self) -> str:
        values = list(asdict(self).values())
        return "  ".join(map(str, [*values[:13], self.bound_us, self.bound_by, self.fault()]))

    def fault(self) -> str:
        case = version("triton"), self.kernel, self.variant, self.chip, self.head_dim
        most = SPILLS.get(case, STACK)
        if self.stack > most:
            return f"{self.stack} bytes of stack, {most} are allowed"
        if self.warps_of_sm == 0 or self.shared > CHIPS[self.chip].block_shared:
            return "no block fits an SM"
        narrow = min(self.widest_load, self.widest_store) < machine_code.WIDE
        if narrow and "append" not in self.kernel:
            return "rows move by less than 16 bytes a thread"
        return ""


def row_of(kernel: str, case: Case, variant: str, code: Code, traffic: Traffic, chip: int) -> Row:
    seconds = machine_code.seconds(code, traffic, CARDS[chip])
    times = {key: x * 1e6 for key, x in seconds.items()}
    loop = code.loops[0] if code.loops else code.around
    most = max(times, key=times.__getitem__)
    return Row(
        kernel, variant, chip, case.head_dim, code.registers, code.stack, code.shared,
        code.resident(CHIPS[chip]) * code.warps, max(code.loads, default=0),
        max(code.stores, default=0), loop.products, loop.special, loop.instructions,
        *(float(f"{x:.3g}") for x in times.values()), float(f"{times[most]:.3g}"), most,
    )  # fmt: skip


def prepare(chip: int | str, cache: str) -> None:
    """Let a worker compile for one chip."""
    os.environ.update(EXTROPE_TRITON_CHIP=str(chip), TRITON_CACHE_DIR=cache)
    torch.set_num_threads(1)


@lru_cache
def one_driver() -> NullDriver:
    """Install a worker's driver: a kernel that two cases share is launched through its first."""
    return null_driver.install(keep=True)


def compiled(chip: int | str, case: Case) -> list[Row | AmdRow] | str:
    """Return the rows of a case's kernels, or its compiler's error."""
    driver = one_driver()
    driver.kept.clear()
    try:
        case.call(case)
    except Exception as error:  # of any kind: the other cases must still be compiled
        return f"{chip} {case.call.__name__} {case.variant} D{case.head_dim}: {error}"
    found: dict[tuple[str, str], Row | AmdRow] = {}
    for launch in driver.kept:
        key = launch.name
        if key == "rotate_kernel" and ".ops.rope." in launch.module:  # attention has one too
            key = "rope rotate_kernel"
        elif key == "rope_append_kernel" and case.call is decode:
            key = "decode's append"
        kernel, traffic = TRAFFIC[key]
        variant = case.variant
        if key == "rotate_kernel":
            of_keys = not launch["TILE"].q_maps
            variant += " inverse" if launch["BACKWARD"] else " keys" if of_keys else ""
        elif kernel == "norm and rotation":
            variant = "backward" if "backward" in key else "forward"
        if isinstance(chip, str):
            used = *machine_code.amd_resources(launch.cubin), launch.shared
            found[kernel, variant] = AmdRow(kernel, variant, chip, case.head_dim, *used)
            continue
        used = {x: getattr(launch, x) for x in ("warps", "shared", "tensor_memory")}
        code = machine_code.read(launch.cubin, null_driver.TOOLS, **used)
        found[kernel, variant] = row_of(kernel, case, variant, code, traffic(case, launch), chip)
    return list(found.values())


# -------------------------------------------------------------------------------------------------
# CUDA C++

BLOCK, UNROLLED = 128, 4  # threads, heads
HALF_SPLIT = re.compile(r"rope_kernelI13__nv_bfloat16Li8ELb0ELb0ELb0EEE")
STRICT = ("-Werror=all-warnings", "-Xptxas=-warn-spills")


def cuda_rows() -> Iterator[Row]:
    """Compile the rotation in CUDA C++; BuildError if nvcc is missing or warns, or on a spill."""
    nvcc, source = _build.find_nvcc(), _build.source_dir() / "cuda" / "rope" / "rope.cu"
    with TemporaryDirectory() as folder:
        target = Path(folder) / "rope.o"
        chips = _build.gencode([str(chip) for chip in CHIPS])
        command = [nvcc, *_build.NVCC_FLAGS, *STRICT, chips, *_build.include(), "-c", str(source)]
        done = subprocess.run([*command, "-o", str(target)], capture_output=True, text=True)
        if done.returncode != 0:
            raise _build.BuildError(done.stdout + done.stderr)
        usage, sass = (_functions(x, target) for x in ("--dump-resource-usage", "-sass"))
    case, tokens = Case("half-split, CUDA C++", 128, rotate), BLOCK * 2 * 16 // 256  # of a block
    blocks = SEQLEN // tokens
    # Two loops copy; the third rotates, UNROLLED heads a pass.
    passes = (0, 0, blocks * (HEADS_Q + HEADS_K) / UNROLLED)
    traffic = Traffic(2 * _rows(case, HEADS_Q + HEADS_K), blocks, passes)
    for (chip, symbol), text in usage.items():
        if chip in CARDS and HALF_SPLIT.search(symbol):
            code = machine_code.code_of(text, sass[chip, symbol], warps=BLOCK // 32)
            yield row_of("rotation", case, case.variant, code, traffic, chip)


def _functions(option: str, target: Path) -> dict[tuple[int, str], str]:
    """Yield cuobjdump's text by chip and kernel."""
    sections: dict[tuple[int, str], list[str]] = {}
    chip, lines = 0, []
    for line in machine_code.run(null_driver.TOOLS / "cuobjdump", option, target).splitlines():
        if found := re.match(r"arch = sm_(\d+)", line):
            chip, lines = int(found[1]), []
        elif found := re.search(r"Function\s*:?\s*(\w+)", line):
            lines = sections.setdefault((chip, found[1]), [])
        else:
            lines.append(line)
    return {key: "\n".join(lines) for key, lines in sections.items()}


# -------------------------------------------------------------------------------------------------
# The run


def run(chips: list[int | str], only: str) -> tuple[list[Row | AmdRow], list[str]]:
    """Return all rows, and the cases that did not compile."""
    rows, failed = [], []
    for chip in chips:
        names = {f"{x.call.__name__} {x.variant} {x.head_dim}": x for x in cases(chip)}
        wanted = [case for name, case in names.items() if re.search(only, name)]
        with (
            TemporaryDirectory() as cache,  # else it would fill the user's cache
            ProcessPoolExecutor(initializer=prepare, initargs=(chip, cache)) as pool,
        ):
            for found in pool.map(partial(compiled, chip), wanted):
                if isinstance(found, str):
                    failed.append(found)
                    print(found, flush=True)
                else:
                    rows += found
                    print(*found, sep="\n", flush=True)
    return rows, failed


def with_triton(version: str) -> int:
    """Run this script with another Triton, from its own folder."""
    folder = ROOT / "build" / f"triton-{version}"
    if not folder.exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
        subprocess.run([*pip, str(folder), f"triton=={version}"], check=True)
    path = os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")])
    kept = [x for x in sys.argv[1:] if x not in ("--triton", version, f"--triton={version}")]
    command = [sys.executable, __file__, *kept, "--keep-no-results"]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}).returncode


def main() -> int:
    known: list[str] = [*map(str, CARDS), *AMD_SHARED]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chip", action="append", choices=known, help="only this; AMD's too")
    parser.add_argument("--only", default="", metavar="PATTERN", help="of calls and variants")
    parser.add_argument("--triton", choices=TRITONS, help="compile with this Triton")
    parser.add_argument("--keep-no-results", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.triton:
        return with_triton(asked.triton)
    chips = [int(x) if x.isdigit() else x for x in asked.chip or map(str, CARDS)]
    rows, failed = run(chips, asked.only)
    if not asked.only and any(isinstance(chip, int) for chip in chips):
        try:
            rows += [row for row in cuda_rows() if row.chip in chips]
        except _build.BuildError as error:
            print(f"CUDA C++: {error}")
    faults = [row for row in rows if row.fault()]
    print(f"{len(rows)} kernels compiled, none run; {len(faults)} faulty; {len(failed)} failed")
    if not (asked.only or asked.chip or asked.keep_no_results or failed):
        rows.sort(key=lambda row: (row.head_dim != 128, row.head_dim))
        with RESULT.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(asdict(rows[0])), lineterminator="\n")
            writer.writeheader()
            writer.writerows(map(asdict, rows))
    return int(bool(failed or faults))


if __name__ == "__main__":
    sys.exit(main())
