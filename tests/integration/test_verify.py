"""`verify` finds what must not be, in either tier and between them, and nothing where all is as it should be."""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
import redis
from langgraph.checkpoint.base import empty_checkpoint
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.checkpoint.serde.encrypted import EncryptedSerializer
from typer.testing import CliRunner

from langgraph_tiered_saver import TieredSaver, cli, drivers, operations, verify
from langgraph_tiered_saver.cold import maintenance
from langgraph_tiered_saver.cold import verify as cold_verify
from langgraph_tiered_saver.errors import HotTierUnavailableError, ThreadQuarantinedError
from langgraph_tiered_saver.hot.keys import Keyspace, ThreadKeys
from langgraph_tiered_saver.records import MaintenanceRecord
from langgraph_tiered_saver.verify import Problem, check
from tests.integration import graphs
from tests.integration.test_equivalence import (
    NEVER,
    Branch,
    Script,
    agent_loop,
    at,
    evict_hot,
    perform,
    task_id,
    workload,
)
from tests.integration.test_retention import counting_graph, long_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@dataclass
class Scene:
    """A saver, its servers, and the thread that something is done to."""

    saver: TieredSaver
    postgres: psycopg.Connection[Any]
    redis: redis.Redis
    prefix: str
    ids: list[str]

    @property
    def keys(self) -> ThreadKeys:
        return Keyspace(self.prefix, int(self.redis.hget(f"{{{self.prefix}}}:meta", "shards"))).thread("agent")

    def execute(self, statement: str, *values: Any) -> None:
        assert self.postgres.execute(statement.encode(), values).rowcount != 0, "the fault must be there"

    def newest(self) -> int:
        """The sequence number of the journal's last record."""
        return int(self.redis.xrevrange(self.keys.journal, count=1)[0][0].split(b"-")[0])


@contextmanager
def scene(
    make_saver: Callable[..., TieredSaver], postgres_url: str, redis_url: str, **settings: Any
) -> Iterator[Scene]:
    """A thread of five checkpoints, hot, in PostgreSQL unless nothing is flushed, beside another one."""
    # Nobody else tidies what a test leaves.
    saver = make_saver(**{"sweep_interval": 0, **settings})
    script, _ = long_thread("agent", 5)
    other, _ = long_thread("other", 3)
    perform(saver, script)
    perform(saver, other)
    if "flush_linger" not in settings:
        saver.flush()
    with (
        psycopg.connect(postgres_url, autocommit=True) as connection,
        redis.Redis.from_url(redis_url) as client,
    ):
        ids = [config["configurable"]["checkpoint_id"] for config in script.stored]
        yield Scene(saver, connection, client, saver.config.key_prefix, ids)


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing changes meanwhile, so a second look may come at once."""
    monkeypatch.setattr(verify, "_MOMENT", 0.01)


# --- nothing is found where nothing is wrong -------------------------------------------------------------------------


def test_nothing_is_found_after_all_kinds_of_operations(
    make_saver: Callable[..., TieredSaver], redis_url: str, key_prefix: str
) -> None:
    """Whatever was done, flushed or not, hot or evicted, pruned, copied or deleted: nothing is wrong."""
    saver = make_saver(flush_linger=NEVER)
    script = workload()
    perform(saver, script)
    assert list(check(saver)) == []
    saver.flush()
    assert list(check(saver)) == []
    saver.prune(["with subgraphs", "deltas"])
    saver.copy_thread("interrupted", "copied")
    saver.delete_thread("single")
    saver.delete_for_runs([script.calls[0][1][0]["metadata"]["run_id"]])
    assert list(check(saver)) == []
    more = Script()
    agent_loop(more, "single", long_text=True)
    perform(saver, more)
    for config in script.stored:
        saver.get_tuple(at(config["configurable"]["thread_id"], config["configurable"]["checkpoint_ns"]))
    assert list(check(saver)) == []
    evict_hot(redis_url, key_prefix)
    assert list(check(saver)) == []


def test_nothing_is_found_after_real_graphs(make_saver: Callable[..., TieredSaver], tmp_path: Path) -> None:
    """Interrupted, failed, forked, nested and fanned-out runs leave nothing that looks wrong."""
    saver = make_saver()
    for phase in ("begin", "resume"):
        found = graphs.perform(phase, saver, tmp_path, asynchronous=False)
        assert not any("traceback" in result for result in found.values() if isinstance(result, dict))
        assert list(check(saver)) == []


def test_nothing_is_found_while_graphs_run(make_saver: Callable[..., TieredSaver]) -> None:
    """What is on its way is not told: threads that are written, flushed and pruned meanwhile look right."""
    saver, checker = make_saver(), make_saver()
    graph = counting_graph(saver, 30)
    given = {"messages": ["in"], "log": ["in"], "count": 0}

    def run(name: str) -> None:
        graph.invoke(given, {"recursion_limit": 1000, "configurable": {"thread_id": name}})
        saver.prune([name], keep_last=5)

    running = [threading.Thread(target=run, args=(f"thread {number}",)) for number in range(3)]
    for thread in running:
        thread.start()
    found, checks = [], 0
    while any(thread.is_alive() for thread in running):
        found += list(check(checker))
        checks += 1
    for thread in running:
        thread.join()

    assert found == []
    assert checks >= 2
    assert list(check(checker)) == []


def test_values_of_other_bytes_are_compared_by_what_they_hold(
    make_saver: Callable[..., TieredSaver], redis_url: str, postgres_url: str, key_prefix: str
) -> None:
    """A value that was serialized twice, under a cipher say, is the same value though its bytes are not."""
    serde = EncryptedSerializer.from_pycryptodome_aes(key=b"0123456789abcdef")
    plain = make_saver()
    script, run = long_thread("agent", 3)
    run.step({"set": {"b", "a", "c"}, "nothing": None})
    with TieredSaver.from_conn_string(redis_url, postgres_url, key_prefix=key_prefix, serde=serde) as saver:
        perform(saver, script)
        saver.flush()
        evict_hot(redis_url, key_prefix)
        # Nothing is hot, so this one carries every channel again; PostgreSQL keeps the bytes that it has.
        run.script = more = Script()
        run.step({"channel 0": ["more"]})
        perform(saver, more)
        saver.flush()
        with redis.Redis.from_url(redis_url) as client:
            shards = int(client.hget(f"{{{key_prefix}}}:meta", "shards"))
            # The shard had seen the thread, so the hash is marked as uncertain; without that it is trusted.
            assert client.hdel(Keyspace(key_prefix, shards).thread("agent").hot(""), "u") == 1

        assert list(check(saver)) == []
        # Whoever has no key compares what can be compared.
        assert list(check(plain)) == []


# --- what is wrong is found ------------------------------------------------------------------------------------------


def lose_blob(s: Scene) -> None:
    s.execute(
        "DELETE FROM checkpoint_blobs WHERE (channel, version) IN (SELECT channel, min(version) FROM checkpoint_blobs"
        " WHERE thread_id = 'agent' AND channel = 'channel 0' GROUP BY channel)"
    )


def lose_parent(s: Scene) -> None:
    s.execute("DELETE FROM checkpoint_writes WHERE checkpoint_id = %s", s.ids[1])
    s.execute("DELETE FROM checkpoints WHERE checkpoint_id = %s", s.ids[1])


def leave_writes(s: Scene) -> None:
    s.execute(
        "INSERT INTO checkpoint_writes SELECT thread_id, checkpoint_ns, 'f' || checkpoint_id, task_id, idx, channel,"
        " type, blob, task_path, 1 FROM checkpoint_writes WHERE checkpoint_id = %s",
        s.ids[-1],
    )


def bring_back(s: Scene) -> None:
    s.execute("CREATE TABLE kept AS SELECT * FROM checkpoint_writes WHERE thread_id = 'agent'")
    s.saver.delete_thread("agent")
    s.execute("INSERT INTO checkpoint_writes SELECT * FROM kept LIMIT 1")


def lower_watermark(s: Scene) -> None:
    s.execute("UPDATE tiered_threads SET watermark = 5 WHERE thread_id = 'agent'")


def quarantine(s: Scene) -> None:
    runtime = s.saver._source.current()
    record = MaintenanceRecord(maintenance.RETAIN, {"keep_first": 1})
    with pytest.raises(ThreadQuarantinedError):
        drivers.run(runtime, operations._maintain(runtime, {"agent": record}))


def write_past_us(s: Scene) -> None:
    with PostgresSaver.from_conn_string(s.postgres.info.dsn + f" password={s.postgres.info.password}") as saver:
        config = {"configurable": {"thread_id": "agent", "checkpoint_ns": "", "checkpoint_id": s.ids[-1]}}
        saver.put(config, {**empty_checkpoint(), "v": 4}, {"source": "loop", "step": 9, "parents": {}}, {})


def lose_latest(s: Scene) -> None:
    s.execute("DELETE FROM checkpoint_writes WHERE checkpoint_id = %s", s.ids[-1])
    s.execute("DELETE FROM checkpoints WHERE checkpoint_id = %s", s.ids[-1])


def lose_thread(s: Scene) -> None:
    for table in ("checkpoints", "checkpoint_blobs", "checkpoint_writes", "tiered_threads"):
        s.execute(f"DELETE FROM {table} WHERE thread_id = 'agent'")


def edit_hot(s: Scene, field: bytes, value: bytes) -> None:
    assert s.redis.hset(s.keys.hot(""), field, value) == 0, "the field must be there"


def lose_hot_write(s: Scene) -> None:
    names = [name for name in s.redis.hkeys(s.keys.hot("")) if name.startswith(b"w:")]
    assert s.redis.hdel(s.keys.hot(""), *names)


def lose_hot_channel(s: Scene) -> None:
    assert s.redis.hdel(s.keys.hot(""), b"v:channel 1", b"b:channel 1") == 2


FLUSHED = {
    "blob": (lose_blob, "blob", "references 1 blobs, of which 0 exist; without a value: 'channel 0'"),
    "parent": (lose_parent, "parent", "the thread was never pruned"),
    "writes": (leave_writes, "writes", "does not exist, but 1 writes of it do"),
    "tombstone": (bring_back, "tombstone", "has rows that were written at"),
    "watermark": (lower_watermark, "watermark", "durable up to 5, but has rows up to"),
    "quarantine": (quarantine, "quarantine", "keep_first=1"),
    "cold is newer": (write_past_us, "hot", "which is older"),
    "cold is older": (lose_latest, "hot", "nothing is in the journal"),
    "cold knows nothing": (lose_thread, "hot", "PostgreSQL's latest is none"),
    "metadata": (partial(edit_hot, field=b"m", value=b'{"step": 77}'), "hot", "the metadata is another"),
    "checkpoint": (partial(edit_hot, field=b"c", value=b'{"v": 4, "channel_versions": {}}'), "hot", "is only cold"),
    "unreadable": (partial(edit_hot, field=b"c", value=b"{"), "hot", "cannot be read"),
    "hot parent": (partial(edit_hot, field=b"p", value=b"another"), "hot", "the parent is another"),
    "hot blob": (partial(edit_hot, field=b"b:channel 0", value=b"msgpack\0\x91\x63"), "hot", "'channel 0' is another"),
    "hot garbage": (partial(edit_hot, field=b"b:channel 0", value=b"msgpack\0\xc1"), "hot", "'channel 0' is another"),
    "hot write": (lose_hot_write, "hot", "write 0 of task"),
    "hot channel": (lose_hot_channel, "hot", "channel 'channel 1' is only cold"),
    "tail": (lambda s: s.redis.hset(s.keys.shard, b"t:agent", 7), "journal", "is empty, but the shard says"),
    "dirty": (lambda s: s.redis.zadd(s.keys.dirty, {b"agent": 7}), "journal", "is empty, but among the dirty threads"),
}


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("name", FLUSHED)
def test_a_fault_of_a_flushed_thread_is_found(
    make_saver: Callable[..., TieredSaver], postgres_url: str, redis_url: str, name: str
) -> None:
    """I1, I2, I5, I6: what is wrong is told of the thread it is wrong with, and of no other one."""
    plant, kind, says = FLUSHED[name]
    with scene(make_saver, postgres_url, redis_url) as s:
        plant(s)

        found = list(check(s.saver))

        assert {problem.thread_id for problem in found} == {"agent"}
        assert [problem for problem in found if problem.kind == kind and says in problem.what], found
        if name not in ("writes", "checkpoint"):
            assert {problem.kind for problem in found} == {kind}, found
        assert set(check(s.saver, ["agent"])) == set(found)
        assert list(check(s.saver, ["other"])) == []


def add_unreadable(s: Scene) -> None:
    s.redis.xadd(s.keys.journal, {b"r": b"nonsense"}, id=f"{s.newest() + 5}-0")


def add_foreign(s: Scene) -> None:
    s.redis.xadd(s.keys.journal, {b"field": b"value"}, id=f"{s.newest()}-3")


UNFLUSHED = {
    "unreadable": (add_unreadable, ["cannot be read", "but the shard says"]),
    "foreign": (add_foreign, ["was not made by this library"]),
    "no tail": (lambda s: s.redis.hdel(s.keys.shard, b"t:agent"), ["but the shard says that there is none"]),
    "not dirty": (lambda s: s.redis.zrem(s.keys.dirty, b"agent"), ["nobody would adopt them"]),
}


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("name", UNFLUSHED)
def test_a_fault_of_a_journal_is_found(
    make_saver: Callable[..., TieredSaver], postgres_url: str, redis_url: str, name: str
) -> None:
    """I1, I3: a journal that cannot be flushed in order, or that nobody would find, is told of."""
    plant, says = UNFLUSHED[name]
    with scene(make_saver, postgres_url, redis_url, flush_linger=NEVER) as s:
        plant(s)

        found = list(check(s.saver))

        assert {(problem.thread_id, problem.kind) for problem in found} == {("agent", "journal")}
        for words in says:
            assert [problem for problem in found if words in problem.what], found


def test_hot_state_that_nobody_trusts_is_not_compared(
    make_saver: Callable[..., TieredSaver], postgres_url: str, redis_url: str
) -> None:
    """Hot state of another generation, or marked uncertain, is nobody's answer, so it cannot be wrong."""
    with scene(make_saver, postgres_url, redis_url) as s:
        edit_hot(s, b"m", b'{"step": 77}')
        generation = s.redis.hget(s.keys.hot(""), b"g")
        edit_hot(s, b"g", b"0")
        assert list(check(s.saver)) == []
        edit_hot(s, b"g", generation)
        assert len(list(check(s.saver))) == 1
        s.redis.hset(s.keys.hot(""), b"u", s.ids[-1])
        assert list(check(s.saver)) == []


def test_notes_tell_what_is_only_worth_knowing(
    make_saver: Callable[..., TieredSaver], postgres_url: str, redis_url: str
) -> None:
    """Writes ahead of their checkpoint, records that wait for their acknowledgement and unknown names are notes."""
    with scene(make_saver, postgres_url, redis_url, flush_linger=NEVER) as s:
        script = Script()
        Branch(script, "ahead").write(task_id(1), [("a", 1)], checkpoint_id="1f000000")
        perform(s.saver, script)
        payloads = s.redis.xrange(s.keys.journal)
        s.saver.flush()
        # As if the acknowledgement had not come through.
        for name, fields in payloads:
            s.redis.xadd(s.keys.journal, fields, id=name)
        s.redis.hset(s.keys.shard, b"t:agent", s.newest())
        s.redis.zadd(s.keys.dirty, {b"agent": s.newest()})

        notes = list(check(s.saver, ["agent", "other", "ahead", "nobody"], notes=True))

        assert all(note.is_note for note in notes)
        assert {(note.kind, note.thread_id) for note in notes} == {
            ("journal", "agent"), ("writes", "ahead"), ("thread", "nobody"),
        }  # fmt: skip
        assert f"{len(payloads)} records are in PostgreSQL" in notes[0].what
        assert list(check(s.saver)) == []


@pytest.mark.usefixtures("brief")
def test_many_threads_are_looked_at_page_by_page(
    make_saver: Callable[..., TieredSaver], monkeypatch: pytest.MonkeyPatch, postgres_url: str, redis_url: str
) -> None:
    """Every thread of either tier is looked at once, whatever page it falls on, and so is every checkpoint."""
    monkeypatch.setattr(cold_verify, "PAGE", 2)
    monkeypatch.setattr(cold_verify, "_ROWS", 3)
    with scene(make_saver, postgres_url, redis_url) as s:
        for number in range(5):
            script, _ = long_thread(f"thread {number}", 4)
            perform(s.saver, script)
        s.saver.flush()
        unflushed = make_saver(flush_linger=NEVER)
        script, _ = long_thread("unflushed", 2)
        perform(unflushed, script)
        s.execute("DELETE FROM checkpoint_blobs WHERE channel = 'channel 0' AND thread_id <> 'other'")
        seen: list[tuple[int, int]] = []

        found = list(check(s.saver, progress=lambda done, of: seen.append((done, of))))

        threads = ["agent", *(f"thread {number}" for number in range(5))]
        assert sorted({problem.thread_id for problem in found}) == threads
        assert {problem.kind for problem in found} == {"blob", "hot"}
        assert len([p for p in found if p.thread_id == "agent" and p.kind == "blob"]) == 5
        assert seen[-1][0] == 8
        assert seen == sorted(seen)


def test_a_tier_that_is_away_is_an_error(
    make_saver: Callable[..., TieredSaver], monkeypatch: pytest.MonkeyPatch, postgres_url: str, redis_url: str
) -> None:
    """I7: what cannot be compared is not reported as right."""
    with scene(make_saver, postgres_url, redis_url) as s:
        client = s.saver._source.current().client
        nowhere = redis.Redis(host="127.0.0.1", port=1, retry=None)
        monkeypatch.setattr(s.saver._source.current(), "client", nowhere)
        with pytest.raises(HotTierUnavailableError):
            list(check(s.saver))
        monkeypatch.setattr(s.saver._source.current(), "client", client)


@pytest.mark.usefixtures("brief")
def test_the_command_lists_problems_and_exits_with_1(
    make_saver: Callable[..., TieredSaver], postgres_url: str, redis_url: str, key_prefix: str
) -> None:
    """Exit code 0 and a summary if all is right, else 1 and what is wrong, as text or as lines of JSON."""
    urls = {"LANGGRAPH_TIERED_REDIS_URL": redis_url, "LANGGRAPH_TIERED_POSTGRES_URL": postgres_url}

    def run(*arguments: str) -> Any:
        return CliRunner().invoke(cli.app, ["verify", "--key-prefix", key_prefix, *arguments], env=urls)

    with scene(make_saver, postgres_url, redis_url) as s:
        right = run("--json")
        lose_parent(s)
        wrong, listed, named = run(), run("--json"), run("other", "nobody", "--notes")

    assert (right.exit_code, json.loads(right.stdout)) == (0, {"threads": 2, "problems": 0, "notes": 0})
    assert wrong.exit_code == listed.exit_code == 1
    where = f"thread 'agent', namespace '', checkpoint {s.ids[2]}"
    assert wrong.stdout.startswith(f"Problem (parent) in {where}: its parent {s.ids[1]} does not exist")
    assert "What to do: " in wrong.stdout
    assert wrong.stdout.endswith("2 threads: 1 problems.\n")
    problem, summary = map(json.loads, listed.stdout.splitlines())
    assert Problem(**problem).checkpoint_id == s.ids[2]
    assert summary == {"threads": 2, "problems": 1, "notes": 0}
    assert named.exit_code == 0
    assert named.stdout.splitlines()[0].startswith("Note (thread) in thread 'nobody': nothing is stored")
