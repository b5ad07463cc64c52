"""Deltas between two versions of a value: any bytes, any edits."""

from __future__ import annotations

import ormsgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from langgraph_tiered_saver.deltas import HEADER, BrokenDeltaError, apply, diff, fold, whole_size

elements = st.one_of(st.text(max_size=80), st.integers(-5, 5), st.binary(max_size=60), st.lists(st.text(max_size=9)))


@st.composite
def edited(draw: st.DrawFn, value: list[object]) -> list[object]:
    """A list after some of the edits that agents make."""
    out = list(value)
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(("append", "append", "append", "last", "middle", "trim", "insert", "clear")))
        if kind == "append":
            out += draw(st.lists(elements, min_size=1, max_size=4))
        elif kind == "last" and out:
            out[-1] = draw(elements)
        elif kind == "middle" and out:
            out[draw(st.integers(0, len(out) - 1))] = draw(elements)
        elif kind == "trim":
            out = out[draw(st.integers(0, len(out))) :]
        elif kind == "insert":
            out.insert(draw(st.integers(0, len(out))), draw(elements))
        elif kind == "clear":
            out = []
    return out


@given(st.data())
def test_edits_of_lists_come_back(data: st.DataObject) -> None:
    """Applying a chain of deltas, one by one or folded, gives exactly the bytes each was made from."""
    value = data.draw(st.lists(elements, max_size=40))
    base = whole = ormsgpack.packb(value)
    chain: list[bytes] = []
    for _ in range(data.draw(st.integers(1, 5))):
        value = data.draw(edited(value))
        new = ormsgpack.packb(value)
        delta = diff(whole, new)
        if delta is None:
            base, chain = new, []
        else:
            assert len(delta) <= len(new)
            assert whole_size(delta) == len(new)
            assert apply(whole, delta) == new
            chain.append(delta)
        whole = new
        assert fold(base, chain) == new


@given(st.binary(max_size=300), st.binary(max_size=300), st.binary(max_size=300), st.binary(max_size=300))
def test_any_bytes_come_back(start: bytes, old: bytes, new: bytes, end: bytes) -> None:
    """Whatever the bytes are, a delta makes exactly them, or there is none."""
    base, value = start + old + end, start + new + end
    delta = diff(base, value)
    if delta is not None:
        assert apply(base, delta) == value


@pytest.mark.parametrize(("before", "after"), [(0, 1), (15, 16), (16, 17), (65535, 65536), (3, 3)])
def test_a_longer_array_costs_its_tail(before: int, after: int) -> None:
    """A list that grew is its header and its tail, also where the header becomes longer."""
    words = [f"message number {i} of a conversation" for i in range(after)]
    base, value = ormsgpack.packb(words[:before]), ormsgpack.packb(words)
    delta = diff(base + b"", value)
    if before < 3:
        assert delta is None
    else:
        assert delta is not None
        assert len(delta) <= HEADER.size + 5 + sum(len(ormsgpack.packb(word)) for word in words[before:])


def test_a_long_chain_of_appended_elements_is_folded_as_it_is_applied() -> None:
    """Folding takes a short cut for deltas that append, and none where one edits, drops or shrinks in between."""
    words = [f"message number {i} of a conversation" for i in range(40)]
    base = value = ormsgpack.packb(words)
    chain = []
    for i in range(300):
        if i % 50 == 20:
            words[-1] = "edited"
        elif i % 50 == 40:
            words = words[3:]
        else:
            words.append(f"and one more, the {i}th")
        new = ormsgpack.packb(words)
        delta = diff(value, new)
        assert delta is not None
        chain.append(delta)
        value = new
        assert fold(base, chain) == value
    with pytest.raises(BrokenDeltaError):
        fold(base, chain[1:])


@pytest.mark.parametrize("size", [100, 5_000, 70_000, 300_000])
def test_an_edit_anywhere_costs_little(size: int) -> None:
    """A change at the start, in the middle or at the end of a long value is small; so are dropped first elements."""
    words = [f"{i:08}" * 2 for i in range(size // 16)]
    base = ormsgpack.packb(words)
    for at in (0, len(words) // 2, len(words) - 1):
        delta = diff(base, ormsgpack.packb([*words[:at], "something else", *words[at + 1 :]]))
        assert delta is not None
        assert len(delta) < HEADER.size + 40
    if len(words) > 20:
        delta = diff(base, ormsgpack.packb([*words[5:], "and more"]))
        assert delta is not None
        assert len(delta) < HEADER.size + 40


@given(st.binary(min_size=200, max_size=400), st.integers(0, 399), st.integers(1, 255))
def test_other_bytes_are_refused(base: bytes, at: int, change: int) -> None:
    """I2: a delta is never applied to other bytes than those that it was made from."""
    value = base + b"and more"
    delta = diff(base, value)
    assert delta is not None
    at %= len(base)
    other = base[:at] + bytes([base[at] ^ change]) + base[at + 1 :]
    try:
        found = apply(other, delta)
    except BrokenDeltaError:
        return
    assert found == value


@given(st.binary(max_size=100), st.binary(max_size=100))
def test_damage_is_noticed(base: bytes, delta: bytes) -> None:
    """Bytes that are no delta raise, and nothing else."""
    with pytest.raises(BrokenDeltaError):
        apply(base, delta)
