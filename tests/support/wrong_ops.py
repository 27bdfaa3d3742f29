"""Every op of torch.ops.extrope called bare, with one argument changed.

The result is an exception before anything is written, or the right result: what the reference gives
for clean copies of the arguments. No byte is written outside of an output or a cache. All memory
that a call is given or allocates lies between pages that may not be touched (`guard_pages`), so
that a read or a write too far ends the process.

In tests/ `python -m support.wrong_ops FIRST LAST` goes through these cases of one shuffled list. It
prints each case's number before it runs it, and what was wrong with it.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import random
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
from support.guard_pages import Guarded, bytes_between_pages, cpu_kernel, use_again
from support.operations import FORMS
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from extrope_kernels.ops.attention import merge
from extrope_kernels.ops.attention import op as attention
from extrope_kernels.ops.cache import reference as append
from extrope_kernels.ops.decode import op as decode
from extrope_kernels.ops.permuteformer import op as permuteformer
from extrope_kernels.ops.rope import norm, reference

OPS = torch.ops.extrope
# On clean copies these give the right result; ops that are not here are run on them themselves.
REFERENCES = {
    "attention_fwd": attention.KERNELS["attention_fwd"]["reference"],
    "attention_bwd": attention.KERNELS["attention_bwd"]["reference"],
    "decode": decode.KERNELS["reference"],
    "rope_fwd": reference.rope_fwd,
    "rope_bwd": reference.rope_bwd,
    "rope_inplace": reference.rope_inplace,
    "rope_norm_fwd": norm.rope_norm_fwd,
    "rope_norm_bwd": norm.rope_norm_bwd,
    "rope_norm_inplace": norm.rope_norm_inplace,
    "rope_append": append.rope_append,
    "permute_fwd": permuteformer._permute_by_gather,
    "merge_fwd": merge.merge_fwd,
    "merge_inplace": merge.merge_inplace,
}
ALL = {
    name.removeprefix("extrope::")
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("extrope::")
}
# Arguments that may be any number.
COUNTS = (
    "granularity",
    "region_starts",
    "sliding_window",
    "map_divisors",
    "map_caps",
    "map_moduli",
)
# Of the largest number of a result, what rounding may change: of float32, and of a call in 16 bits.
WIDE, NARROW = 1e-3, 0.03
# Without arguments, or run by tests with flash-attn or stubs of it; all share Triton's checks.
NOT_CALLED = {"cpu_capability", "attention_fwd_flash_attn", "attention_bwd_flash_attn"}


# -------------------------------------------------------------------------------------------------
# Right calls: what the public functions call


@dataclass(frozen=True)
class Call:
    op: str
    given: dict[str, Any]  # by the schema's names; those with their defaults may be missing

    @property
    def schema(self) -> torch._C.FunctionSchema:
        return getattr(OPS, self.op).default._schema

    def run(self, function: Callable[..., Any], given: dict[str, Any]) -> Any:
        """Call the op, or a reference of it, by position where the schema allows it."""
        arguments = self.schema.arguments
        args = [given.get(x.name, x.default_value) for x in arguments if not x.kwarg_only]
        options = {x.name: given[x.name] for x in arguments if x.kwarg_only and x.name in given}
        return function(*args, **options)

    @property
    def layout(self) -> str:
        """What tells calls apart: all but the values of tensors."""
        of = lambda x: (x.shape, x.stride(), x.dtype)  # noqa: E731
        return f"{self.op} {tree_map_only(Tensor, of, self.given)}"

    @property
    def written(self) -> list[str]:
        return [x.name for x in self.schema.arguments if x.alias_info and x.alias_info.is_write]


class Recorder(TorchDispatchMode):
    """Keeps the ops of this package that are called, and those that these call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "extrope":
            return func(*args, **(kwargs or {}))
        names = [x.name for x in func._schema.arguments]
        given = tree_map_only(Tensor, Tensor.clone, dict(zip(names, args)) | (kwargs or {}))
        self.calls.append(Call(func._schema.name.removeprefix("extrope::"), given))
        with self:
            return cpu_kernel(func, args, kwargs)


@functools.cache
def right_calls() -> list[Call]:
    """The calls that the rows of `operations` make of every op, and the same of Triton's."""
    recorder = Recorder()
    for name, dtype in (*((x, torch.float32) for x in FORMS), ("leaky_rerope", torch.bfloat16)):
        given = FORMS[name].tensors(0, dtype)
        with recorder:
            FORMS[name](None, **given)
    outs, lses = FORMS["merge"].tensors(0, torch.float32).values()
    others = {"outs": [*outs[1:]], "lses": [*lses[1:]]}
    recorder.calls += [
        Call("merge_fwd", others),
        Call("merge_inplace", {"out": outs[0], "lse": lses[0], **others}),
    ]
    unlike = {
        x.layout: Call(x.op, tree_map_only(Tensor, Tensor.detach, x.given)) for x in recorder.calls
    }
    of_triton = [Call(f"{x.op}_triton", x.given) for x in unlike.values()]
    return [*unlike.values(), *(x for x in of_triton if x.op in ALL)]


# -------------------------------------------------------------------------------------------------
# What arguments are changed to

INTS = (-1, 0, 1, 2, 3, 7, 2**31, 2**62, 2**63 - 1, -(2**63))
FLOATS = (0.0, -1.0, 2.5, 1e-46, 1e30, 1e39, 1e300, math.inf, -math.inf, math.nan)
DTYPES = (
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.int32,
    torch.int64, torch.bool, torch.complex64,
)  # fmt: skip


def changes(kind: str, x: Any, others: list[Tensor]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Name and make what the argument x of a schema's type may be changed to."""
    optional, kind = kind.startswith("Optional"), kind.removeprefix("Optional[")
    if isinstance(x, Tensor):
        yield from of_tensor(x, others)
    elif isinstance(x, list) or kind.startswith("List"):
        x = [] if x is None else x
        yield from of_list(kind, x, others)
    elif "Tensor" in kind:
        yield from ((f"tensor {n}", lambda y=y: y.clone()) for n, y in enumerate(others))
    elif kind.startswith("bool"):
        yield "not", lambda: not x
    else:
        for value in FLOATS if kind.startswith("float") else INTS:
            yield str(value), lambda value=value: value
    if x is not None and (isinstance(x, Tensor) or optional):
        yield "None", lambda: None


def of_list(kind: str, x: list, others: list[Tensor]) -> Iterator[tuple[str, Callable[[], Any]]]:
    inner = kind.removeprefix("List[").rstrip("]")
    one = x[0] if x else {"bool": True, "float": 1.0}.get(inner, 1)
    yield "one more", lambda: [*x, one]
    yield "ones", lambda: [one] * 3
    if not x:
        return
    yield "one fewer", lambda: x[:-1]
    yield "none", lambda: []
    yield "backwards", lambda: x[::-1]
    for n, entry in enumerate(x):
        for name, make in changes(inner, entry, others):
            yield f"[{n}] {name}", lambda n=n, make=make: [*x[:n], make(), *x[n + 1 :]]


def of_tensor(x: Tensor, others: list[Tensor]) -> Iterator[tuple[str, Callable[[], Any]]]:
    for dtype in DTYPES:
        if dtype != x.dtype:
            yield str(dtype), lambda dtype=dtype: x.to(dtype)
    yield "meta", lambda: x.to("meta")
    yield "sparse", lambda: x.to_sparse()
    yield "scalar", lambda: x.flatten()[:1].sum().to(x.dtype)
    yield "flat", lambda: x.flatten()
    yield "one more dimension", lambda: x[None]
    yield "no first dimension", lambda: x[0].clone()
    for dim, size in enumerate(x.shape):
        yield f"none of {dim}", lambda dim=dim: x.narrow(dim, 0, 0).clone()
        yield f"first of {dim}", lambda dim=dim: x.narrow(dim, 0, 1).clone()
        yield f"twice {dim}", lambda dim=dim: torch.cat((x, x), dim)
        # Memory does not go on where a kernel reads on.
        yield f"one more of {dim}", lambda dim=dim: torch.cat((x, x.narrow(dim, 0, 1)), dim)
        yield f"expanded {dim}", lambda dim=dim: x.narrow(dim, 0, 1).clone().expand_as(x)
        if size > 1:
            yield f"one fewer of {dim}", lambda dim=dim, n=size: x.narrow(dim, 0, n - 1).clone()
            yield f"view of {dim}", lambda dim=dim, n=size: x.narrow(dim, 1, n - 1)
            yield f"every second of {dim}", lambda dim=dim: every_second(x, dim)
    for i, j in itertools.combinations(range(x.dim()), 2):
        yield f"{i} and {j} swapped", lambda i=i, j=j: x.transpose(i, j)
        yield f"{i} first, {j} in memory", lambda i=i, j=j: laid_out(x, i, j)
    yield "overlapping", lambda: overlapping(x)
    yield "negative view", lambda: torch._neg_view(x)
    yield "gaps", lambda: with_gaps(x)
    for n, y in enumerate(others):
        if y.dtype == x.dtype:
            yield f"the tensor {n}", lambda y=y: y
            if y.shape == x.shape:
                yield f"a view of tensor {n}", lambda y=y: y[:]
    values: tuple = ()
    if x.is_floating_point() and x.numel() and x.dtype.itemsize > 1:
        values = (0.0, -1.0, math.inf, math.nan, 1e30 if x.dtype.itemsize > 2 else 6e4)
    elif x.numel() and not x.is_floating_point() and x.dtype != torch.bool:
        values = (-1, 0, 1, 5, 2**20, 2**31 - 1, -(2**31))
    for value in values:
        for at in (0, x.numel() - 1):
            yield f"{value} at {at}", lambda value=value, at=at: with_value(x, at, value)
    if values:
        yield "backwards", lambda: x.flip(0)


def every_second(x: Tensor, dim: int) -> Tensor:
    """The same values with a gap after each along a dimension."""
    return torch.stack((x, x), dim + 1).select(dim + 1, 0)


def laid_out(x: Tensor, i: int, j: int) -> Tensor:
    return x.transpose(i, j).contiguous().transpose(i, j)


def overlapping(x: Tensor) -> Tensor:
    """x's shape, each row one element after the one before."""
    strides = [1] * max(x.dim(), 1)
    return x.clone().as_strided(x.shape, strides[: x.dim()])


def with_gaps(x: Tensor) -> Tensor:
    around = x.new_zeros([n + 2 for n in x.shape])
    view = around
    for dim, n in enumerate(x.shape):
        view = view.narrow(dim, 1, n)
    return view.copy_(x)


def with_value(x: Tensor, at: int, value: float) -> Tensor:
    changed = x.clone()
    changed.view(-1)[at] = value
    return changed


@dataclass(frozen=True)
class Case:
    call: Call
    argument: str
    change: str
    make: Callable[[], Any]

    def __str__(self) -> str:
        return f"{self.call.op}: {self.argument} {self.change}"

    @property
    def is_past_numbers(self) -> bool:
        """Whether no result is right: angles from 2**29 on, logits past float32."""
        number = re.search(r"-?(inf|nan|\d[\d.e+-]*)$", self.change.split(" at ")[0])
        if number is None or self.argument in COUNTS:
            return False
        return not abs(float(number[0])) < 2**29


@functools.cache
def cases() -> list[Case]:
    """All cases in a shuffled order in which ops take turns."""
    by_op: dict[str, list[Case]] = defaultdict(list)
    for call in right_calls():
        others = [x for x in tree_leaves(call.given) if isinstance(x, Tensor)]
        for argument in call.schema.arguments:
            name, kind = argument.name, str(argument.type)
            x = call.given.get(name, argument.default_value)
            of_kind = [y for y in others if y is not x]
            for change, make in changes(kind, x, of_kind):
                by_op[call.op].append(Case(call, name, change, make))
    for each in by_op.values():
        random.Random(0).shuffle(each)
    turns = itertools.zip_longest(*(by_op[op] for op in sorted(by_op)))
    return [case for turn in turns for case in turn if case is not None]


# -------------------------------------------------------------------------------------------------
# A case and its result


class Memory:
    """Arguments whose memory lies between pages that may not be touched, and a copy of it."""

    def __init__(self, given: dict[str, Any], behind: bool) -> None:
        self.behind = behind
        self.storages: dict[int, tuple[Tensor, Tensor]] = {}  # now, and before the call
        self.arguments = tree_map_only(Tensor, self._own, given)

    def _own(self, x: Tensor) -> Tensor:
        """x in its storage's copy: tensors that share memory still do."""
        if x.device.type != "cpu" or x.layout != torch.strided:
            return x
        storage = x.untyped_storage()
        if storage.data_ptr() not in self.storages:
            old = torch.tensor([], dtype=torch.uint8).set_(storage)
            self.storages[storage.data_ptr()] = old, bytes_between_pages(len(old), self.behind)
            self.storages[storage.data_ptr()][1].copy_(old)
        at = self.storages[storage.data_ptr()][1].untyped_storage()
        own = torch.tensor([], dtype=x.dtype)
        own.set_(at, x.storage_offset(), x.shape, x.stride())
        return torch._neg_view(own) if x.is_neg() else own

    def changed(self, written: Sequence[Tensor]) -> str | None:
        """Say that a byte outside of these tensors is another than before."""
        for old, new in self.storages.values():
            outside = torch.ones(len(new), dtype=torch.bool)
            for x in written:
                if x.untyped_storage().data_ptr() == new.data_ptr() and x.numel():
                    sizes, strides = (
                        (*x.shape, x.itemsize),
                        (*(n * x.itemsize for n in x.stride()), 1),
                    )
                    first = x.storage_offset() * x.itemsize
                    outside.as_strided(sizes, strides, first).fill_(False)
            if not torch.equal(old[outside], new[outside]):
                return "wrote outside of its outputs" if written else "wrote"
        return None


def problem(case: Case, behind: bool) -> str | None:
    """Run a case; say what is wrong with the result, or None."""
    try:
        given = case.call.given | {case.argument: case.make()}
    except (RuntimeError, IndexError):  # no such change of this tensor
        return None
    memory = Memory(given, behind)
    guarded, op = memory.arguments, getattr(OPS, case.call.op).default
    try:
        with Guarded(behind):
            found = case.call.run(op, guarded)
    except Exception as error:
        if changed := memory.changed(()):
            return f"{changed} before {type(error).__name__}: {str(error)[:80]}"
        return None
    written = [guarded[x] for x in case.call.written if guarded[x] is not None]
    if changed := memory.changed(written):
        return changed
    clean = tree_map_only(Tensor, lambda x: x.contiguous().clone(), given)
    if case.is_past_numbers:
        return None
    base = case.call.op.removesuffix("_triton")
    try:
        expected = case.call.run(REFERENCES.get(base, op), clean)
    except Exception as error:
        return f"taken, but refused by the reference: {str(error).splitlines()[0][:120]}"
    floats = [x for x in tree_leaves(clean) if isinstance(x, Tensor) and x.is_floating_point()]
    limit = NARROW if any(x.itemsize < 4 for x in floats) else WIDE
    if base != case.call.op and any(x.dtype == torch.bfloat16 for x in floats):
        limit *= 2  # interpreted: it cuts to bfloat16, by up to a unit where rounding errs by half
    results = [*as_list(found), *(guarded[x] for x in case.call.written)]
    right = [*as_list(expected), *(clean[x] for x in case.call.written)]
    for n, (x, y) in enumerate(zip(results, right, strict=True)):
        if isinstance(y, Tensor) and (wrong := differs(x, y, limit)):
            return f"result {n} {wrong}"
    return None


def as_list(found: Any) -> list[Any]:
    return [found] if isinstance(found, Tensor) else [*(found or ())]


def differs(x: Tensor, y: Tensor, limit: float = WIDE) -> str | None:
    """Say how x differs from y by more than rounding: what is read wrong differs by far more."""
    if x.shape != y.shape:
        return f"is {tuple(x.shape)}, not {tuple(y.shape)}"
    x, y = x.double(), y.double()
    seen = y.isfinite() & (y.abs() < 1e15)
    if not seen.any():
        return None
    error = (x - y)[seen].nan_to_num(nan=torch.inf).abs().max().item()
    most = y[seen].abs().max().item()
    return None if error <= limit * max(most, 1e-3) else f"is off by {error:.3g} of {most:.3g}"


def run_cases(first: int, last: int) -> None:
    """Go through these cases; each in memory that ends, or starts, where no access is allowed."""
    for n, case in enumerate(cases()[first:last], first):
        print(n, flush=True)
        if wrong := problem(case, behind=n % 2 == 0):
            print(f"{case}: {wrong}", flush=True)
        use_again()


if __name__ == "__main__":
    run_cases(int(sys.argv[1]), int(sys.argv[2]))
