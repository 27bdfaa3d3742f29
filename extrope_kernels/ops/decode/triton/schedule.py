"""The schedule of a decode launch: the sequence, block of rows and split of keys of a program.

Only the device knows lengths. So the host fixes a number of work items from shapes alone, and each
program finds on the device what its item is:

                an item is                               its programs    splits has
    no splits   a sequence                               a block of rows each   1
    splits      a split of the keys of a sequence        a block of rows each   the sequence's
    packed      a split of the keys of a block of rows   one                    the block's

A split is a run of whole blocks of keys. Sequences get items by their share of all keys. The host
does not know how many rows a packed sequence has: so items are of blocks of rows there.

A row is a token and one of the `group` heads of q that share a head of k. MODEL and BLOCKS are
DecodeModel and DecodeBlocks of decode.py.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..._math.triton.launch import processors_of
from ...attention.call import AttentionCall
from ...attention.triton.mask import region_begin
from ...cache.call import KVCache

# -------------------------------------------------------------------------------------------------
# On the host: how many items

LEAST_KEYS = 256  # in a split; with fewer, its start and merge cost visible time
MOST_SPLITS = 128  # in a sequence: one program merges them
# Programs per multiprocessor: enough loads in flight, and an even last wave.
WAVES = 2


class Grid(NamedTuple):
    """The programs for each head of k, and the sizes of their partial results."""

    num_items: int
    row_blocks: int  # every item has a program for each
    item_rows: int  # rows of partial results of an item
    counters: int  # one for each block of rows of each sequence; packed, where the host does not
    # know these, one for each item
    splits: bool  # several items may share a sequence
    least_blocks: int  # least blocks of keys in a split


def grid_of(q: Tensor, cache: KVCache, call: AttentionCall, block_m: int, block_n: int) -> Grid:
    """Choose the grid from shapes, never from lengths.

    q: (batch, seqlen_q, heads_q, head_dim), batch 1 for packed queries.
    """
    batch, heads_k = cache.seqlens.shape[0], cache.k.shape[2]
    group, seqlen_q = q.shape[2] // heads_k, q.shape[1]
    rows = group * seqlen_q
    row_blocks, most_keys = triton.cdiv(rows, block_m), cache.capacity
    if call.sliding_window is not None:
        most_keys = min(most_keys, call.sliding_window + seqlen_q - 1)
    most_splits = most_keys // LEAST_KEYS  # of a sequence
    least_blocks = triton.cdiv(LEAST_KEYS, block_n)
    if call.cu_seqlens is None:
        more = _more_items(q, heads_k * row_blocks, batch * most_splits)
        return Grid(
            num_items=batch + more if most_splits > 1 else batch,
            row_blocks=row_blocks,
            item_rows=rows,
            counters=batch * row_blocks,
            splits=most_splits > 1,
            least_blocks=least_blocks,
        )
    # The last block of each sequence, and of the tokens after the last boundary, may have only one
    # row. But there are no more blocks than if every token had its own.
    all_row_blocks = min(row_blocks + batch + 1, seqlen_q * triton.cdiv(group, block_m))
    num_items = all_row_blocks + _more_items(q, heads_k, all_row_blocks * most_splits)
    return Grid(
        num_items=num_items,
        row_blocks=1,
        item_rows=block_m,
        counters=num_items,
        splits=True,
        least_blocks=least_blocks,
    )


def _more_items(q: Tensor, programs: int, useful: int) -> int:
    """Return the number of items beyond the first of each sequence, or of each block of rows.

    programs: programs of an item. useful: the most splits that there can be.
    """
    wanted = triton.cdiv(WAVES * processors_of(q), max(programs, 1))
    more = min(wanted, useful, MOST_SPLITS)
    # With one, a split would be as long as all sequences together, and so split nothing.
    return more if more > 1 else 0


# -------------------------------------------------------------------------------------------------
# On the device: lengths, safe for any content of the tensors


class CacheLengths(NamedTuple):
    """The lengths of all sequences."""

    seqlens: tl.tensor  # (batch,): slots of the cache in use before this call
    leftpad: tl.tensor  # (batch,): the slot of position 0; None if it is always 0
    cu_seqlens: tl.tensor  # (batch + 1,): boundaries of packed queries, or None
    batch: tl.tensor
    num_tokens: tl.tensor  # queries of each sequence; packed: of all
    appended: tl.tensor  # new keys of each sequence; packed: of each of its queries, 0 or 1
    capacity: tl.tensor  # slots of each sequence


@triton.jit
def queries_of(sequence, lengths, MODEL: tl.constexpr):
    """Return (first token, number of tokens) of these sequences.

    Packed tokens after the last boundary count as sequence number `batch`, which has no keys.
    """
    first_token, seqlen_q = 0, lengths.num_tokens
    if MODEL.packed:
        batch, total = lengths.batch, lengths.num_tokens
        begin = tl.load(lengths.cu_seqlens + sequence, mask=sequence <= batch, other=total)
        end = tl.load(lengths.cu_seqlens + sequence + 1, mask=sequence < batch, other=total)
        first_token = tl.minimum(tl.maximum(begin, 0), total)
        seqlen_q = tl.minimum(tl.maximum(end, first_token), total) - first_token
    return first_token, seqlen_q


@triton.jit
def keys_of(sequence, seqlen_q, lengths, MODEL: tl.constexpr):
    """Return (slot of position 0, number of keys) of these sequences; for `batch` and on, of none.

    The keys include those that this call has written. They lie in slots of the cache whatever
    seqlens and leftpad hold.
    """
    valid = sequence < lengths.batch
    new = lengths.appended
    if MODEL.packed:
        new = lengths.appended * seqlen_q
    end = tl.load(lengths.seqlens + sequence, mask=valid, other=0) + new
    end = tl.minimum(tl.maximum(end, 0), lengths.capacity)
    pad = end * 0
    if MODEL.padded:
        pad = tl.maximum(tl.load(lengths.leftpad + sequence, mask=valid, other=0), 0)
    return pad, tl.maximum(end - pad, 0)


# -------------------------------------------------------------------------------------------------
# On the device: items go to sequences, splits and blocks of rows


@triton.jit
def _work_of(sequence, lengths, MODEL: tl.constexpr, BLOCKS: tl.constexpr):
    """Return (blocks of rows, blocks of keys that they see) of these sequences, (S,) each.

    Unless packed, the number of blocks of rows is 1: an item then has a program for each of them.
    """
    _, seqlen_q = queries_of(sequence, lengths, MODEL)
    _, keys = keys_of(sequence, seqlen_q, lengths, MODEL)
    if not MODEL.from_key_0:
        # The first query, at position keys - seqlen_q, sees the earliest keys.
        keys -= region_begin(keys - seqlen_q, keys, 0, 0, MODEL)
    key_blocks = tl.cdiv(tl.maximum(keys, 0), BLOCKS.block_n)
    key_blocks = tl.where(sequence < lengths.batch, key_blocks, 0)
    row_blocks = 1
    if MODEL.packed:
        row_blocks = tl.cdiv(seqlen_q * MODEL.group, BLOCKS.block_m)
    return row_blocks, key_blocks


@triton.jit
def _split_size(num_items, lengths, MODEL: tl.constexpr, BLOCKS: tl.constexpr):
    """Return how many blocks of keys a split needs at least, so that there are items for all."""
    SEQUENCES: tl.constexpr = 128  # S, at a time
    MARGIN: tl.constexpr = 1.0001  # above the error of a float32 sum
    MOST: tl.constexpr = 1e9  # blocks of keys, more than any cache has
    # A sequence with n blocks of keys takes cdiv(n, size) < n / size + 1 splits. So all splits fit
    # if the sum of n / size is at most the number of items beyond one for each sequence, or for
    # each block of rows.
    if MODEL.packed:
        # Rows times keys in float32: 32 bits overflow, and in 64 a GPU calls a function to divide.
        work, all_row_blocks = 0.0, 0
        for first in tl.range(0, lengths.batch + 1, SEQUENCES):
            sequence = first + tl.arange(0, SEQUENCES)
            row_blocks, key_blocks = _work_of(sequence, lengths, MODEL, BLOCKS)
            all_row_blocks += tl.sum(row_blocks)
            work += tl.sum(row_blocks.to(tl.float32) * key_blocks.to(tl.float32))
        size = work * MARGIN / tl.maximum(num_items - all_row_blocks, 1).to(tl.float32)
        size = tl.minimum(size, MOST).to(tl.int32) + 1
    else:
        all_key_blocks = 0
        for first in tl.range(0, lengths.batch, SEQUENCES):
            _, key_blocks = _work_of(first + tl.arange(0, SEQUENCES), lengths, MODEL, BLOCKS)
            all_key_blocks += tl.sum(key_blocks)
        size = tl.cdiv(all_key_blocks, tl.maximum(num_items - lengths.batch, 1))
    return size


@triton.jit
def work_of_program(
    num_items, least_blocks, lengths, MODEL: tl.constexpr, BLOCKS: tl.constexpr
):  # fmt: skip
    """Return (item, sequence, row_block, split, splits) of this program, by the table above.

    Axis 0 of the grid is items, then blocks of rows. Items follow one another by sequence, packed
    then by block of rows, then by split. An item with nothing to do has a sequence of `batch` or
    more, and one split. So have packed tokens after the last boundary, sequence `batch`: they have
    rows, but see no key.

    A split has at least least_blocks blocks of keys, and more if there would be too few items.
    Every sequence, or block of rows, gets at least one split, even if empty. Every program counts
    through all sequences, twice, 128 at a time: 4,096 of them are 64 steps before it loads a key.
    lengths: a CacheLengths.
    """
    SEQUENCES: tl.constexpr = 128  # S, at a time
    item, row_block = tl.program_id(0) % num_items, tl.program_id(0) // num_items
    if not BLOCKS.splits:
        return item, item, row_block, 0, 1
    size = tl.maximum(_split_size(num_items, lengths, MODEL, BLOCKS), least_blocks)
    sequences = lengths.batch
    if MODEL.packed:
        sequences = lengths.batch + 1  # the tokens after the last boundary
    sequence = 0  # counts the sequences whose items all come before this one
    first_item = 0  # of that sequence
    counted = 0  # items of the sequences before `first`
    for first in tl.range(0, sequences, SEQUENCES):
        nth = first + tl.arange(0, SEQUENCES)  # (S,)
        row_blocks, key_blocks = _work_of(nth, lengths, MODEL, BLOCKS)
        items = tl.maximum(tl.cdiv(key_blocks, size), 1) * row_blocks
        items = tl.where(nth < sequences, items, 0)
        # All items of these sequences come before this one.
        passed = (counted + tl.cumsum(items, 0) <= item) & (nth < sequences)
        sequence += tl.sum(passed.to(tl.int32))
        first_item += tl.sum(tl.where(passed, items, 0))
        counted += tl.sum(items)
    _, key_blocks = _work_of(sequence, lengths, MODEL, BLOCKS)
    split, splits = item - first_item, tl.maximum(tl.cdiv(key_blocks, size), 1)
    if MODEL.packed:  # so far, `split` counts those of all blocks of rows of the sequence
        row_block, split = split // splits, split % splits
    return item, sequence, row_block, split, splits
