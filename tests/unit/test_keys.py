"""Names of the Redis keys."""

from __future__ import annotations

import string

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis.crc import key_slot

from langgraph_tiered_saver.hot.keys import Keyspace, ThreadKeys, meta_key, sweep_key

# On a busy machine neither a slow example nor slow generation is a failure.
RELAXED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
awkward = st.text(st.sampled_from("{}:/ aé0"), max_size=8)
threads = st.one_of(names, awkward).filter(bool)
namespaces = st.one_of(names, awkward)
prefixes = st.text(string.ascii_letters + string.digits + "_.-", min_size=1, max_size=8)


def all_of(keys: ThreadKeys, ns: str) -> dict[str, bytes]:
    return {
        "journal": keys.journal,
        "namespaces": keys.namespaces,
        "dirty": keys.dirty,
        "shard": keys.shard,
        "hot": keys.hot(ns),
    }


@RELAXED
@given(prefixes, st.integers(1, 64), threads, namespaces)
def test_all_keys_of_a_thread_lie_in_one_slot(prefix: str, shards: int, thread_id: str, ns: str) -> None:
    """One script may touch a thread's and its shard's keys on a Cluster, whatever braces its names hold."""
    keyspace = Keyspace(prefix, shards)

    slots = {key_slot(key) for key in all_of(keyspace.thread(thread_id), ns).values()}

    assert slots == {key_slot(keyspace.tag(keyspace.shard_of(thread_id)))}


@RELAXED
@given(st.lists(st.tuples(threads, namespaces), min_size=2, max_size=6, unique=True), st.integers(1, 3))
def test_no_two_namespaces_share_a_hot_hash(positions: list[tuple[str, str]], shards: int) -> None:
    """I9: `a:b` + `c` and `a` + `b:c` are two places; neither ever reads the other's checkpoint."""
    keyspace = Keyspace("p", shards)

    hot = {keyspace.thread(thread_id).hot(ns) for thread_id, ns in positions}

    assert len(hot) == len(positions)


@RELAXED
@given(st.text("a:1", min_size=3, max_size=10))
def test_a_colon_may_stand_anywhere_in_either_name(text: str) -> None:
    """I9: however a text is cut at its colons into thread and namespace, each cut is a place of its own."""
    keyspace = Keyspace("p", 1)
    cuts = [(text[:at], text[at + 1 :]) for at in range(1, len(text)) if text[at] == ":"]

    hot = {keyspace.thread(thread_id).hot(ns) for thread_id, ns in cuts}

    assert len(hot) == len(cuts)


@RELAXED
@given(st.lists(threads, min_size=2, max_size=5, unique=True), namespaces, st.integers(1, 3))
def test_no_key_of_one_thread_is_another_kind_of_key(thread_ids: list[str], ns: str, shards: int) -> None:
    """I5: deleting one thread's keys touches no other thread's journal, hot hash or set of namespaces."""
    keyspace = Keyspace("p", shards)

    own = [
        key
        for thread_id in thread_ids
        for kind, key in all_of(keyspace.thread(thread_id), ns).items()
        if kind not in ("dirty", "shard")
    ]
    shared = {key for shard in range(shards) for key in (keyspace.dirty(shard), keyspace.shard(shard))}

    assert len(set(own)) == len(own)
    assert not set(own) & (shared | {meta_key("p"), sweep_key("p")})


@RELAXED
@given(threads, namespaces)
def test_a_thread_s_hot_keys_begin_with_its_stem(thread_id: str, ns: str) -> None:
    """I5: a delete finds every hot hash as stem + namespace."""
    keys = Keyspace("p", 4).thread(thread_id)

    assert keys.hot(ns) == keys.hot_stem + ns.encode()


@RELAXED
@given(prefixes, prefixes, threads)
def test_installations_with_different_prefixes_share_no_key(one: str, other: str, thread_id: str) -> None:
    """Two installations on one Redis stay apart."""
    mine = set(all_of(Keyspace(one, 4).thread(thread_id), "").values()) | {meta_key(one), sweep_key(one)}
    theirs = set(all_of(Keyspace(other, 4).thread(thread_id), "").values()) | {meta_key(other), sweep_key(other)}

    assert bool(mine & theirs) == (one == other)


def test_the_shard_of_a_thread_never_changes() -> None:
    """I1: another version that computed another shard would not find what is journaled; these are recorded values."""
    keyspace = Keyspace("p", 64)

    assert [keyspace.shard_of(name) for name in ("", "a", "thread-1", "ünïcode {x}:/")] == [0, 3, 57, 30]
    assert all(0 <= Keyspace("p", shards).shard_of("thread-1") < shards for shards in (1, 2, 7, 4096))
