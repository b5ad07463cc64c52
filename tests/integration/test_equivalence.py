"""The same calls through PostgresSaver and through TieredSaver read the same, whichever tier answers."""

from __future__ import annotations

import asyncio
import operator
import uuid
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from decimal import Decimal
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

import psycopg
import pytest
import redis
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langgraph.channels.delta import DeltaChannel
from langgraph.checkpoint.base import ERROR, INTERRUPT, RESUME, SCHEDULED, CheckpointTuple
from langgraph.checkpoint.base.id import uuid6
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.checkpoint.serde.types import TASKS, _DeltaSnapshot
from langgraph.graph import END, START, StateGraph
from psycopg.rows import dict_row

from langgraph_tiered_saver import codec
from langgraph_tiered_saver.cold import writer
from langgraph_tiered_saver.records import MaintenanceRecord, decode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from langchain_core.runnables import RunnableConfig
    from langgraph.checkpoint.base import BaseCheckpointSaver

    from langgraph_tiered_saver import TieredSaver
from langgraph_tiered_saver.conversion import convert

NULL_TASK = "00000000-0000-0000-0000-000000000000"
NEVER = 600.0  # seconds of linger: nothing is flushed before somebody waits for it
ESSAY = "long enough to be a blob under us and inline under PostgresSaver. " * 40

# --- the workload ----------------------------------------------------------------------------------------------------


@dataclass
class Script:
    """Calls as LangGraph makes them, recorded once, so that every saver receives the same ones.

    Attributes:
        calls: `(method, arguments)`, in order.
        stored: The config of every checkpoint that was put.
    """

    calls: list[tuple[str, tuple[Any, ...]]] = field(default_factory=list)
    stored: list[RunnableConfig] = field(default_factory=list)

    def split(self, share: float) -> tuple[Script, Script]:
        """Cut into what one saver does first and another one goes on with."""
        cut = int(len(self.calls) * share)
        return Script(self.calls[:cut], self.stored), Script(self.calls[cut:], self.stored)


class Branch:
    """One line of checkpoints of a thread and namespace."""

    def __init__(
        self,
        script: Script,
        thread_id: str,
        ns: str = "",
        *,
        parents: Mapping[str, str] | None = None,
        run_id: str = "",
    ) -> None:
        self.script = script
        self.thread_id = thread_id
        self.ns = ns
        self.parents = dict(parents or {})
        self.run_id = run_id or str(uuid.uuid4())
        self.step_number = -2
        self.id = ""
        self.values: dict[str, Any] = {}
        self.versions: dict[str, str] = {}
        self.seen: dict[str, dict[str, str]] = {"__input__": {}}

    def config(self, checkpoint_id: str | None = None) -> RunnableConfig:
        configurable: dict[str, Any] = {"thread_id": self.thread_id, "checkpoint_ns": self.ns}
        if checkpoint_id or self.id:
            configurable["checkpoint_id"] = checkpoint_id or self.id
        return {"configurable": configurable}

    def step(
        self,
        changes: Mapping[str, Any],
        *,
        lost: Sequence[str] = (),
        source: str = "loop",
        checkpoint_id: str | None = None,
        **metadata: Any,
    ) -> str:
        """Put the next checkpoint: some channels change, ephemeral ones lose their value, the others stay."""
        self.step_number += 1
        version = InMemorySaver().get_next_version(max(self.versions.values(), default=None), None)
        new_versions = dict.fromkeys([*changes, *lost], version)
        self.versions = {**self.versions, **new_versions}
        self.values = {**{k: v for k, v in self.values.items() if k not in lost}, **changes}
        self.seen = {**self.seen, "agent": dict(self.versions)}
        put_config = self.config()
        put_config["configurable"]["model"] = "planner-1"
        put_config["metadata"] = {"user": "ada", "run_id": self.run_id}
        checkpoint = {
            "v": 4,
            "ts": datetime.now(timezone.utc).isoformat(),
            "id": checkpoint_id or str(uuid6(clock_seq=self.step_number)),
            "channel_values": dict(self.values),
            "channel_versions": dict(self.versions),
            "versions_seen": {node: dict(seen) for node, seen in self.seen.items()},
            "updated_channels": sorted(changes),
        }
        described = {"source": source, "step": self.step_number, "parents": self.parents, **metadata}
        self.script.calls.append(("put", (put_config, checkpoint, described, new_versions)))
        self.id = checkpoint["id"]
        # A _DeltaSnapshot is stored once; the next checkpoints go without the channel's value.
        self.values = {k: v for k, v in self.values.items() if not isinstance(v, _DeltaSnapshot)}
        self.script.stored.append(self.config())
        return self.id

    def put_again(self, **metadata: Any) -> None:
        """Put the same checkpoint once more, with other metadata."""
        put = next(c for c in reversed(self.script.calls) if c[0] == "put" and c[1][1]["id"] == self.id)
        config, checkpoint, described, _ = put[1]
        self.script.calls.append(("put", (config, checkpoint, {**described, **metadata}, {})))

    def write(
        self, task: str, writes: Sequence[tuple[str, Any]], path: str = "", *, checkpoint_id: str | None = None
    ) -> None:
        self.script.calls.append(("put_writes", (self.config(checkpoint_id), list(writes), task, path)))

    def fork(self) -> Branch:
        """Start another branch from where this one is now."""
        other = Branch(self.script, self.thread_id, self.ns, parents=self.parents)
        other.step_number, other.id = self.step_number, self.id
        other.values, other.versions, other.seen = dict(self.values), dict(self.versions), dict(self.seen)
        return other


def task_id(number: int) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_OID, f"task {number}"))


def agent_loop(script: Script, thread_id: str, *, long_text: bool) -> Branch:
    """A tool-calling loop with ephemeral channels, parallel tasks, an interrupt and forks."""
    run = Branch(script, thread_id)
    messages: list[Any] = [HumanMessage("Läs filerna 🎈", id="m0")]
    run.step({"__start__": {"messages": list(messages)}}, source="input")
    run.write(NULL_TASK, [("messages", messages[0]), ("branch:to:agent", None)])
    run.step(
        {
            "messages": list(messages),
            "branch:to:agent": None,
            "files": {"a.py": b"\x00\xff", "b.py": ["x", {"deep": (1, 2)}]},
            "owner": uuid.UUID(int=7),
            "budget": Decimal("1.50"),
            "empty": "",
            **({"essay": ESSAY} if long_text else {}),
        },
        lost=["__start__"],
    )
    for turn in range(1, 5):
        forked = run.fork() if turn == 3 else None
        # Parallel tasks finish in any order; their path is the order that counts.
        for number in (2, 0, 1):
            run.write(
                task_id(10 * turn + number),
                [("messages", ToolMessage(f"result {number}", tool_call_id=str(number))), ("counter", number)],
                f"~__pregel_pull, {2 - number:010d}, tools",
            )
        call = {"name": "read", "args": {"path": f"{turn}.py"}, "id": str(turn)}
        messages.append(AIMessage("", tool_calls=[call], id=f"m{turn}"))
        run.step(
            {"messages": list(messages), "counter": turn, "score": turn / 3, "done": turn == 4},
            lost=["branch:to:agent"] if turn == 1 else [],
            nested={"turn": {"number": turn, "even": turn % 2 == 0}},
            tags=["loop", f"turn-{turn}"],
        )
        if turn == 2:
            run.step({"branch:to:agent": None, "score": None})
        if forked is not None:
            forked.step({"messages": [HumanMessage("other", id="f0")], "note": "forked"}, source="fork")
            forked.write(task_id(77), [("messages", "on the fork")], "~__pregel_pull, agent")
            forked.step({"note": "forked twice"}, source="update")
            # The older branch goes on; its next checkpoints are newer than the fork's.
    return run


def interrupted(script: Script, thread_id: str) -> Branch:
    """Special writes that replace each other, regular ones that do not, and calls that mix both."""
    run = Branch(script, thread_id)
    run.step({"__start__": {"q": 1}}, source="input")
    run.step({"q": 1, "answers": []}, lost=["__start__"])
    # What a task writes may arrive before its checkpoint.
    following = str(uuid6(clock_seq=1))
    run.write(task_id(1), [("answers", "early"), ("q", 2)], "~__pregel_pull, b", checkpoint_id=following)
    run.write(task_id(2), [(ERROR, "early error")], "~__pregel_pull, a", checkpoint_id=following)
    run.step({"answers": ["x"]}, checkpoint_id=following)
    run.write(task_id(3), [(INTERRUPT, ({"ask": "first?"},))], "~__pregel_pull, c")
    run.write(task_id(3), [(INTERRUPT, ({"ask": "second?"},))], "~__pregel_pull, c")
    run.write(task_id(2), [(ERROR, "later error")], "~__pregel_pull, a")
    run.write(NULL_TASK, [(RESUME, "yes")])
    run.write(NULL_TASK, [(RESUME, "no")])
    run.write(task_id(3), [(RESUME, ["yes", "no"])], "~__pregel_pull, c")
    run.write(task_id(4), [(SCHEDULED, None)], "~__pregel_pull, d")
    run.write(task_id(4), [(SCHEDULED, True), (ERROR, {"code": 1})], "~__pregel_pull, d")
    # Regular writes: the first stays. A call that mixes both replaces nothing.
    run.write(task_id(1), [("answers", "repeated"), ("q", 3), ("extra", 9)], "~__pregel_pull, b")
    run.write(task_id(5), [("answers", 1), (INTERRUPT, "mixed"), ("q", None)], "~__pregel_pull, e")
    run.write(task_id(5), [("answers", 2), (INTERRUPT, "mixed again"), ("q", 5)], "~__pregel_pull, e")
    run.write(task_id(5), [(INTERRUPT, "replaced")], "~__pregel_pull, e")
    run.write(task_id(5), [("answers", 3), (INTERRUPT, "not replaced")], "~__pregel_pull, e")
    run.write(task_id(6), [(TASKS, {"node": "worker", "arg": n}) for n in range(3)], "~__pregel_pull, f")
    older = run.id
    run.put_again(writes={"dropped": True}, retried=True)
    run.step({"answers": ["x", "y"]})
    run.write(task_id(7), [("answers", "late, on an older checkpoint")], "~__pregel_pull, g", checkpoint_id=older)
    run.write(NULL_TASK, [(RESUME, "late, on an older checkpoint")], checkpoint_id=older)
    run.write(task_id(8), [("answers", "on the latest")], "~__pregel_pull, h")
    return run


def subgraphs(script: Script, thread_id: str) -> None:
    """A parent with subgraph calls, one nested, and one subgraph whose state outlives its calls."""
    root = Branch(script, thread_id)
    root.step({"__start__": {"n": 0}}, source="input")
    lasting = Branch(script, thread_id, "memory")
    for call in range(3):
        parent = root.step({"n": call, "log": list(range(call))}, lost=["__start__"] if call == 0 else [])
        child = Branch(script, thread_id, f"child:{task_id(100 + call)}", parents={"": parent})
        child.step({"n": call}, source="input")
        child.write(task_id(200 + call), [("n", call + 1)], "~__pregel_pull, inner")
        middle = child.step({"n": call + 1, "seen": [call]})
        grand = Branch(script, thread_id, f"{child.ns}|grand:{task_id(300)}", parents={"": parent, child.ns: middle})
        grand.step({"depth": 2, "path": ("a", "b")})
        lasting.parents = {"": parent}
        lasting.step({"facts": [f"fact {n}" for n in range(call + 1)]})
        root.write(task_id(400 + call), [("log", call)], "~__pregel_pull, child")
    root.step({"log": [0, 1, 2]})


def deltas(script: Script, thread_id: str) -> None:
    """What graphs with a DeltaChannel leave: writes, now and then a snapshot, and an older plain value."""
    run = Branch(script, thread_id)
    run.step({"log": ["plain"], "plain": ["p"], "count": 3}, source="input")
    for turn in range(7):
        for number in (1, 0):
            path = f"~__pregel_pull, {number}"
            run.write(task_id(50 * turn + number), [("log", [f"{turn}.{number}"]), ("n", turn)], path)
        if turn == 3:
            run.step({"log": _DeltaSnapshot(["snapshot", turn])})
            forked = run.fork()
        elif turn == 4:
            # Nobody wrote to the channel: its version still names the snapshot, which is not among the values.
            run.step({"n": turn}, counters_since_delta_snapshot={"log": (0, 1)})
        else:
            run.step({"n": turn}, lost=["log"], counters_since_delta_snapshot={"log": (turn, turn)})
    forked.step({"n": 90}, source="fork", counters_since_delta_snapshot={"log": (0, 1)})
    forked.write(task_id(99), [("log", ["on the fork"])], "~__pregel_pull, 0")
    forked.step({"n": 91}, lost=["log"], counters_since_delta_snapshot={"log": (1, 2)})


def workload(*, long_text: bool = True) -> Script:
    """Everything above, on threads whose names are not only letters."""
    script = Script()
    agent_loop(script, "agent {1}:/ ü", long_text=long_text)
    interrupted(script, "interrupted")
    subgraphs(script, "with subgraphs")
    deltas(script, "deltas")
    Branch(script, "single").step({"only": [1]}, source="input")
    # Writes whose checkpoint never came: there is no checkpoint to read.
    Branch(script, "orphaned writes").write(task_id(1), [("a", 1)], checkpoint_id=str(uuid6()))
    return script


# --- performing and observing ----------------------------------------------------------------------------------------


def perform(saver: BaseCheckpointSaver[str], script: Script, *, asynchronous: bool = False) -> None:
    async def go() -> None:
        for method, arguments in script.calls:
            await getattr(saver, f"a{method}")(*arguments)

    if asynchronous:
        asyncio.run(go())
        return
    for method, arguments in script.calls:
        getattr(saver, method)(*arguments)


@dataclass(frozen=True)
class Probe:
    """A read: `get_tuple`, `list` or `get_delta_channel_history`, and its arguments."""

    method: str
    arguments: tuple[Any, ...] = ()
    keywords: Mapping[str, Any] = field(default_factory=dict)

    def run(self, saver: BaseCheckpointSaver[str]) -> Any:
        found = getattr(saver, self.method)(*self.arguments, **self.keywords)
        return exact(list(found) if self.method == "list" else found)

    async def arun(self, saver: BaseCheckpointSaver[str]) -> Any:
        found = getattr(saver, f"a{self.method}")(*self.arguments, **self.keywords)
        return exact([one async for one in found] if self.method == "list" else await found)


def at(thread_id: str, ns: str | None = None, checkpoint_id: str | None = None) -> RunnableConfig:
    parts = {"thread_id": thread_id, "checkpoint_ns": ns, "checkpoint_id": checkpoint_id}
    return {"configurable": {name: value for name, value in parts.items() if value is not None}}


def positions(script: Script) -> list[tuple[str, str]]:
    return sorted({(c["configurable"]["thread_id"], c["configurable"]["checkpoint_ns"]) for c in script.stored})


def latest_probes(script: Script) -> list[Probe]:
    return [Probe("get_tuple", (at(thread, ns),)) for thread, ns in positions(script)]


def get_probes(script: Script) -> list[Probe]:
    missing = [
        at("nobody", ""),
        at("orphaned writes", ""),
        at("single", "no such namespace"),
        at("single", "", str(uuid6())),
        at("nobody", "", script.stored[0]["configurable"]["checkpoint_id"]),
    ]
    threads = [at(thread) for thread in sorted({thread for thread, _ in positions(script)})]
    return latest_probes(script) + [Probe("get_tuple", (config,)) for config in [*script.stored, *missing, *threads]]


def list_probes(script: Script) -> list[Probe]:
    ids = sorted(config["configurable"]["checkpoint_id"] for config in script.stored)
    child = next(ns for thread, ns in positions(script) if ns.startswith("child:"))
    agent = next(thread for thread, _ in positions(script) if thread.startswith("agent"))
    chosen = next(c["configurable"] for c in script.stored if c["configurable"]["checkpoint_ns"] == child)
    configs = [
        None,
        at(agent),
        at(agent, ""),
        at("with subgraphs"),
        at("with subgraphs", ""),
        at("with subgraphs", child),
        at("with subgraphs", child, chosen["checkpoint_id"]),
        at("with subgraphs", None, chosen["checkpoint_id"]),
        at("interrupted"),
        at("nobody"),
        at("with subgraphs", "no such namespace"),
    ]
    filters: list[dict[str, Any] | None] = [
        None,
        {},
        {"source": "loop"},
        {"source": "loop", "step": 1},
        {"nested": {"turn": {"even": True}}},
        {"tags": ["turn-3"]},
        {"user": "ada", "model": "planner-1"},
        {"retried": True},
        {"source": "nowhere"},
    ]
    befores = [None, at("elsewhere", "", ids[len(ids) // 2]), at("elsewhere", "", ids[0])]
    limits = [None, 0, 1, 3]
    probes = [
        Probe("list", (config,), {"filter": filters[0], "before": before, "limit": limit})
        for config in configs
        for before in befores
        for limit in limits
    ]
    for wanted in filters[1:]:
        probes += [Probe("list", (config,), {"filter": wanted}) for config in configs]
        probes += [
            Probe("list", (config,), {"filter": wanted, "before": befores[1], "limit": 2}) for config in configs[:5]
        ]
    return probes


def delta_probes(script: Script) -> list[Probe]:
    targets = [c for c in script.stored if c["configurable"]["thread_id"] == "deltas"]
    targets += [at("deltas", ""), at("nobody", ""), at("deltas", "", str(uuid6())), at("interrupted", "")]
    wanted = [["log"], ["log", "plain", "n", "absent"], ["count", "answers"], []]
    return [
        Probe("get_delta_channel_history", (), {"config": config, "channels": channels})
        for config in targets
        for channels in wanted
    ]


def observe(saver: BaseCheckpointSaver[str], probes: Sequence[Probe], *, asynchronous: bool = False) -> list[Any]:
    async def go() -> list[Any]:
        return [await probe.arun(saver) for probe in probes]

    return asyncio.run(go()) if asynchronous else [probe.run(saver) for probe in probes]


def exact(value: Any) -> Any:
    """Make 1, 1.0 and True differ, inside containers too, so that `==` compares types as well as values."""
    if isinstance(value, CheckpointTuple):
        return {name: exact(part) for name, part in value._asdict().items()}
    if isinstance(value, dict):
        return {key: exact(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return (type(value).__name__, [exact(item) for item in value])
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return (type(value).__name__, value)
    return value


def assert_same(probes: Sequence[Probe], found: Sequence[Any], expected: Sequence[Any]) -> None:
    for probe, one, other in zip(probes, found, expected, strict=True):
        assert one == other, probe


def evict_hot(redis_url: str, key_prefix: str) -> int:
    """Remove every hot hash of a prefix, as a TTL or an eviction would; the journal stays."""
    with redis.Redis.from_url(redis_url) as client:
        names = list(client.scan_iter(match=f"{{{key_prefix}:*}}:hot:*", count=1000))
        return int(client.delete(*names)) if names else 0


def enter_views(connection: psycopg.Connection[Any]) -> bool:
    """Let names mean the views of whole values, if the database has compact storage; tell whether it has."""
    state = connection.execute("SELECT to_regclass('tiered_state') IS NOT NULL AS made").fetchone()
    state = state[0] if isinstance(state, tuple) else state["made"]  # type: ignore[index,call-overload]
    query = "SELECT set_config('search_path', value, false) FROM tiered_state WHERE name = 'views'"
    return bool(state) and connection.execute(query).fetchone() is not None


@contextmanager
def postgres_saver(url: str) -> Iterator[PostgresSaver]:
    with PostgresSaver.from_conn_string(url) as saver:
        enter_views(saver.conn)  # type: ignore[arg-type]
        saver.setup()
        yield saver


ROWS = {
    "checkpoints": """SELECT thread_id, checkpoint_ns, checkpoint_id, parent_checkpoint_id, type, checkpoint, metadata
        FROM checkpoints ORDER BY 1, 2, 3""",
    "checkpoint_blobs": """SELECT thread_id, checkpoint_ns, channel, version, type, blob
        FROM checkpoint_blobs ORDER BY 1, 2, 3, 4""",
    "checkpoint_writes": """SELECT thread_id, checkpoint_ns, checkpoint_id, task_id, idx, task_path, channel, type, blob
        FROM checkpoint_writes ORDER BY 1, 2, 3, 4, 5""",
}


def rows_of(url: str) -> dict[str, list[dict[str, Any]]]:
    """Read every row that PostgresSaver knows of, without our own columns and what is only a base of deltas."""
    with psycopg.connect(url, row_factory=dict_row) as connection:
        compact = enter_views(connection)
        rows = {table: connection.execute(query).fetchall() for table, query in ROWS.items()}
        if compact:
            spare = {tuple(row.values()) for row in connection.execute(UNREFERENCED_BLOBS)}
            keys = ("thread_id", "checkpoint_ns", "channel", "version")
            blobs = rows["checkpoint_blobs"]
            rows["checkpoint_blobs"] = [row for row in blobs if tuple(row[key] for key in keys) not in spare]
        return rows


UNREFERENCED_BLOBS = """
SELECT b.thread_id, b.checkpoint_ns, b.channel, b.version FROM checkpoint_blobs b
WHERE NOT EXISTS (
    SELECT 1 FROM checkpoints c
    WHERE c.thread_id = b.thread_id AND c.checkpoint_ns = b.checkpoint_ns
    AND c.checkpoint -> 'channel_versions' ->> b.channel = b.version)"""

BASES = """
WITH RECURSIVE needed AS (
    SELECT c.thread_id, c.checkpoint_ns, v.key AS channel, v.value AS version
    FROM checkpoints c, jsonb_each_text(c.checkpoint -> 'channel_versions') AS v
    UNION
    SELECT d.thread_id, d.checkpoint_ns, d.channel, d.base FROM needed
    JOIN tiered_deltas d USING (thread_id, checkpoint_ns, channel, version)
)
SELECT thread_id, checkpoint_ns, channel, version FROM needed"""


def unreferenced_blobs(url: str) -> list[tuple[Any, ...]]:
    """Find versions that no checkpoint references, and none that one references is made from."""
    with psycopg.connect(url) as connection:
        bases = set(connection.execute(BASES).fetchall())
        enter_views(connection)
        return [blob for blob in connection.execute(UNREFERENCED_BLOBS).fetchall() if blob not in bases]


def missing_values(url: str, expected: Mapping[tuple[str, str, str], set[str]]) -> list[tuple[str, ...]]:
    """Find channels whose value PostgreSQL has neither inline nor as a blob, of the checkpoints it has.

    Args:
        url: The database.
        expected: By thread, namespace and checkpoint id, the channels that had a value when it was put.
    """
    missing = []
    with psycopg.connect(url, row_factory=dict_row) as connection:
        enter_views(connection)
        blobs = {
            (row["thread_id"], row["checkpoint_ns"], row["channel"], row["version"])
            for row in connection.execute("SELECT thread_id, checkpoint_ns, channel, version FROM checkpoint_blobs")
        }
        for row in connection.execute("SELECT thread_id, checkpoint_ns, checkpoint_id, checkpoint FROM checkpoints"):
            key = (row["thread_id"], row["checkpoint_ns"], row["checkpoint_id"])
            versions = row["checkpoint"]["channel_versions"]
            missing += [
                (*key, channel)
                for channel in expected[key]
                if channel not in row["checkpoint"]["channel_values"]
                and (*key[:2], channel, versions[channel]) not in blobs
            ]
    return missing


def channels_of(script: Script) -> dict[tuple[str, str, str], set[str]]:
    """The channels with a value, by thread, namespace and checkpoint id."""
    return {
        (config["configurable"]["thread_id"], config["configurable"]["checkpoint_ns"], checkpoint["id"]): set(
            checkpoint["channel_values"]
        )
        for config, checkpoint, _, _ in (arguments for method, arguments in script.calls if method == "put")
    }


@pytest.fixture(params=["standard", "compact"])
def saver_settings(request: pytest.FixtureRequest, key_prefix: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Every test runs in both storages; with compact storage, the short values here are sent as deltas too."""
    if request.param == "compact":
        monkeypatch.setattr(codec, "LEAST_DELTA_BASE", 1)
    return {"key_prefix": key_prefix, "storage": request.param}


@pytest.fixture(scope="module")
def script() -> Script:
    return workload()


@pytest.fixture
def reference(make_database: Callable[[], str]) -> Iterator[PostgresSaver]:
    """A plain PostgresSaver on a database of its own."""
    with postgres_saver(make_database()) as saver:
        yield saver


# --- reads -----------------------------------------------------------------------------------------------------------

DRIVERS = pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])


@DRIVERS
def test_hot_reads_equal_postgres_saver(
    make_saver: Callable[..., TieredSaver], reference: PostgresSaver, script: Script, asynchronous: bool
) -> None:
    """I9: before anything is flushed, `get_tuple` gives what PostgresSaver gives; latest ones come from Redis alone."""
    saver = make_saver(flush_linger=NEVER, durable_channels="")
    perform(reference, script)
    perform(saver, script, asynchronous=asynchronous)
    # A fork does not carry the snapshots of delta channels that it names, so that the cold tier is asked for it.
    latest = [probe for probe in latest_probes(script) if probe.arguments[0]["configurable"]["thread_id"] != "deltas"]

    found = observe(saver, latest, asynchronous=asynchronous)

    assert_same(latest, found, observe(reference, latest))
    stats = saver.stats()
    assert (stats.hot_hits, stats.hot_misses, stats.flushed_records) == (len(latest), 0, 0)
    probes = get_probes(script)
    assert_same(probes, observe(saver, probes, asynchronous=asynchronous), observe(reference, probes))


@DRIVERS
def test_unflushed_lists_equal_postgres_saver(
    make_saver: Callable[..., TieredSaver], reference: PostgresSaver, script: Script, asynchronous: bool
) -> None:
    """I9: `list` and the delta history see every acknowledged record though nobody asked for a flush."""
    saver = make_saver(flush_linger=NEVER, durable_channels="")
    perform(reference, script)
    perform(saver, script, asynchronous=asynchronous)
    probes = list_probes(script) + delta_probes(script)
    assert saver.stats().flushed_records == 0

    found = observe(saver, probes, asynchronous=asynchronous)

    assert_same(probes, found, observe(reference, probes))


@DRIVERS
@pytest.mark.parametrize("evicted", [False, True], ids=["flushed", "evicted"])
def test_reads_after_flush_equal_postgres_saver(
    make_saver: Callable[..., TieredSaver],
    reference: PostgresSaver,
    script: Script,
    redis_url: str,
    key_prefix: str,
    evicted: bool,
    asynchronous: bool,
) -> None:
    """I6, I9: after a flush, and after the hot hashes are gone too, every read gives what PostgresSaver gives."""
    saver = make_saver()
    perform(reference, script)
    perform(saver, script, asynchronous=asynchronous)
    if asynchronous:
        asyncio.run(saver.aflush())
    else:
        saver.flush()
    if evicted:
        assert evict_hot(redis_url, key_prefix) >= len(positions(script))
    probes = get_probes(script) + list_probes(script) + delta_probes(script)

    found = observe(saver, probes, asynchronous=asynchronous)

    assert_same(probes, found, observe(reference, probes))


def test_warmed_reads_equal_postgres_saver(
    make_saver: Callable[..., TieredSaver], reference: PostgresSaver, script: Script, redis_url: str, key_prefix: str
) -> None:
    """I9: a checkpoint that a miss made hot again is answered by Redis, value for value."""
    saver = make_saver()
    perform(reference, script)
    perform(saver, script)
    saver.flush()
    evict_hot(redis_url, key_prefix)
    probes = latest_probes(script)
    observe(saver, probes)
    hits, cold = saver.stats().hot_hits, saver.stats().cold_reads

    found = observe(saver, probes)

    assert_same(probes, found, observe(reference, probes))
    assert (saver.stats().hot_hits - hits, saver.stats().cold_reads - cold) == (len(probes), 0)


def test_pages_of_a_long_thread_equal_postgres_saver(
    make_saver: Callable[..., TieredSaver], reference: PostgresSaver
) -> None:
    """I9: `list` of one namespace is read in pages; none of its checkpoints is lost or repeated at a border."""
    script = Script()
    run = Branch(script, "long")
    for number in range(405):
        run.step({"n": [number]}, half=number % 2)
    saver = make_saver()
    perform(reference, script)
    perform(saver, script)
    before = at("long", "", script.stored[403]["configurable"]["checkpoint_id"])
    probes = [
        Probe("list", (at("long", ""),), {"limit": limit, "before": border, "filter": wanted})
        for limit in (None, 199, 200, 201, 400, 401, 500)
        for border in (None, before)
        for wanted in (None, {"half": 1})
    ]

    found = observe(saver, probes)

    assert_same(probes, found, observe(reference, probes))
    assert len(found[0][1]) == 405


# --- one database, two savers ----------------------------------------------------------------------------------------


def test_flush_leaves_the_rows_postgres_saver_would(
    make_saver: Callable[..., TieredSaver], make_database: Callable[[], str], postgres_url: str
) -> None:
    """I1: after `flush()` all three tables hold exactly the rows that PostgresSaver makes of the same calls."""
    script = workload(long_text=False)
    saver, other_url = make_saver(), make_database()
    with postgres_saver(other_url) as reference:
        perform(reference, script)
    perform(saver, script)

    saver.flush()

    assert rows_of(postgres_url) == rows_of(other_url)


def test_postgres_saver_reads_our_threads(
    make_saver: Callable[..., TieredSaver], reference: PostgresSaver, script: Script, postgres_url: str
) -> None:
    """I1, I2: after `flush()` a plain PostgresSaver on our database reads every thread value for value.

    With compact storage, on the views.
    """
    saver = make_saver()
    perform(reference, script)
    perform(saver, script)
    saver.flush()
    probes = get_probes(script) + list_probes(script) + delta_probes(script)

    with postgres_saver(postgres_url) as plain:
        found = observe(plain, probes)

    assert_same(probes, found, observe(reference, probes))
    with psycopg.connect(postgres_url) as connection:
        stored = connection.execute("SELECT count(*) FROM tiered_deltas").fetchone()
    assert stored is not None
    assert (stored[0] > 0) == (saver.config.storage == "compact")


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8, 1.0])
def test_threads_of_postgres_saver_resume_under_us(
    make_saver: Callable[..., TieredSaver],
    reference: PostgresSaver,
    script: Script,
    postgres_url: str,
    share: float,
) -> None:
    """I2, I9: a thread that PostgresSaver began is read and continued by us, and PostgresSaver reads what comes out."""
    first, second = script.split(share)
    perform(reference, first)
    with postgres_saver(postgres_url) as plain:
        perform(plain, first)
    saver = make_saver()
    latest, probes = latest_probes(script), get_probes(script) + list_probes(script) + delta_probes(script)

    assert_same(latest, observe(saver, latest), observe(reference, latest))
    perform(saver, second)
    perform(reference, second)

    expected = observe(reference, probes)
    assert_same(probes, observe(saver, probes), expected)
    saver.flush()
    with postgres_saver(postgres_url) as plain:
        assert_same(probes, observe(plain, probes), expected)


def test_threads_of_ours_continue_under_postgres_saver(
    make_saver: Callable[..., TieredSaver],
    reference: PostgresSaver,
    script: Script,
    postgres_url: str,
    redis_url: str,
    key_prefix: str,
    saver_settings: dict[str, Any],
) -> None:
    """I2, I6: a thread that we began goes on under PostgresSaver, and under us again once it is not hot.

    From compact storage it is converted first: PostgresSaver writes to the tables of standard storage only.
    """
    first, second = script.split(0.5)
    perform(reference, script)
    saver = make_saver()
    perform(saver, first)
    saver.flush()
    if saver_settings["storage"] == "compact":
        saver.close()
        saver = make_saver(storage="standard")
        convert(saver, "standard")
    with PostgresSaver.from_conn_string(postgres_url) as plain:
        perform(plain, second)
    evict_hot(redis_url, key_prefix)
    probes = get_probes(script) + list_probes(script) + delta_probes(script)

    found = observe(saver, probes)

    assert_same(probes, found, observe(reference, probes))


def test_checkpoints_of_an_older_format_equal_postgres_saver(
    make_saver: Callable[..., TieredSaver], reference: PostgresSaver, redis_url: str, key_prefix: str
) -> None:
    """I9: before format 4, the parent's pending sends are part of a checkpoint, whichever tier answers."""
    script = Script()
    run = Branch(script, "old")
    run.step({"a": [1]})
    run.write(task_id(1), [(TASKS, {"send": 1}), (TASKS, {"send": 2})], "~__pregel_pull, a")
    run.step({"a": [1, 2]})
    for _, arguments in script.calls[::2]:
        arguments[1]["v"] = 2
    saver = make_saver()
    perform(reference, script)
    perform(saver, script)
    probes = [*get_probes(script), Probe("list", (at("old"),))]
    expected = observe(reference, probes)

    hot = observe(saver, probes)
    evict_hot(redis_url, key_prefix)
    cold = observe(saver, probes)

    assert_same(probes, cold, expected)
    assert_same(probes, hot, expected)


# --- flushing more than once -----------------------------------------------------------------------------------------


def test_replaying_any_part_of_the_journal_changes_nothing(
    make_saver: Callable[..., TieredSaver], script: Script, postgres_url: str, redis_url: str, key_prefix: str
) -> None:
    """I4: whoever writes records again, alone or in runs, that PostgreSQL has already, leaves the same rows."""
    saver = make_saver(flush_linger=NEVER, durable_channels="")
    perform(saver, script)
    journals = read_journals(redis_url, key_prefix)
    assert sum(map(len, journals.values())) == len(script.calls)
    saver.flush()
    rows = rows_of(postgres_url)

    with psycopg.connect(postgres_url, autocommit=True, row_factory=dict_row) as connection:
        for thread_id, records in journals.items():
            runs = [records[at : at + size] for size in (1, 3, len(records)) for at in range(0, len(records), size)]
            for run in runs:
                entry = writer.ThreadRecords(thread_id, 0, run)
                writer.write(connection, [entry], statement_timeout=10)
                assert rows_of(postgres_url) == rows, run


def read_journals(redis_url: str, key_prefix: str) -> dict[str, list[writer.Journaled]]:
    """Read all journals of a prefix, by thread."""
    with redis.Redis.from_url(redis_url) as client:
        found = {}
        for key in client.scan_iter(match=f"{{{key_prefix}:*}}:journal:*", count=1000):
            thread_id = key.split(b":journal:", 1)[1].decode()
            entries = client.xrange(key)
            found[thread_id] = [
                writer.Journaled(int(name.split(b"-")[0]), *decode(fields[b"r"]), fields[b"r"])
                for name, fields in entries
            ]
    return found


# --- removing and copying --------------------------------------------------------------------------------------------


@DRIVERS
def test_prune_leaves_the_rows_postgres_saver_would(
    make_saver: Callable[..., TieredSaver],
    make_database: Callable[[], str],
    postgres_url: str,
    asynchronous: bool,
) -> None:
    """I2: `prune("keep_latest")` leaves exactly the rows that PostgresSaver's leaves, subgraph namespaces included."""
    script = Script()
    agent_loop(script, "agent", long_text=False)
    interrupted(script, "interrupted")
    subgraphs(script, "with subgraphs")
    subgraphs(script, "not pruned")
    # A call whose root checkpoint is not saved (yet) stays; so does one that started from the latest.
    Branch(script, "agent", "lost:1", parents={"": str(uuid6())}).step({"x": [1]})
    last = [c for c in script.stored if c["configurable"]["thread_id"] == "agent"][-2]["configurable"]
    Branch(script, "agent", "kept:1", parents={"": last["checkpoint_id"]}).step({"x": [1]})
    pruned = ["agent", "interrupted", "with subgraphs", "nobody"]
    saver, other_url = make_saver(), make_database()
    with postgres_saver(other_url) as reference:
        perform(reference, script)
        reference.prune(pruned, strategy="keep_latest")
        perform(saver, script)

        if asynchronous:
            asyncio.run(saver.aprune(pruned, strategy="keep_latest"))
        else:
            saver.prune(pruned, strategy="keep_latest")

        probes = get_probes(script) + list_probes(script)
        assert_same(probes, observe(saver, probes), observe(reference, probes))
    saver.flush()
    assert rows_of(postgres_url) == rows_of(other_url)
    assert unreferenced_blobs(postgres_url) == []


def test_pruned_thread_goes_on(
    make_saver: Callable[..., TieredSaver], reference: PostgresSaver, postgres_url: str
) -> None:
    """I2: what is put after a prune does not rely on blobs that the prune removed."""
    script, more = Script(), Script()
    run = agent_loop(script, "agent", long_text=True)
    run.script = more
    more.stored += script.stored
    run.step({"counter": 99})
    run.write(task_id(9), [("counter", 100)], "~__pregel_pull, x")
    run.step({"counter": 100})
    saver = make_saver()
    for one in (saver, reference):
        perform(one, script)
        one.prune(["agent"], strategy="keep_latest")
        perform(one, more)
    probes = get_probes_of("agent", more)

    assert_same(probes, observe(saver, probes), observe(reference, probes))
    saver.flush()
    assert missing_values(postgres_url, {**channels_of(script), **channels_of(more)}) == []


def get_probes_of(thread_id: str, script: Script) -> list[Probe]:
    return [
        *(Probe("get_tuple", (config,)) for config in script.stored),
        Probe("get_tuple", (at(thread_id, ""),)),
        Probe("list", (at(thread_id),)),
    ]


@pytest.mark.parametrize("strategy", ["delete", "delete_all"])
def test_prune_delete_equals_delete_thread(
    make_saver: Callable[..., TieredSaver], script: Script, postgres_url: str, strategy: str
) -> None:
    """I5: `prune` with a deleting strategy removes the named threads from both tiers, and only them."""
    saver = make_saver()
    perform(saver, script)
    saver.flush()
    others = {
        table: [row for row in rows if row["thread_id"] not in ("interrupted", "with subgraphs")]
        for table, rows in rows_of(postgres_url).items()
    }

    saver.prune(["interrupted", "with subgraphs"], strategy=strategy)

    assert rows_of(postgres_url) == others
    assert saver.get_tuple(at("interrupted", "")) is None
    assert list(saver.list(at("with subgraphs"))) == []


def delta_graph(saver: BaseCheckpointSaver[str], *, snapshot_frequency: int, writes_rare: bool = True) -> Any:
    """A graph with two delta channels: one writes a snapshot every so many updates, the other is written rarely."""

    def append(value: list[str], writes: Sequence[list[str]]) -> list[str]:
        return [*value, *(item for write in writes for item in write)]

    channel = partial(DeltaChannel, append)
    # Class syntax would leave annotations as text, in which this function's names mean nothing.
    state = TypedDict(  # type: ignore[misc]  # noqa: UP013
        "State",
        {
            "notes": Annotated[list[str], channel(snapshot_frequency=snapshot_frequency)],
            "rare": Annotated[list[str], channel(snapshot_frequency=1000)],
            "count": Annotated[int, operator.add],
        },
    )

    def first(state: Any) -> Any:
        return {"notes": [f"a{state['count']}"], "count": 1}

    def second(state: Any) -> Any:
        rare = [f"r{state['count']}"] if writes_rare and state["count"] < 3 else []
        return {"notes": [f"b{state['count']}"], **({"rare": rare} if rare else {}), "count": 1}

    builder = StateGraph(state)
    builder.add_node("first", first)
    builder.add_node("second", second)
    builder.add_edge(START, "first")
    builder.add_edge("first", "second")
    builder.add_edge("second", END)
    return builder.compile(checkpointer=saver)


@pytest.mark.parametrize("snapshot_frequency", [1, 2, 5, 1000])
def test_pruned_delta_thread_keeps_its_state_and_goes_on(
    make_saver: Callable[..., TieredSaver],
    redis_url: str,
    key_prefix: str,
    postgres_url: str,
    snapshot_frequency: int,
) -> None:
    """I2: a pruned thread with delta channels has the same state, hot and cold, and goes on as if never pruned."""
    saver = make_saver()
    graph = delta_graph(saver, snapshot_frequency=snapshot_frequency)
    model = delta_graph(InMemorySaver(), snapshot_frequency=snapshot_frequency)
    config: RunnableConfig = {"configurable": {"thread_id": "delta"}}
    for turn in range(4):
        given = {"notes": [f"in{turn}"], "rare": [], "count": 0}
        graph.invoke(given, config)
        model.invoke(given, config)
    before = graph.get_state(config)
    assert before.values == model.get_state(config).values

    saver.prune(["delta"], strategy="keep_latest")

    for evicted in (False, True):
        if evicted:
            evict_hot(redis_url, key_prefix)
        after = graph.get_state(config)
        assert (after.values, after.config, after.metadata) == (before.values, before.config, before.metadata)
    given = {"notes": ["afterwards"], "rare": ["afterwards"], "count": 0}
    assert graph.invoke(given, config) == model.invoke(given, config)
    evict_hot(redis_url, key_prefix)
    assert graph.get_state(config).values == model.get_state(config).values
    saver.flush()
    assert unreferenced_blobs(postgres_url) == []


def test_a_delta_channel_that_nobody_wrote_to_keeps_no_ancestors(
    make_saver: Callable[..., TieredSaver], postgres_url: str
) -> None:
    """`prune` removes old checkpoints of a graph that declares a delta channel and has not used it yet."""
    saver = make_saver()
    graph = delta_graph(saver, snapshot_frequency=2, writes_rare=False)
    config: RunnableConfig = {"configurable": {"thread_id": "delta"}}
    for turn in range(4):
        graph.invoke({"notes": [f"in{turn}"], "count": 0}, config)
    before = graph.get_state(config)

    saver.prune(["delta"])

    assert graph.get_state(config).values == before.values
    assert len(rows_of(postgres_url)["checkpoints"]) <= 3


def test_prune_keeps_no_more_ancestors_than_delta_channels_need(
    make_saver: Callable[..., TieredSaver], postgres_url: str
) -> None:
    """`prune` removes the ancestors beyond each delta channel's last stored value, with their writes and blobs."""
    saver = make_saver()
    script = Script()
    run = Branch(script, "delta")
    run.step({"log": ["plain"], "other": [0]}, source="input")
    for turn in range(9):
        run.write(task_id(turn), [("log", [str(turn)])], "~__pregel_pull, a")
        if turn == 5:
            run.step({"log": _DeltaSnapshot(["snapshot"]), "other": [turn]})
        else:
            run.step({"other": [turn]}, lost=["log"], counters_since_delta_snapshot={"log": (turn, turn)})
    perform(saver, script)
    kept = [config["configurable"]["checkpoint_id"] for config in script.stored[6:]]
    latest = script.stored[-1]
    before = saver.get_delta_channel_history(config=latest, channels=["log"])

    saver.prune(["delta"])

    rows = rows_of(postgres_url)
    assert [row["checkpoint_id"] for row in rows["checkpoints"]] == kept
    assert {row["checkpoint_id"] for row in rows["checkpoint_writes"]} == set(kept[:-1])
    assert [row["parent_checkpoint_id"] for row in rows["checkpoints"]] == [None, *kept[:-1]]
    assert unreferenced_blobs(postgres_url) == []
    assert saver.get_delta_channel_history(config=latest, channels=["log"]) == before
    assert before["log"]["seed"] == _DeltaSnapshot(["snapshot"])


@DRIVERS
def test_delete_for_runs_removes_their_checkpoints_and_what_only_they_used(
    make_saver: Callable[..., TieredSaver], postgres_url: str, asynchronous: bool
) -> None:
    """I2: after `delete_for_runs` no visible checkpoint misses a value, and no blob is left that nothing uses."""
    script, more = Script(), Script()
    doomed = []
    for thread_id in ("one", "two"):
        run = Branch(script, thread_id)
        run.step({"shared": {"kept": "by all"}, "mine": [thread_id]}, source="input")
        for number in range(6):
            # Later runs go on using blobs that earlier runs wrote.
            run.run_id = f"run-{number // 2}"
            run.write(task_id(number), [("mine", number)], "~__pregel_pull, a")
            run.step({"mine": [thread_id, number]})
            if run.run_id == "run-1":
                doomed.append(run.id)
        child = Branch(script, thread_id, f"child:{task_id(1)}", parents={"": run.id}, run_id="run-1")
        child.step({"x": [1]})
        doomed.append(child.id)
    run.script = more
    run.step({"mine": ["afterwards"]})
    saver = make_saver()
    perform(saver, script)

    if asynchronous:
        asyncio.run(saver.adelete_for_runs(["run-1", "no such run"]))
    else:
        saver.delete_for_runs(["run-1", "no such run"])

    def check() -> None:
        rows = rows_of(postgres_url)
        assert not {
            row["checkpoint_id"] for table in ("checkpoints", "checkpoint_writes") for row in rows[table]
        } & set(doomed)
        assert unreferenced_blobs(postgres_url) == []
        assert missing_values(postgres_url, {**channels_of(script), **channels_of(more)}) == []

    check()
    assert len(rows_of(postgres_url)["checkpoints"]) == len(script.stored) - len(doomed)
    assert all(saver.get_tuple(config) is None for config in script.stored if config_id(config) in doomed)
    latest = saver.get_tuple(at("two", ""))
    assert latest is not None
    assert latest.checkpoint["channel_values"] == {"shared": {"kept": "by all"}, "mine": ["two", 5]}
    perform(saver, more)
    saver.flush()
    check()


def config_id(config: RunnableConfig) -> str:
    return str(config["configurable"]["checkpoint_id"])


@DRIVERS
def test_copied_thread_equals_its_source(
    make_saver: Callable[..., TieredSaver], script: Script, postgres_url: str, asynchronous: bool
) -> None:
    """I9: a copy has every checkpoint, value, parent and write of its source, in each namespace, and its own future."""
    saver = make_saver()
    perform(saver, script)
    names = {thread: f"copy of {thread}" for thread, _ in positions(script)}

    for source, target in names.items():
        if asynchronous:
            asyncio.run(saver.acopy_thread(source, target))
        else:
            saver.copy_thread(source, target)

    def renamed(found: Any, name: str) -> Any:
        if isinstance(found, tuple) and found[0] == "list":
            return [renamed(one, name) for one in found[1]]
        for part in ("config", "parent_config"):
            if isinstance(found[part], dict):
                found[part]["configurable"]["thread_id"] = ("str", name)
        return found

    for source, target in names.items():
        originals = [Probe("list", (at(source),)), Probe("get_tuple", (at(source, positions_of(script, source)[-1]),))]
        copies = [Probe("list", (at(target),)), Probe("get_tuple", (at(target, positions_of(script, source)[-1]),))]
        found = observe(saver, copies)
        expected = [renamed(one, target) for one in observe(saver, originals)]
        assert [renamed(one, target) for one in found] == expected
    rows = rows_of(postgres_url)
    for table, all_rows in rows.items():
        for source, target in names.items():
            assert without_thread(all_rows, source) == without_thread(all_rows, target), table
    # The two live apart from now on.
    more = Script()
    run = Branch(more, "copy of single")
    run.step({"only": ["changed"]})
    perform(saver, more)
    original = saver.get_tuple(at("single", ""))
    assert original is not None
    assert original.checkpoint["channel_values"] == {"only": [1]}


def positions_of(script: Script, thread_id: str) -> list[str]:
    return [ns for thread, ns in positions(script) if thread == thread_id]


def without_thread(rows: Sequence[dict[str, Any]], thread_id: str) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "thread_id"} for row in rows if row["thread_id"] == thread_id]


def test_records_older_than_a_removal_do_not_come_back(
    make_saver: Callable[..., TieredSaver], postgres_url: str, redis_url: str, key_prefix: str
) -> None:
    """I5: whoever still holds records that a delete or a prune removed and flushes them late, brings nothing back."""
    script = Script()
    agent_loop(script, "pruned", long_text=False)
    agent_loop(script, "deleted", long_text=False)
    saver = make_saver(flush_linger=NEVER, durable_channels="")
    perform(saver, script)
    journals = read_journals(redis_url, key_prefix)
    saver.prune(["pruned"])
    saver.delete_thread("deleted")
    rows = rows_of(postgres_url)
    assert {row["thread_id"] for row in rows["checkpoints"]} == {"pruned"}

    with psycopg.connect(postgres_url, autocommit=True, row_factory=dict_row) as connection:
        for thread_id, records in journals.items():
            assert not any(isinstance(item.record, MaintenanceRecord) for item in records)
            writer.write(connection, [writer.ThreadRecords(thread_id, 0, records)], statement_timeout=10)

    assert rows_of(postgres_url) == rows
