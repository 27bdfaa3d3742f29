"""What tensors of a call must be, as a table: names, dimensions, dtypes, strides.

`check` goes through a table and refuses the first tensor that does not fit, in one sentence that
names it: "v must be (batch 2, seqlen_k 6, heads_k 2, head_dim_v) to go with k, got (2, 5, 2, 32)".
How sizes relate to each other (heads that divide heads, boundaries that rise) is checked elsewhere.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._math.dtypes import accumulator

# Dtypes that follow from the table's first tensor: its own, and the one that sums of it have.
LIKE, WIDE = "like", "wide"
ROWS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INT32 = (torch.int32,)
FLOAT32 = (torch.float32,)
FLOAT64 = (torch.float64,)
FLOATS = (torch.float32, torch.float64)
# Strides: any, those of a contiguous tensor, or a contiguous last dimension.
ANY, DENSE, LAST = "any", "dense", "last"
# The words for tokens, and what they are in packed sequences.
_TOKENS = dict.fromkeys(("seqlen", "seqlen_q", "seqlen_k"), "total")


class Spec(NamedTuple):
    """One tensor of a table.

    name: of the argument.
    dims: a word per dimension: "batch seqlen_k heads_k head_dim". A word has one size in all
        tensors of a call. "1|batch" is 1 or the batch, "sequences+1" one more; "total" are the
        tokens of packed sequences. Shapes with " or " between them are all taken.
    dtypes: that are taken, LIKE and WIDE among them.
    optional: None is taken.
    strides: ANY, DENSE or LAST.
    boundaries: the name of cu_seqlens, with which rows are packed.
    """

    name: str
    dims: str
    dtypes: tuple[torch.dtype | str, ...] = (LIKE,)
    optional: bool = False
    strides: str = LAST
    boundaries: str = "cu_seqlens"


Dim = tuple[tuple[str | int, ...], int]  # words, of which one is the size, and what is added to it
Sizes = dict[str | int, tuple[int, str]]  # a word's size, and the tensor that it comes from


def check(
    op: str,
    specs: Iterable[Spec],
    tensors: Sequence[Tensor | None],
    sizes: Sizes | None = None,
    like: tuple[str, Tensor] | None = None,
) -> dict[str | int, int]:
    """Refuse the first tensor that does not fit its spec; return the size of each word.

    sizes: of words that are known; like: the name and the tensor whose dtype and device the others
    follow, the table's first one if None.
    Raises TypeError for what is no tensor, else ValueError; both begin with op.
    """
    sizes = {} if sizes is None else sizes
    device = None if like is None else like[1].device
    for spec, x in zip(specs, tensors):
        if x is None and spec.optional:
            continue
        check_dense(op, spec.name, x)
        if like is None:
            like, device = (spec.name, x), x.device
        if x.dtype not in spec.dtypes and not (x.dtype == like[1].dtype and LIKE in spec.dtypes):
            _check_dtype(op, spec, x, *like)
        if x.device != device:
            raise ValueError(
                f"{op}: {spec.name} must be on {device} like {like[0]}, got {x.device}"
            )
        shape = x.shape
        for dims in _shapes_of(spec.dims):
            if _fits(dims, shape, spec.name, sizes):
                break
        else:
            raise ValueError(f"{op}: {spec.name} must be {_expected(spec, x, sizes)}")
        if spec.strides != ANY:
            _check_strides(op, spec, x)
    return {word: size for word, (size, _) in sizes.items()}


def check_dense(op: str, name: str, x: Tensor) -> None:
    """Refuse sparse and nested tensors; a nested one with torch.strided has no sizes to ask."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, got {type(x).__name__}")
    if x.layout != torch.strided or x.is_nested:
        kind = x.layout if x.layout != torch.strided else "a nested one"
        raise ValueError(f"{op}: {name} must be a dense tensor, got {kind}")


def _check_dtype(op: str, spec: Spec, x: Tensor, like_name: str, like: Tensor) -> None:
    of_like = {LIKE: like.dtype, WIDE: accumulator(like.dtype)}
    wanted = dict.fromkeys(of_like.get(dtype, dtype) for dtype in spec.dtypes)
    if x.dtype in wanted:
        return
    follows = f" like {like_name}" if LIKE in spec.dtypes else ""
    if WIDE in spec.dtypes:
        follows = f" for {like_name} in {_short(like.dtype)}"
    listed = _listed([_short(dtype) for dtype in wanted])
    raise ValueError(f"{op}: {spec.name} must be {listed}{follows}, got {_short(x.dtype)}")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _listed(names: list[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


@functools.cache
def for_rows(
    table: tuple[Spec, ...], packed: bool, boundaries: str = "cu_seqlens"
) -> tuple[Spec, ...]:
    """Return a table, written for (batch, seqlen, ...), as it is for a batch or for packed rows.

    Packed rows are (total, ...); what has no tokens has an entry or a row for each sequence.
    """
    return tuple(_packed(spec, boundaries) for spec in table) if packed else table


def _packed(spec: Spec, boundaries: str) -> Spec:
    shapes = []
    for shape in spec.dims.split(" or "):
        has_tokens = any(word in _TOKENS for word in shape.split())
        of_sequences = {"batch": "sequences", "1|batch": "1|sequences"}
        words = _TOKENS | ({"batch": "", "1|batch": "1"} if has_tokens else of_sequences)
        shapes.append(" ".join(filter(None, (words.get(x, x) for x in shape.split()))))
    return spec._replace(dims=" or ".join(dict.fromkeys(shapes)), boundaries=boundaries)


@functools.cache
def _shapes_of(dims: str) -> tuple[tuple[Dim, ...], ...]:
    return tuple(tuple(map(_dim_of, shape.split())) for shape in dims.split(" or "))


def _dim_of(text: str) -> Dim:
    plain = text.removesuffix("+1")
    words = [int(word) if word.isdigit() else word for word in plain.split("|")]
    return tuple(words), int(plain != text)


def _fits(dims: tuple[Dim, ...], shape: torch.Size, name: str, sizes: Sizes) -> bool:
    """Whether a tensor has a shape; gives its sizes to the words that have none."""
    if len(dims) != len(shape):
        return False
    found = {}
    for (words, more), n in zip(dims, shape):
        for word in words:
            if _is(word, more, n, sizes):
                break
        else:
            return False
        if len(words) == 1 and word not in sizes:
            found[word] = (n - more, name)
    sizes.update(found)
    return True


def _is(word: str | int, more: int, n: int, sizes: Sizes) -> bool:
    """Whether n may be the size of a word; a word without one takes any."""
    if word in sizes:
        return n == sizes[word][0] + more
    return n == word if isinstance(word, int) else n > more or not more


def _expected(spec: Spec, x: Tensor, sizes: Sizes) -> str:
    """Say which shapes a tensor may have, what they come from, and what it has."""
    shapes = _shapes_of(spec.dims)
    told = _listed([_told(dims, sizes, spec.boundaries) for dims in shapes])
    closest = next((dims for dims in shapes if len(dims) == x.dim()), shapes[-1])
    wrong = [
        (words, more)
        for (words, more), n in zip(closest, x.shape)
        if not any(_is(word, more, n, sizes) for word in words)
    ]
    words = [word for of_dim, _ in wrong or closest for word in of_dim]
    source = next((sizes[word][1] for word in words if word in sizes), None)
    together = "" if source in (None, spec.name) else f" to go with {source}"
    return f"{told}{together}, got {tuple(x.shape)}"


def _told(dims: tuple[Dim, ...], sizes: Sizes, boundaries: str) -> str:
    """Write a shape with its sizes: (batch 2, seqlen_k 6, heads_k 2, head_dim_v)."""
    told = [" or ".join(_told_word(word, more, sizes) for word in words) for words, more in dims]
    packed = dims[0][0] == ("total",) and len(dims) == 3 and "total" not in sizes
    comma, packing = "," * (len(told) == 1), f" with {boundaries}" * packed
    return f"({', '.join(told)}{comma}){packing}"


def _told_word(word: str | int, more: int, sizes: Sizes) -> str:
    if more:
        return f"{word} + 1" + (f" = {sizes[word][0] + 1}" if word in sizes else "")
    return f"{word} {sizes[word][0]}" if word in sizes else f"{word}"


def _check_strides(op: str, spec: Spec, x: Tensor) -> None:
    if spec.strides == DENSE and not x.is_contiguous():
        raise ValueError(f"{op}: {spec.name} must be contiguous, got strides {x.stride()}")
    if spec.strides == LAST and x.stride()[-1:] != (1,) and x.shape[-1:] > (1,) and x.numel() > 0:
        raise ValueError(
            f"{op}: {spec.name} must be contiguous in its last dimension, got strides {x.stride()}"
        )
