"""How long an agent waits for its checkpointer, side by side in one run on the embedded servers.

    python -m tests.benchmarks.latency [--steps 300] [--messages 20] [--json]

Every contestant stores the same steps; they take turns in short rounds, so that a slow minute of the machine hits all
of them. The floor is the serializer's own work plus one call of a trivial script with the same bytes on the same
client (or one HGETALL plus the serializer's own loading): nobody who stores in Redis can be faster.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import redis
from langchain_core.messages import HumanMessage
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import BaseCheckpointSaver, ChannelVersions, Checkpoint
from langgraph.checkpoint.base.id import uuid6
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from psycopg.rows import dict_row
from psycopg_pool import ConnectionPool
from rich.console import Console
from rich.progress import track
from rich.table import Table

from langgraph_tiered_saver import TieredSaver
from langgraph_tiered_saver.embedded import EmbeddedServers

ROUND = 25  # steps of one contestant before the next one's turn


class Conversation:
    """Steps of an agent whose state is some messages."""

    def __init__(self, saver: BaseCheckpointSaver[Any], name: str, messages: list[Any]) -> None:
        self.saver = saver
        self.messages = messages
        self.config: RunnableConfig = {"configurable": {"thread_id": name, "checkpoint_ns": ""}}
        self.versions: ChannelVersions = {}
        self.step = 0
        self.tasks = 0

    def next_checkpoint(self) -> tuple[Checkpoint, ChannelVersions]:
        """The checkpoint of the next step, in which the messages changed."""
        changed = {
            channel: self.saver.get_next_version(self.versions.get(channel), None)
            for channel in ("messages", "branch:to:agent")
        }
        self.versions = {**self.versions, **changed}
        self.step += 1
        checkpoint = Checkpoint(
            v=4,
            id=str(uuid6(clock_seq=self.step)),
            ts="2026-01-01T00:00:00+00:00",
            channel_values={"messages": self.messages, "topic": "refunds"},
            channel_versions=self.versions,
            versions_seen={"agent": self.versions, "tools": self.versions},
            updated_channels=["messages"],
        )
        return checkpoint, changed

    def put(self) -> float:
        """Store the next step; the seconds it took."""
        checkpoint, changed = self.next_checkpoint()
        started = time.perf_counter()
        self.config = self.saver.put(self.config, checkpoint, {"source": "loop", "step": self.step}, changed)
        return time.perf_counter() - started

    def put_writes(self) -> float:
        """Store a task's writes on the last step; the seconds it took."""
        self.tasks += 1
        started = time.perf_counter()
        self.saver.put_writes(self.config, [("messages", self.messages[-1])], f"task-{self.tasks}")
        return time.perf_counter() - started

    def get(self) -> float:
        """Read the latest checkpoint; the seconds it took."""
        config: RunnableConfig = {"configurable": {"thread_id": self.config["configurable"]["thread_id"]}}
        started = time.perf_counter()
        found = self.saver.get_tuple(config)
        took = time.perf_counter() - started
        assert found is not None
        return took


class Floor:
    """The least that any saver on Redis must do."""

    def __init__(self, url: str, messages: list[Any]) -> None:
        self.client = redis.Redis.from_url(url, protocol=2)
        self.serde = JsonPlusSerializer()
        self.messages = messages
        self.rest = b"x" * 1100  # the checkpoint's own fields and metadata
        self.digest = self.client.script_load("return redis.call('HSET', KEYS[1], 'value', ARGV[1])")

    def _store(self, value: Any, rest: bytes) -> float:
        started = time.perf_counter()
        data = self.serde.dumps_typed(value)[1]
        self.client.evalsha(self.digest, 1, "floor", data + rest)
        return time.perf_counter() - started

    def put(self) -> float:
        """Serialize and store what a step changes."""
        return self._store(self.messages, self.rest)

    def put_writes(self) -> float:
        """Serialize and store one message."""
        return self._store(self.messages[-1], b"")

    def get(self) -> float:
        """Read and deserialize."""
        data = self.serde.dumps_typed(self.messages)[1]
        self.client.hset("floor", mapping={"value": data, "rest": self.rest})
        started = time.perf_counter()
        found = self.client.hgetall("floor")
        self.serde.loads_typed(("msgpack", found[b"value"]))
        return time.perf_counter() - started


def contestants(servers: EmbeddedServers, stack: ExitStack, messages: list[Any]) -> Iterator[tuple[str, Any]]:
    """Everybody who takes part, the floor first."""
    yield "floor (one script call + serializer)", Floor(servers.redis_url, messages)
    yield "InMemorySaver", Conversation(InMemorySaver(), "memory", messages)
    for mode in ("behind", "through"):
        saver = TieredSaver.from_conn_string(
            servers.redis_url, servers.postgres_url, key_prefix=f"latency-{mode}", write_mode=mode
        )
        yield f'TieredSaver, write_mode="{mode}"', Conversation(stack.enter_context(saver), mode, messages)
    options = {"autocommit": True, "prepare_threshold": 0, "row_factory": dict_row}
    pool: ConnectionPool[Any] = ConnectionPool(servers.postgres_url, kwargs=options, max_size=10, open=False)
    peer = PostgresSaver(stack.enter_context(pool))
    peer.setup()
    yield "PostgresSaver on a pool", Conversation(peer, "postgres", messages)


def measure(steps: int, messages: list[Any]) -> dict[str, dict[str, float]]:
    """Median seconds of each operation, for each contestant."""
    operations = ("put", "get", "put_writes")
    times: dict[str, dict[str, list[float]]] = {}
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        servers = stack.enter_context(EmbeddedServers.start(f"{folder}/servers"))
        everybody = list(contestants(servers, stack, messages))
        for _, contestant in everybody:
            for operation in operations:
                getattr(contestant, operation)()
        for _ in track(range(0, steps, ROUND), "Measuring", console=Console(stderr=True), transient=True):
            for name, contestant in everybody:
                for operation in operations:
                    call: Callable[[], float] = getattr(contestant, operation)
                    times.setdefault(name, {}).setdefault(operation, []).extend(call() for _ in range(ROUND))
    return {name: {op: statistics.median(found) for op, found in ops.items()} for name, ops in times.items()}


def show(result: dict[str, dict[str, float]], state_bytes: int) -> None:
    """Print a table of medians and of their ratios to the floor."""
    floor = next(iter(result.values()))
    table = Table(title=f"Median latency of one call, state of {state_bytes / 1024:.0f} KB")
    table.add_column("saver")
    for operation in floor:
        table.add_column(operation, justify="right")
    for name, medians in result.items():
        cells = (f"{m * 1e6:,.0f} µs  {m / floor[op]:.2f} x" for op, m in medians.items())
        table.add_row(name, *cells)
    Console().print(table)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="calls of each operation for each saver")
    parser.add_argument("--messages", type=int, default=20, help="messages of 300 characters in the state")
    parser.add_argument("--json", action="store_true", help="print medians in seconds as JSON")
    arguments = parser.parse_args()
    messages = [HumanMessage("x" * 300, id=str(number)) for number in range(arguments.messages)]
    size = len(JsonPlusSerializer().dumps_typed(messages)[1])
    result = measure(arguments.steps, messages)
    if arguments.json:
        print(json.dumps({"state_bytes": size, "median_seconds": result}))
    else:
        show(result, size)


if __name__ == "__main__":
    main()
