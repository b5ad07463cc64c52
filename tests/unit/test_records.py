"""The wire form of journal records."""

from __future__ import annotations

import json
import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from langgraph_tiered_saver.records import (
    FRESH,
    Blob,
    CheckpointRecord,
    MaintenanceRecord,
    WritesRecord,
    decode,
    encode,
    frame,
    pack_value,
    unframe,
    unpack_value,
)

# On a busy machine neither a slow example nor slow generation is a failure.
RELAXED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
# Names are checked before they become records, so that they can always be encoded.
names = st.text(st.characters(codec="utf-8"), max_size=12)
values = st.tuples(names.filter(lambda name: "\0" not in name), st.binary(max_size=40)).map(pack_value)
json_text = st.dictionaries(names, names).map(lambda document: json.dumps(document).encode())

checkpoints = st.builds(
    CheckpointRecord,
    names,
    names,
    names,
    json_text,
    json_text,
    st.integers(0, 99),
    st.lists(st.builds(Blob, names, names, values, st.one_of(st.just(""), st.just(FRESH), names)), max_size=4),
)
writes = st.builds(
    WritesRecord,
    names,
    names,
    names,
    names,
    st.booleans(),
    st.lists(st.tuples(st.integers(-4, 2**31 - 1), names, values), max_size=4),
)
maintenance = st.builds(
    MaintenanceRecord, names, st.dictionaries(names, st.one_of(names, st.lists(names, max_size=3)), max_size=3)
)
records = st.one_of(checkpoints, writes, maintenance)


def test_frames_are_laid_out_as_the_scripts_read_them() -> None:
    """The Lua scripts unpack `>I4c0`: a big-endian length of four bytes, then so many bytes."""
    assert frame([b"ab", b"", b"\x00"]) == b"\x00\x00\x00\x02ab" + b"\x00\x00\x00\x00" + b"\x00\x00\x00\x01\x00"


@RELAXED
@given(st.lists(st.binary(max_size=300), max_size=8))
def test_frames_come_back_as_they_were(parts: list[bytes]) -> None:
    """I1: no byte string, however odd, is changed or confused with its neighbour."""
    assert unframe(frame(parts)) == parts


@RELAXED
@given(st.lists(st.binary(min_size=1, max_size=20), min_size=1, max_size=4), st.data())
def test_frames_that_were_cut_are_refused(parts: list[bytes], data: st.DataObject) -> None:
    """I7: bytes that end within a frame are an error, never a shorter record."""
    whole = frame(parts)
    borders = {len(frame(parts[:count])) for count in range(len(parts) + 1)}
    cut = data.draw(st.integers(0, len(whole) - 1).filter(lambda length: length not in borders))

    with pytest.raises(ValueError, match="the bytes end within"):
        unframe(whole[:cut])


@RELAXED
@given(st.binary(max_size=60))
def test_any_bytes_are_frames_or_refused(payload: bytes) -> None:
    """I7: bytes are split so that joining gives them back, or refused."""
    try:
        parts = unframe(payload)
    except ValueError:
        return
    assert frame(parts) == payload


@RELAXED
@given(records)
def test_records_come_back_as_they_were(record: CheckpointRecord | WritesRecord | MaintenanceRecord) -> None:
    """I1: what the flusher reads from the journal is what was acknowledged."""
    assert decode(encode(record, 7)) == (7, record)


@RELAXED
@given(st.one_of(st.binary(max_size=80), st.lists(st.binary(max_size=10), max_size=9).map(frame)))
def test_bytes_of_somebody_else_are_refused_as_a_value_error(payload: bytes) -> None:
    """I7: the flusher sets a thread aside on `ValueError`; any other error would stop every thread."""
    try:
        generation, record = decode(payload)
    except ValueError:
        return
    assert decode(encode(record, generation)) == (generation, record)


@pytest.mark.parametrize(
    "parts",
    [
        [],
        [b"x", b"", b""],
        [b"c", b"1", b"ns", b"id", b"", b"{}", b"{}"],
        [b"c", b"1", b"ns", b"id", b"", b"{}", b"{}", b"0", b"channel", b"version"],
        [b"c", b"one", b"ns", b"id", b"", b"{}", b"{}", b"0"],
        [b"c", b"1", b"ns", b"id", b"", b"{}", b"{}", b"none"],
        [b"w", b"1", b"ns", b"id", b"task", b"path"],
        [b"w", b"1", b"ns", b"id", b"task", b"path", b"1", b"one", b"channel", b"value"],
        [b"c", b"1", b"\xff", b"id", b"", b"{}", b"{}", b"0"],
        [b"m", b"1", b"prune"],
        [b"m", b"1", b"prune", b"not json"],
        [b"m", b"1", b"delete_runs", b"[]"],
        [b"m", b"1", b"delete_runs", b"null"],
    ],
)
def test_a_record_this_version_does_not_know_is_refused(parts: list[bytes]) -> None:
    """I7: a record of another kind, or with parts missing, is never half understood."""
    with pytest.raises(ValueError):  # noqa: PT011 - UnicodeDecodeError and JSONDecodeError are among them
        decode(frame(parts))


@RELAXED
@given(names.filter(lambda name: "\0" not in name), st.binary(max_size=60))
def test_values_keep_their_type_and_bytes(type_: str, data: bytes) -> None:
    """I1: a value's bytes may hold NULs; only the first one separates."""
    assert unpack_value(pack_value((type_, data))) == (type_, data)


def test_a_part_of_four_gigabytes_is_refused_instead_of_cut() -> None:
    """I7: a length that does not fit raises; it does not wrap around."""

    class Huge(bytes):
        __slots__ = ()

        def __len__(self) -> int:
            return 2**32

    with pytest.raises(struct.error):
        frame([Huge()])
