"""Differences between two versions of a channel's value, on the serializer's bytes.

LangGraph hands over a conversation whole at every step, though it has only grown. A *delta* describes the new bytes as

    head + a run of the base + middle + another run of the base

which covers what agents do to a list: append to it (an array's header, the run of its elements, the new ones), edit
the last element or one in between, drop the first ones. A delta names the digest of the whole value that it makes,
so that it can never be applied to other bytes than those it was made from.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence

import xxhash

# Length of the head; start and length of the first run, of the second run; length and digest of the whole value. Lua
# (`struct`) and PostgreSQL (`get_byte`) read the first six too.
HEADER = struct.Struct(">6IQ")
# What a delta must spare to be worth a look at its base.
_MOST_OF_WHOLE = 0.75
# In 64 KiB steps bytes are compared in the cache, and their copies need no new pages.
_FIRST_STEP, _LARGEST_STEP = 4096, 65536
# How much of the new value is looked for in the base, if it does not begin alike.
_PROBE = 48


class BrokenDeltaError(ValueError):
    """A delta cannot be applied: it is damaged, or these are not the bytes it was made from."""


def diff(base: bytes, value: bytes) -> bytes | None:
    """Describe a value by what it has in common with a base.

    Args:
        base: The bytes of another version.
        value: The bytes to describe.

    Returns:
        The delta; None if it would not be much shorter than the value.

    Cost: a comparison of the bytes and a digest, about 0.1 ms per MB.
    """
    base_head, head = _array_header(base), _array_header(value)
    if not (base_head and head):
        base_head = head = 0
    start, first = base_head, _common_prefix(base, base_head, value, head)
    if first < (len(value) - head) // 2 and len(value) - head >= _PROBE:
        found = base.find(value[head : head + _PROBE], base_head)
        if found > base_head:
            start, first = found, _common_prefix(base, found, value, head)
    second = _common_suffix(base, start + first, value, head + first)
    middle = value[head + first : len(value) - second]
    if head + len(middle) + HEADER.size > len(value) * _MOST_OF_WHOLE:
        return None
    return b"%b%b%b" % (
        HEADER.pack(head, start, first, len(base) - second, second, len(value), xxhash.xxh3_64_intdigest(value)),
        value[:head],
        middle,
    )


def apply(base: bytes, delta: bytes) -> bytes:
    """Make the value that a delta describes.

    Raises:
        BrokenDeltaError: it is damaged, or was made from other bytes.
    """
    return fold(base, (delta,))


def fold(base: bytes, deltas: Iterable[bytes]) -> bytes:
    """Apply deltas, each one to what the ones before it made; only the last value is put together and checked.

    Raises:
        BrokenDeltaError: one is damaged, or was made from other bytes.
    """
    # Pieces of byte strings: which one, where it starts and how long it is.
    pieces: list[tuple[bytes, int, int]] = [(base, 0, len(base))]
    size = len(base)
    digest = None
    for delta in deltas:
        if len(delta) < HEADER.size:
            raise BrokenDeltaError("the delta is shorter than its header")
        head, start, first, second_start, second, length, digest = HEADER.unpack_from(delta)
        middle_at = HEADER.size + head
        middle = len(delta) - middle_at
        if middle < 0 or head + first + middle + second != length:
            raise BrokenDeltaError("the delta's lengths do not add up")
        if len(pieces) > 1 and head and not second and start + first == size and start == pieces[0][2]:
            # It appends, behind another head, as nearly all do; a chain of them would otherwise take its square.
            pieces[0] = (delta, HEADER.size, head)
            pieces.append((delta, middle_at, middle))
            size = length
            continue
        size = length
        made = [(delta, HEADER.size, head)] if head else []
        _cut(pieces, start, first, made)
        if middle:
            made.append((delta, middle_at, middle))
        _cut(pieces, second_start, second, made)
        pieces = made
    if digest is None:
        return base
    value = b"".join([memoryview(source)[at : at + size] for source, at, size in pieces])
    if xxhash.xxh3_64_intdigest(value) != digest:
        raise BrokenDeltaError("the delta was made from other bytes")
    return value


def whole_size(delta: bytes) -> int:
    """Give the length of the value that a delta makes.

    Raises:
        BrokenDeltaError: it is damaged.
    """
    if len(delta) < HEADER.size:
        raise BrokenDeltaError("the delta is shorter than its header")
    return int(HEADER.unpack_from(delta)[5])


def _cut(pieces: Sequence[tuple[bytes, int, int]], start: int, length: int, out: list[tuple[bytes, int, int]]) -> None:
    """Add the part of some pieces that begins at a place and has a length."""
    for source, at, size in pieces:
        if length <= 0:
            return
        if start >= size:
            start -= size
            continue
        taken = min(size - start, length)
        out.append((source, at + start, taken))
        length -= taken
        start = 0
    if length > 0:
        raise BrokenDeltaError("the delta reaches beyond its base")


def _array_header(value: bytes) -> int:
    """Give the length of a MessagePack array's header, 0 if the bytes do not begin with one."""
    first = value[0] if value else 0
    if 0x90 <= first <= 0x9F:
        return 1
    return {0xDC: 3, 0xDD: 5}.get(first, 0) if len(value) >= 5 else 0


def _common_prefix(left: bytes, left_at: int, right: bytes, right_at: int) -> int:
    """Count the bytes that are equal from two places on."""
    limit = min(len(left) - left_at, len(right) - right_at)
    same, step = 0, _FIRST_STEP
    while same < limit:
        step = min(step, limit - same)
        a, b = left_at + same, right_at + same
        if left[a : a + step] != right[b : b + step]:
            return same + _halve(lambda n: left[a : a + n] == right[b : b + n], step)  # noqa: B023 - called at once
        same += step
        step = min(step * 2, _LARGEST_STEP)
    return same


def _common_suffix(left: bytes, left_from: int, right: bytes, right_from: int) -> int:
    """Count the bytes that are equal at the end, no further back than two places."""
    limit = min(len(left) - left_from, len(right) - right_from)
    same, step = 0, _FIRST_STEP
    while same < limit:
        step = min(step, limit - same)
        a, b = len(left) - same, len(right) - same
        if left[a - step : a] != right[b - step : b]:
            return same + _halve(lambda n: left[a - n : a] == right[b - n : b], step)  # noqa: B023 - called at once
        same += step
        step = min(step * 2, _LARGEST_STEP)
    return same


def _halve(is_same: Callable[[int], bool], step: int) -> int:
    """Find how many bytes of a step are equal; not all of them are."""
    same, different = 0, step
    while different - same > 1:
        middle = (same + different) // 2
        if is_same(middle):
            same = middle
        else:
            different = middle
    return same
