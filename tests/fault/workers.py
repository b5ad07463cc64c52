"""Processes that tests start and kill, and the records that they write.

A worker is `python -m tests.fault.workers ROLE OPTIONS`, the options as JSON. It reports on its standard output, one
JSON list in each line, as soon as a call has returned; a line that is there was acknowledged.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
import redis
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import Checkpoint, empty_checkpoint
from langgraph.checkpoint.base.id import uuid6
from langgraph.checkpoint.postgres import PostgresSaver

from langgraph_tiered_saver import TieredSaver
from langgraph_tiered_saver.flusher import Flusher
from tests.support import wait_until

ROOT = Path(__file__).parents[2]
TABLES = ("checkpoints", "checkpoint_blobs", "checkpoint_writes")


# --- what is written -----------------------------------------------------------------------------------------------


class Acked(NamedTuple):
    """A record that was acknowledged: `kind` is "put" or "writes", `step` counts the thread's checkpoints."""

    kind: str
    thread_id: str
    checkpoint_id: str
    step: int


def values_of(thread_id: str, step: int) -> dict[str, Any]:
    """Give the channel values of a thread's checkpoint: one inlined, one blob that changes, one that never does."""
    return {"step": step, "log": [thread_id, *range(step + 1)], "constant": {"thread": thread_id}}


def writes_of(thread_id: str, step: int) -> list[tuple[str, Any]]:
    """Give what the task of a step writes."""
    return [("log", [thread_id, step]), ("step", step + 1)]


def address(thread_id: str, checkpoint_id: str | None = None, checkpoint_ns: str = "") -> RunnableConfig:
    """Give the config of a thread's checkpoint, or of its latest."""
    configurable = {"thread_id": thread_id, "checkpoint_ns": checkpoint_ns}
    return {"configurable": configurable | ({"checkpoint_id": checkpoint_id} if checkpoint_id else {})}


class Chain:
    """A thread that grows step by step, as a graph would make it: each checkpoint sends only what changed."""

    def __init__(self, saver: TieredSaver, thread_id: str, *, checkpoint_ns: str = "") -> None:
        self.saver, self.thread_id = saver, thread_id
        self.config = address(thread_id, checkpoint_ns=checkpoint_ns)
        self.step = -1
        self.versions: dict[str, str] = {}

    @property
    def checkpoint_id(self) -> str:
        """The latest checkpoint's id."""
        return str(self.config["configurable"]["checkpoint_id"])

    def next(self) -> tuple[RunnableConfig, Checkpoint, Any, dict[str, Any]]:
        """Give the arguments of the next `put`."""
        self.step += 1
        values = values_of(self.thread_id, self.step)
        changed = {
            channel: self.saver.get_next_version(self.versions.get(channel), None)
            for channel in values
            if channel != "constant" or self.step == 0
        }
        self.versions |= changed
        checkpoint = empty_checkpoint()
        checkpoint["id"] = str(uuid6())
        checkpoint["channel_values"] = values
        checkpoint["channel_versions"] = dict(self.versions)
        return self.config, checkpoint, {"source": "loop", "step": self.step, "parents": {}}, changed

    def put(self) -> Acked:
        """Put the next checkpoint."""
        self.config = self.saver.put(*self.next())
        return Acked("put", self.thread_id, self.checkpoint_id, self.step)

    async def aput(self) -> Acked:
        """Put the next checkpoint, asynchronously."""
        self.config = await self.saver.aput(*self.next())
        return Acked("put", self.thread_id, self.checkpoint_id, self.step)

    def write(self) -> Acked:
        """Put the writes of the latest checkpoint's task."""
        self.saver.put_writes(self.config, writes_of(self.thread_id, self.step), f"task-{self.step}")
        return Acked("writes", self.thread_id, self.checkpoint_id, self.step)

    async def awrite(self) -> Acked:
        """Put the writes of the latest checkpoint's task, asynchronously."""
        await self.saver.aput_writes(self.config, writes_of(self.thread_id, self.step), f"task-{self.step}")
        return Acked("writes", self.thread_id, self.checkpoint_id, self.step)


# --- what is there -------------------------------------------------------------------------------------------------


def read_rows(postgres_url: str) -> dict[str, list[tuple[Any, ...]]]:
    """Read every row of the checkpointer's three tables."""
    with psycopg.connect(postgres_url) as connection:
        found = {}
        for table in TABLES:
            rows = connection.execute(f"SELECT * FROM {table}").fetchall()
            found[table] = sorted(rows, key=repr)
        return found


def count_checkpoints(postgres_url: str) -> int:
    """Count the checkpoints in PostgreSQL."""
    with psycopg.connect(postgres_url) as connection:
        row = connection.execute("SELECT count(*) FROM checkpoints").fetchone()
    assert row is not None
    return int(row[0])


def journal_lengths(redis_url: str, key_prefix: str) -> dict[bytes, int]:
    """Give the length of every journal below a prefix; one that is empty must not exist."""
    with redis.Redis.from_url(redis_url) as client:
        return {key: client.xlen(key) for key in client.scan_iter(f"{{{key_prefix}:*}}:journal:*", 1000)}


def unflushed(redis_url: str, key_prefix: str) -> list[bytes]:
    """Name the journals and dirty sets that are left below a prefix."""
    with redis.Redis.from_url(redis_url) as client:
        dirty = list(client.scan_iter(f"{{{key_prefix}:*}}:dirty", 1000))
    return [*journal_lengths(redis_url, key_prefix), *dirty]


def assert_durable(postgres_url: str, acked: Sequence[Acked]) -> None:
    """Check that plain PostgresSaver, and SQL, find every acknowledged record as it was written (I1, I2)."""
    assert acked, "nothing was acknowledged, so nothing would be checked"
    with PostgresSaver.from_conn_string(postgres_url) as cold:
        found = {
            (thread_id, at.checkpoint["id"]): at
            for thread_id in {record.thread_id for record in acked}
            for at in cold.list({"configurable": {"thread_id": thread_id}})
        }
    for record in acked:
        at = found[record.thread_id, record.checkpoint_id]
        assert at.checkpoint["channel_values"] == values_of(record.thread_id, record.step)
        if record.kind == "writes":
            task = f"task-{record.step}"
            written = [(channel, value) for task_id, channel, value in at.pending_writes or [] if task_id == task]
            assert written == writes_of(record.thread_id, record.step)
        if record.step:
            assert at.parent_config is not None
            assert (record.thread_id, at.parent_config["configurable"]["checkpoint_id"]) in found
    with psycopg.connect(postgres_url) as connection:
        keys = set(connection.execute("SELECT thread_id, checkpoint_id FROM checkpoints").fetchall())
        tasks = set(connection.execute("SELECT thread_id, checkpoint_id, task_id FROM checkpoint_writes").fetchall())
    assert {(r.thread_id, r.checkpoint_id) for r in acked if r.kind == "put"} <= keys
    assert {(r.thread_id, r.checkpoint_id, f"task-{r.step}") for r in acked if r.kind == "writes"} <= tasks


@contextmanager
def locked_table(postgres_url: str, table: str = "checkpoints") -> Iterator[None]:
    """Hold a table, so that every flush waits in the middle of its transaction."""
    with psycopg.connect(postgres_url) as connection:
        connection.execute(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE")
        yield
        connection.rollback()


def waiting_backends(postgres_url: str) -> list[int]:
    """Give the pids of the PostgreSQL backends of this database that wait for a lock."""
    with psycopg.connect(postgres_url) as connection:
        rows = connection.execute(
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
        return [row[0] for row in rows]


# --- the test's side of a worker -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where workers and savers of one test meet."""

    redis_url: str
    postgres_url: str
    key_prefix: str
    directory: Path


class Worker:
    """A process that runs a role of this module."""

    def __init__(self, place: Place, role: str, name: str, **options: Any) -> None:
        self._output = place.directory / f"{name}.out"
        self._errors = place.directory / f"{name}.err"
        options |= {"redis_url": place.redis_url, "postgres_url": place.postgres_url}
        options["settings"] = {"key_prefix": place.key_prefix, **options.get("settings", {})}
        with self._output.open("wb") as output, self._errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.fault.workers", role, json.dumps(options)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=errors,
                cwd=ROOT,
            )

    def reports(self) -> list[list[Any]]:
        """Give everything the worker has reported so far; a line it was killed in does not count."""
        *lines, _ = self._output.read_bytes().split(b"\n")
        return [json.loads(line) for line in lines]

    def acked(self) -> list[Acked]:
        """Give what was acknowledged to the worker so far."""
        return [Acked(*report) for report in self.reports() if len(report) == 4]

    def errors(self) -> str:
        """Give what the worker wrote to its standard error."""
        return self._errors.read_text()

    def wait_for(self, count: int, timeout: float = 20.0) -> None:
        """Wait until the worker has reported so many times."""

        def enough() -> bool:
            assert self.process.poll() in (None, 0), self.errors()
            return len(self.reports()) >= count

        wait_until(enough, timeout, f"{count} reports")

    def tell(self, text: str) -> None:
        """Send the worker a line."""
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode() + b"\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        """Kill the worker with SIGKILL, and wait until it is gone."""
        self.process.send_signal(signal.SIGKILL)
        self.reap()

    def reap(self, timeout: float = 20.0) -> int:
        """Wait for the worker's end and give its exit code."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        return self.process.wait(timeout)

    def finish(self) -> None:
        """Let the worker end as it should, without a word on its standard error."""
        assert (self.reap(), self.errors()) == (0, "")


# --- the worker's side ---------------------------------------------------------------------------------------------


def report(*what: Any) -> None:
    """Write one line; it leaves the process at once, in one system call."""
    os.write(1, json.dumps(what).encode() + b"\n")


def open_saver(options: dict[str, Any]) -> TieredSaver:
    """Make the saver that the options name."""
    return TieredSaver.from_conn_string(options["redis_url"], options["postgres_url"], **options["settings"])


def write(options: dict[str, Any]) -> None:
    """Write to some threads in turn: for ever, or so many steps and then until the input ends."""
    saver = open_saver(options)
    chains = [Chain(saver, thread_id) for thread_id in options["threads"]]
    for _ in _steps(options):
        for chain in chains:
            report(*chain.put())
            report(*chain.write())
    sys.stdin.read()
    saver.close()


def awrite(options: dict[str, Any]) -> None:
    """Do what `write` does, asynchronously, to all threads at once."""
    saver = open_saver(options)

    async def run(thread_id: str) -> None:
        chain = Chain(saver, thread_id)
        for _ in _steps(options):
            report(*await chain.aput())
            report(*await chain.awrite())

    async def main() -> None:
        await asyncio.gather(*map(run, options["threads"]))
        await asyncio.to_thread(sys.stdin.read)
        await saver.aclose()

    asyncio.run(main())


def write_and_die_after_commit(options: dict[str, Any]) -> None:
    """Write some steps, and be killed between PostgreSQL's commit and the trimming of the journal."""

    def die(_: Any, written: Any) -> None:
        if not written:
            return
        os.kill(os.getpid(), signal.SIGKILL)

    Flusher._done = die  # type: ignore[method-assign]
    saver = open_saver(options)
    chains = [Chain(saver, thread_id) for thread_id in options["threads"]]
    for _ in _steps(options):
        for chain in chains:
            report(*chain.put())
            report(*chain.write())
    saver.flush()


def delete(options: dict[str, Any]) -> None:
    """Delete a thread when told to, and report when that has returned."""
    saver = open_saver(options)
    saver.setup()
    report("ready")
    sys.stdin.readline()
    saver.delete_thread(options["thread"])
    report("deleted")
    sys.stdin.read()
    saver.close()


def sweep(options: dict[str, Any]) -> None:
    """Adopt orphans until the input ends."""
    saver = open_saver(options)
    saver.setup()
    report("ready")
    sys.stdin.read()
    saver.close()


def _steps(options: dict[str, Any]) -> Iterator[int]:
    count = options.get("steps")
    step = 0
    while count is None or step < count:
        yield step
        step += 1


def in_threads(count: int, work: Callable[[int], None]) -> None:
    """Run a function in so many threads at once, with the thread's number, and raise the first error of any."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(count)

    def run(number: int) -> None:
        try:
            barrier.wait(30)
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads)


ROLES = {role.__name__: role for role in (write, awrite, write_and_die_after_commit, delete, sweep)}

if __name__ == "__main__":
    ROLES[sys.argv[1]](json.loads(sys.argv[2]))
