"""One saver among forks, threads and event loops, and its end: closed, forgotten, or with PostgreSQL gone."""

from __future__ import annotations

import asyncio
import copy
import gc
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict

import psutil
import psycopg
import pytest
import redis
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.graph import END, START, StateGraph
from psycopg.rows import dict_row
from psycopg_pool import ConnectionPool

from langgraph_tiered_saver import (
    ColdTierUnavailableError,
    FlushTimeoutError,
    SaverClosedError,
    TieredConfig,
    TieredSaver,
)
from langgraph_tiered_saver.embedded import EmbeddedServers
from tests.fault.workers import (
    ROOT,
    Acked,
    Chain,
    address,
    assert_durable,
    count_checkpoints,
    in_threads,
    journal_lengths,
    locked_table,
    unflushed,
    values_of,
)
from tests.support import wait_until

# What every script begins with. `addresses` names the sockets' other ends: Redis' client id, PostgreSQL's backend.
PREAMBLE = """
import asyncio, json, os, sys, threading, time
from langgraph_tiered_saver import TieredSaver
from tests.fault.workers import Chain, address, values_of, report

REDIS, POSTGRES, PREFIX, *ARGUMENTS = sys.argv[1:]

def open_saver(**settings):
    return TieredSaver.from_conn_string(REDIS, POSTGRES, key_prefix=PREFIX, **settings)

def addresses(saver):
    runtime = saver._source.current()
    runtime.open()
    return {("redis", runtime.client.client_id()),
            ("postgres", runtime.pool.run(lambda connection: connection.info.backend_pid))}

def alive(saver):
    runtime = saver._source.current()
    clients = {("redis", int(client["id"])) for client in runtime.client.client_list()}
    rows = runtime.pool.run(lambda connection: connection.execute("SELECT pid FROM pg_stat_activity").fetchall())
    return clients | {("postgres", row["pid"]) for row in rows}

async def async_address(saver):
    loops = saver._source.current().loops
    return {("redis", await (loops.current() or await loops.open()).client_id())}

def use(saver, thread_id, steps=3):
    chain = Chain(saver, thread_id)
    for _ in range(steps):
        chain.put(), chain.write()
        found = saver.get_tuple(address(thread_id))
        assert found.checkpoint["channel_values"] == values_of(thread_id, chain.step), found
    return chain

async def ause(saver, thread_id, steps=3):
    chain = Chain(saver, thread_id)
    for _ in range(steps):
        await chain.aput(), await chain.awrite()
        found = await saver.aget_tuple(address(thread_id))
        assert found.checkpoint["channel_values"] == values_of(thread_id, chain.step), found
    return chain

def children_exit_well(pids):
    for pid in pids:
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code == 0, f"child exited with {code}"
"""


class Script:
    """A process that runs a few lines."""

    def __init__(self, code: str, *arguments: str, flags: tuple[str, ...] = ()) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *flags, "-c", PREAMBLE + code, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )

    def line(self) -> str:
        """Wait for the next line of its output."""
        assert self.process.stdout is not None
        if line := self.process.stdout.readline():
            return line
        raise AssertionError(self.process.communicate(timeout=10)[1])

    def finish(self, timeout: float = 60.0) -> str:
        """Wait for its end, which must come without a word on standard error; give the rest of its output."""
        try:
            output, errors = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            output, errors = self.process.communicate()
            raise AssertionError(f"not finished within {timeout} s\n{output}\n{errors}") from None
        assert self.process.returncode == 0, errors
        assert errors == "", errors
        return output


@pytest.fixture
def run(redis_url: str, postgres_url: str, key_prefix: str) -> Iterator[Callable[..., Script]]:
    """A function that starts a script; what still runs after the test is killed."""
    scripts: list[Script] = []

    def run(code: str, *arguments: str, flags: tuple[str, ...] = ()) -> Script:
        scripts.append(Script(code, redis_url, postgres_url, key_prefix, *arguments, flags=flags))
        return scripts[-1]

    yield run
    for script in scripts:
        if script.process.poll() is None:
            script.process.kill()
            script.process.communicate()


@pytest.fixture
def own_servers() -> Iterator[EmbeddedServers]:
    """Servers of this test's own, which it may stop."""
    directory = Path(tempfile.mkdtemp(prefix="tiered-processes-"))
    try:
        with EmbeddedServers.start(directory) as servers:
            yield servers
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def hanging(servers: EmbeddedServers) -> Iterator[None]:
    """Let PostgreSQL hang: it accepts connections and never says a word."""
    postmaster = psutil.Process(servers.postgres_pid)
    processes = [postmaster]
    postmaster.suspend()  # first, so that it starts no other
    for process in postmaster.children(recursive=True):
        process.suspend()
        processes.append(process)
    try:
        yield
    finally:
        for process in reversed(processes):
            process.resume()


# --- forks -----------------------------------------------------------------------------------------------------------

END_OF_CHILD = {"sys.exit": "sys.exit(0)", "os._exit": "saver.flush(); os._exit(0)"}


@pytest.mark.parametrize("ending", END_OF_CHILD)
def test_fork_after_use(
    ending: str, run: Callable[..., Script], make_saver: Callable[..., TieredSaver], redis_url: str, key_prefix: str
) -> None:
    """Three children and their parent, which goes on writing: each works, no two share a socket, none harms another."""
    script = run(
        f"""
saver = open_saver()
use(saver, "before")
asyncio.run(ause(saver, "before, async"))
saver.flush()
parents = addresses(saver)
done = threading.Event()
steps = []
def go_on():
    chain = Chain(saver, "meanwhile")
    while not done.is_set():
        steps.append(chain.put())
writer = threading.Thread(target=go_on)
writer.start()
pids, pipes = [], []
for number in range(3):
    reader, end = os.pipe()
    pid = os.fork()
    if pid == 0:
        use(saver, f"child {{number}}")
        asyncio.run(ause(saver, f"child {{number}}, async"))
        os.write(end, json.dumps(sorted(addresses(saver) | asyncio.run(async_address(saver)))).encode())
        os.close(end)
        {END_OF_CHILD[ending]}
    os.close(end)
    pids.append(pid)
    pipes.append(reader)
theirs = [{{tuple(item) for item in json.loads(os.fdopen(pipe).read())}} for pipe in pipes]
children_exit_well(pids)
done.set()
writer.join()
assert len(steps) > 3, steps
everybodys = [parents, *theirs]
assert len(set.union(*everybodys)) == sum(map(len, everybodys)), everybodys
assert parents <= alive(saver), "a child ended a session of its parent's"
use(saver, "after")
asyncio.run(ause(saver, "after, async"))
saver.close()
print(len(steps))
"""
    )

    steps = int(script.finish())

    saver = make_saver()
    names = {"before", "after", *(f"child {number}" for number in range(3))}
    for name in names | {f"{name}, async" for name in names}:
        found = saver.get_tuple(address(name))
        assert found is not None
        assert found.checkpoint["channel_values"] == values_of(name, 2)
    found = saver.get_tuple(address("meanwhile"))
    assert found is not None
    assert found.checkpoint["channel_values"]["step"] == steps - 1
    assert len(list(saver.list(None))) == steps + 30
    assert unflushed(redis_url, key_prefix) == []


def test_fork_before_use(run: Callable[..., Script], make_saver: Callable[..., TieredSaver]) -> None:
    """A saver made in the parent and first used in three children and then in the parent."""
    script = run(
        """
import multiprocessing
saver = open_saver()
context = multiprocessing.get_context("fork")
queue = context.SimpleQueue()
def child(number):
    use(saver, f"child {number}")
    asyncio.run(ause(saver, f"child {number}, async"))
    queue.put(addresses(saver))
children = [context.Process(target=child, args=(number,)) for number in range(3)]
for process in children:
    process.start()
use(saver, "parent")
for process in children:
    process.join(30)
assert [process.exitcode for process in children] == [0, 0, 0]
everybodys = [addresses(saver), *(queue.get() for _ in children)]
assert len(set.union(*everybodys)) == 8, everybodys
use(saver, "parent, again")
saver.close()
"""
    )

    script.finish()

    listed = {at.config["configurable"]["thread_id"] for at in make_saver().list(None)}
    children = {f"child {number}" for number in range(3)}
    assert listed == {"parent", "parent, again"} | children | {f"{name}, async" for name in children}


def test_multiprocessing_after_use(run: Callable[..., Script], make_saver: Callable[..., TieredSaver]) -> None:
    """Children of multiprocessing that leave without flush or close lose nothing, and the parent goes on (I1)."""
    script = run(
        """
import multiprocessing
saver = open_saver()
use(saver, "parent")
mine = addresses(saver)
context = multiprocessing.get_context("fork")
def child(number):
    use(saver, f"child {number}", steps=20)
children = [context.Process(target=child, args=(number,)) for number in range(3)]
for process in children:
    process.start()
use(saver, "parent, meanwhile")
for process in children:
    process.join(30)
assert [process.exitcode for process in children] == [0, 0, 0]
assert mine <= alive(saver), "a child ended a session of its parent's"
use(saver, "parent, again")
saver.close()
"""
    )

    script.finish()

    saver = make_saver()
    for number in range(3):
        assert len(list(saver.list(address(f"child {number}")))) == 20


@pytest.mark.parametrize("moment", ["before use", "after use"])
@pytest.mark.parametrize("options", ["{}", "{'autocommit': True, 'row_factory': dict_row, 'prepare_threshold': 0}"])
def test_fork_with_clients_of_the_users(
    moment: str, options: str, run: Callable[..., Script], make_saver: Callable[..., TieredSaver]
) -> None:
    """A child does not touch the pool that its parent's user brought, whatever its settings and whoever came first."""
    script = run(
        f"""
import redis
from psycopg.rows import dict_row
from psycopg_pool import ConnectionPool
from langgraph_tiered_saver import TieredConfig
pool = ConnectionPool(POSTGRES, min_size=2, max_size=4, kwargs={options}, open=True)
pool.wait()
client = redis.Redis.from_url(REDIS)
saver = TieredSaver(client, pool, config=TieredConfig(key_prefix=PREFIX, postgres_timeout=5, flush_timeout=10))
with pool.connection() as connection:
    before = connection.execute("SELECT pid FROM pg_stat_activity WHERE datname = current_database()").fetchall()
mine = {{row["pid"] if isinstance(row, dict) else row[0] for row in before}}
if {moment!r} == "after use":
    use(saver, "parent, before")
    saver.flush()
reader, end = os.pipe()
pid = os.fork()
if pid == 0:
    use(saver, "child")
    asyncio.run(ause(saver, "child, async"))
    saver.flush()
    found = [at.config["configurable"]["thread_id"] for at in saver.list({{"configurable": {{"thread_id": "child"}}}})]
    assert found == ["child"] * 3, found
    for _ in range(2):
        use(saver, "deleted")
        saver.delete_thread("deleted")
    assert "deleted" not in [thread.thread_id for thread in saver.thread_ids()]
    os.write(end, json.dumps(sorted(addresses(saver))).encode())
    saver.close()
    sys.exit(0)
os.close(end)
theirs = dict(json.loads(os.fdopen(reader).read()))
children_exit_well([pid])
assert theirs["postgres"] not in mine, (theirs, mine)
use(saver, "parent")
saver.flush()
assert not addresses(saver) & set(theirs.items())
assert {{("postgres", pid) for pid in mine}} <= alive(saver), "a child ended a session of its parent's"
saver.close()
assert not pool.closed
with pool.connection() as connection:
    connection.execute("SELECT 1")
pool.close()
assert client.ping()
client.close()
"""
    )

    script.finish()

    assert {"parent", "child", "child, async"} <= {thread.thread_id for thread in make_saver().thread_ids()}


def test_a_closed_saver_is_closed_in_a_child_too(run: Callable[..., Script]) -> None:
    """SaverClosedError survives the fork, and a child that closes its saver does not close its parent's."""
    script = run(
        """
from langgraph_tiered_saver import SaverClosedError
closed, opened = open_saver(), open_saver()
use(closed, "one"), use(opened, "two")
closed.close()
pid = os.fork()
if pid == 0:
    try:
        closed.get_tuple(address("one"))
    except SaverClosedError:
        opened.close()
        sys.exit(0)
    sys.exit(1)
children_exit_well([pid])
use(opened, "three")
opened.close()
"""
    )

    script.finish()


# --- threads and loops -----------------------------------------------------------------------------------------------


def open_files() -> int:
    """Count this process's open files, sockets among them."""
    return int(psutil.Process().num_fds())


async def ause(saver: TieredSaver, thread_id: str, steps: int = 3) -> None:
    """Put, write and read, asynchronously."""
    chain = Chain(saver, thread_id)
    for _ in range(steps):
        await chain.aput()
        await chain.awrite()
        found = await saver.aget_tuple(address(thread_id))
        assert found is not None
        assert found.checkpoint["channel_values"] == values_of(thread_id, chain.step)
    assert len([at async for at in saver.alist(address(thread_id))]) == steps


def use(saver: TieredSaver, thread_id: str, steps: int = 3) -> None:
    """Put, write and read."""
    chain = Chain(saver, thread_id)
    for _ in range(steps):
        chain.put()
        chain.write()
        found = saver.get_tuple(address(thread_id))
        assert found is not None
        assert found.checkpoint["channel_values"] == values_of(thread_id, chain.step)
    assert len(list(saver.list(address(thread_id)))) == steps


def test_asyncio_run_again_and_again(make_saver: Callable[..., TieredSaver]) -> None:
    """I8: a loop that ended leaves nothing behind: neither errors nor, after a while, sockets."""
    saver = make_saver()
    for number in range(3):
        asyncio.run(ause(saver, f"thread {number}"))
    gc.collect()
    before = open_files()

    for number in range(3, 23):
        asyncio.run(ause(saver, f"thread {number}"))

    gc.collect()
    assert open_files() <= before + 1
    saver.flush()
    assert len(list(saver.list(None))) == 23 * 3


def test_several_loops_in_several_threads(make_saver: Callable[..., TieredSaver]) -> None:
    """Any number of event loops at once on one saver."""
    saver = make_saver()

    async def several(number: int) -> None:
        await asyncio.gather(*(ause(saver, f"loop {number}, task {task}") for task in range(4)))

    in_threads(6, lambda number: asyncio.run(several(number)))

    assert len(list(saver.list(None))) == 6 * 4 * 3


def test_many_threads_on_one_saver(make_saver: Callable[..., TieredSaver], postgres_url: str) -> None:
    """32 threads at once, each on a thread of its own and all on one that they share; every record is kept (I1)."""
    saver = make_saver()
    acked: list[Acked] = []

    def work(number: int) -> None:
        own = Chain(saver, f"own {number}")
        for _ in range(5):
            acked.extend((own.put(), own.write()))
            shared = Chain(saver, "shared")
            shared.put()
            found = saver.get_tuple(address("shared"))
            assert found is not None
            # Somebody's latest: never older than what this thread has just put (I6).
            assert found.checkpoint["id"] >= shared.checkpoint_id
            assert found.checkpoint["channel_values"] == values_of("shared", 0)
        found = saver.get_tuple(own.config)
        assert found is not None
        assert found.checkpoint["channel_values"] == values_of(own.thread_id, 4)

    in_threads(32, work)

    saver.flush()
    assert len(acked) == 320
    assert_durable(postgres_url, acked)
    assert count_checkpoints(postgres_url) == 320


def test_sync_and_async_mixed(make_saver: Callable[..., TieredSaver]) -> None:
    """A loop's tasks, threads that block, and `asyncio.to_thread` at once, on the same threads."""
    saver = make_saver()

    async def main() -> None:
        chains = [Chain(saver, f"mixed {number}") for number in range(4)]

        async def alternate(chain: Chain) -> None:
            for _ in range(5):
                await chain.aput()
                await asyncio.to_thread(chain.write)
                found = await asyncio.to_thread(saver.get_tuple, address(chain.thread_id))
                assert found is not None
                assert found.checkpoint["id"] == chain.checkpoint_id
                await asyncio.to_thread(chain.put)
                found = await saver.aget_tuple(address(chain.thread_id))
                assert found is not None
                assert found.checkpoint["id"] == chain.checkpoint_id

        others = [asyncio.to_thread(use, saver, f"blocking {number}", 5) for number in range(4)]
        await asyncio.gather(*map(alternate, chains), *others)
        await saver.aflush()

    asyncio.run(main())

    assert len(list(saver.list(None))) == 4 * 10 + 4 * 5


class Count(TypedDict):
    number: int
    path: list[str]


def counting_graph(saver: TieredSaver) -> Any:
    """A graph of two nodes."""
    builder = StateGraph(Count)
    builder.add_node("one", lambda state: {"number": state["number"] + 1, "path": [*state["path"], "one"]})
    builder.add_node("two", lambda state: {"number": state["number"] + 1, "path": [*state["path"], "two"]})
    builder.add_edge(START, "one")
    builder.add_edge("one", "two")
    builder.add_edge("two", END)
    return builder.compile(checkpointer=saver)


def test_inside_a_running_loop(make_saver: Callable[..., TieredSaver]) -> None:
    """As in a notebook's cell: `invoke` and sync methods in a running loop block it, and work; so does `ainvoke`."""
    saver = make_saver()
    graph = counting_graph(saver)

    async def cell() -> None:
        first = graph.invoke({"number": 0, "path": []}, {"configurable": {"thread_id": "sync"}})
        second = await graph.ainvoke({"number": 0, "path": []}, {"configurable": {"thread_id": "async"}})
        third = await asyncio.to_thread(
            graph.invoke, {"number": 0, "path": []}, {"configurable": {"thread_id": "thread"}}
        )
        assert first == second == third == {"number": 2, "path": ["one", "two"]}
        use(saver, "direct")
        for name in ("sync", "async", "thread"):
            config = {"configurable": {"thread_id": name}}
            assert len(list(graph.get_state_history(config))) == 4
            assert len([state async for state in graph.aget_state_history(config)]) == 4

    asyncio.run(cell())


def test_a_call_given_up_by_its_caller(
    make_saver: Callable[..., TieredSaver], postgres_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Cancelling a wait for a flush leaves a saver that works, and no complaint about errors nobody saw."""
    saver = make_saver(write_mode="through", close_timeout=0.2)

    async def main() -> None:
        await ause(saver, "before")
        with locked_table(postgres_url):
            for number in range(3):
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(Chain(saver, f"given up {number}").aput(), 0.2)
            with pytest.raises(FlushTimeoutError):
                await saver.aflush(0.1)
            found = await saver.aget_tuple(address("given up 0"))
            assert found is not None
        await ause(saver, "after")
        with locked_table(postgres_url):
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(Chain(saver, "at the end").aput(), 0.2)
            with pytest.raises(FlushTimeoutError):
                await saver.aflush(0.1)
            await saver.aclose()
        gc.collect()
        await asyncio.sleep(0)

    asyncio.run(main())
    gc.collect()

    assert [record.getMessage() for record in caplog.records if record.name in ("asyncio", "concurrent.futures")] == []
    assert {thread.thread_id for thread in make_saver().thread_ids()} >= {"before", "after", "at the end"}


# --- the end ---------------------------------------------------------------------------------------------------------

FORGET_TO_CLOSE = """
saver = open_saver(**json.loads(ARGUMENTS[0]))
chains = [Chain(saver, f"thread {number}") for number in range(10)]
for _ in range(50):
    for chain in chains:
        chain.put()
if len(ARGUMENTS) > 1:
    asyncio.run(ause(saver, "async"))
print("done", flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize("settings", ["{}", '{"flush_linger": 3600}'])
@pytest.mark.parametrize("asynchronous", [[], ["async"]], ids=["sync", "async"])
def test_exit_without_close(
    settings: str,
    asynchronous: list[str],
    run: Callable[..., Script],
    redis_url: str,
    postgres_url: str,
    key_prefix: str,
) -> None:
    """I1: an interpreter that falls off its end exits soon, well and silently, and PostgreSQL has everything."""
    script = run(FORGET_TO_CLOSE, settings, *asynchronous)
    assert script.line() == "done\n"
    began = time.monotonic()

    script.finish()

    assert time.monotonic() - began < 5
    assert count_checkpoints(postgres_url) == 500 + 3 * len(asynchronous)
    assert unflushed(redis_url, key_prefix) == []


@pytest.mark.parametrize("how", ["hangs", "is gone"])
def test_exit_without_close_while_postgresql_is_away(how: str, own_servers: EmbeddedServers, key_prefix: str) -> None:
    """I1: with PostgreSQL hanging or gone, the exit is as soon and as silent, and the journal has everything."""
    script = Script(
        FORGET_TO_CLOSE,
        own_servers.redis_url,
        own_servers.postgres_url,
        key_prefix,
        '{"flush_linger": 3600, "exit_timeout": 1}',
    )
    try:
        assert script.line() == "done\n"
        if how == "hangs":
            with hanging(own_servers):
                began = time.monotonic()
                _, errors = script.process.communicate(timeout=30)
                seconds = time.monotonic() - began
        else:
            os.kill(own_servers.postgres_pid, signal.SIGQUIT)
            wait_until(lambda: not psutil.pid_exists(own_servers.postgres_pid), message="PostgreSQL ends")
            began = time.monotonic()
            _, errors = script.process.communicate(timeout=30)
            seconds = time.monotonic() - began
    finally:
        script.process.kill()

    assert seconds < 3  # exit_timeout is 1
    assert script.process.returncode == 0
    assert "Traceback" not in errors
    # Python prints warnings of loggers that nobody has configured: that some are left, and why, is worth one line each.
    assert errors.count("500 records not in PostgreSQL") == 1
    assert errors.count("Flushing has stopped") <= 1
    assert sum(journal_lengths(own_servers.redis_url, key_prefix).values()) == 500
    with (
        EmbeddedServers.start(own_servers.directory) as again,
        TieredSaver.from_conn_string(again.redis_url, again.postgres_url, key_prefix=key_prefix) as saver,
    ):
        assert len(list(saver.list(None))) == 500


def test_exit_with_a_cold_read_that_hangs(own_servers: EmbeddedServers, key_prefix: str) -> None:
    """I8: a read that PostgreSQL does not answer, given up by its caller, does not keep an interpreter from exiting."""
    script = Script(
        """
saver = open_saver(postgres_timeout=1, exit_timeout=1)
async def main():
    await saver.asetup()
    print("done", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    try:
        await asyncio.wait_for(saver.aget_tuple(address("nobody")), 0.3)
    except asyncio.TimeoutError:
        print("given up", flush=True)
asyncio.run(main())
""",
        own_servers.redis_url,
        own_servers.postgres_url,
        key_prefix,
    )
    assert script.line() == "done\n"
    with hanging(own_servers):
        began = time.monotonic()
        try:
            output, errors = script.process.communicate("\n", timeout=15)
        finally:
            script.process.kill()
    assert output == "given up\n"
    assert script.process.returncode == 0
    assert "Traceback" not in errors
    assert time.monotonic() - began < 5


def test_close_while_postgresql_hangs(
    own_servers: EmbeddedServers, key_prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    """I8: close() returns by its time-out, says how much is left, and the next process has it."""
    urls = own_servers.redis_url, own_servers.postgres_url
    saver = TieredSaver.from_conn_string(*urls, key_prefix=key_prefix, close_timeout=1.0)
    use(saver, "before")
    saver.flush()
    with hanging(own_servers):
        chain = Chain(saver, "left")
        for _ in range(7):
            chain.put()
        began = time.monotonic()

        saver.close()

        assert time.monotonic() - began < 2.5
    assert "7 records not in PostgreSQL" in caplog.text
    with TieredSaver.from_conn_string(*urls, key_prefix=key_prefix) as reader:
        assert len(list(reader.list(address("left")))) == 7
        assert reader.stats().lost_records == 0


def test_a_cold_read_while_postgresql_hangs(own_servers: EmbeddedServers, key_prefix: str) -> None:
    """I7, I8: a read that only PostgreSQL could answer ends with the typed error in bounded time; hot ones go on."""
    urls = own_servers.redis_url, own_servers.postgres_url
    settings = {"key_prefix": key_prefix, "postgres_timeout": 1.0, "close_timeout": 0.5}
    settings |= {"flush_timeout": 1.0, "postgres_statement_timeout": 1.0}
    with TieredSaver.from_conn_string(*urls, **settings) as saver:
        use(saver, "hot")
        saver.flush()
        with hanging(own_servers):
            outcome: list[Any] = []

            def read() -> None:
                try:
                    outcome.append(saver.get_tuple(address("cold")))
                except Exception as error:
                    outcome.append(error)

            reading = threading.Thread(target=read, daemon=True)
            reading.start()
            assert saver.get_tuple(address("hot")) is not None
            reading.join(8)
        reading.join(20)
    assert outcome, "the read did not end even after PostgreSQL answered again"
    assert isinstance(outcome[0], ColdTierUnavailableError), f"the read ended only when PostgreSQL woke up: {outcome}"


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_close_ends_the_use(asynchronous: bool, make_saver: Callable[..., TieredSaver], postgres_url: str) -> None:
    """After close every method raises SaverClosedError, closing again does nothing, and everything was flushed."""
    saver = make_saver(flush_linger=3600.0)
    chain = Chain(saver, "red")
    acked = [chain.put(), chain.write()]
    if asynchronous:
        asyncio.run(close_twice(saver))
    else:
        saver.close()
        saver.close()
    assert_durable(postgres_url, acked)
    config = chain.config
    calls: list[Callable[[], Any]] = [
        lambda: saver.get_tuple(config),
        lambda: list(saver.list(None)),
        lambda: saver.put(*Chain(saver, "red").next()),
        lambda: saver.put_writes(config, [("log", 1)], "task"),
        lambda: saver.delete_thread("red"),
        lambda: saver.delete_for_runs(["run"]),
        lambda: saver.copy_thread("red", "blue"),
        lambda: saver.prune(["red"]),
        lambda: saver.get_delta_channel_history(config=config, channels=["log"]),
        saver.thread_ids,
        saver.setup,
        saver.flush,
        lambda: asyncio.run(saver.aget_tuple(config)),
        lambda: asyncio.run(saver.aput(*Chain(saver, "red").next())),
        lambda: asyncio.run(saver.aput_writes(config, [("log", 1)], "task")),
        lambda: asyncio.run(anext_of(saver.alist(None))),
        lambda: asyncio.run(saver.adelete_thread("red")),
        lambda: asyncio.run(saver.asetup()),
        lambda: asyncio.run(saver.aflush()),
    ]

    for call in calls:
        with pytest.raises(SaverClosedError, match="make a new one"):
            call()
    assert count_checkpoints(postgres_url) == 1


async def close_twice(saver: TieredSaver) -> None:
    """Close a saver two times, asynchronously."""
    await saver.aclose()
    await saver.aclose()


async def anext_of(iterator: Any) -> Any:
    """Give the first item of an asynchronous iterator."""
    return await iterator.__anext__()


def test_close_wakes_those_who_wait(make_saver: Callable[..., TieredSaver], postgres_url: str) -> None:
    """I8: a write-through put, a flush and a put at the backlog's bound all end when the saver is closed."""
    saver = make_saver(write_mode="through", close_timeout=0.2, max_backlog_records=1)
    use(saver, "before")
    outcomes: dict[str, BaseException] = {}

    def attempt(name: str, call: Callable[[], Any]) -> None:
        try:
            call()
        except BaseException as error:
            outcomes[name] = error

    with locked_table(postgres_url):
        waiting = [threading.Thread(target=attempt, args=("put", Chain(saver, "red").put))]
        waiting[0].start()
        wait_until(lambda: saver.stats().backlog_records == 1, message="the put is acknowledged")
        waiting += [
            threading.Thread(target=attempt, args=("flush", saver.flush)),
            threading.Thread(target=attempt, args=("bounded put", Chain(saver, "blue").put)),
        ]
        waiting[1].start()
        waiting[2].start()
        runtime = saver._source.current()
        wait_until(lambda: runtime.backlog._room_waiters, message="the second put waits for room")

        saver.close()

        for thread in waiting:
            thread.join(5)
    assert {name: type(error) for name, error in outcomes.items()} == dict.fromkeys(
        ("put", "flush", "bounded put"), SaverClosedError
    )


def test_with_and_async_with(redis_url: str, postgres_url: str, key_prefix: str) -> None:
    """One class serves both, and each closes at its end."""
    with TieredSaver.from_conn_string(redis_url, postgres_url, key_prefix=key_prefix) as first:
        use(first, "red")
    with pytest.raises(SaverClosedError):
        first.get_tuple(address("red"))

    async def main() -> TieredSaver:
        async with TieredSaver.from_conn_string(redis_url, postgres_url, key_prefix=key_prefix) as second:
            await ause(second, "blue")
            use(second, "blue, sync")
        return second

    second = asyncio.run(main())
    with pytest.raises(SaverClosedError):
        second.get_tuple(address("blue"))
    with TieredSaver.from_conn_string(redis_url, postgres_url, key_prefix=key_prefix) as third:
        assert len(list(third.list(None))) == 9


def test_clones_share_the_tiers(make_saver: Callable[..., TieredSaver]) -> None:
    """A copy, and LangGraph's clone with an allowlist, use the same connections, flusher and counters."""
    saver = make_saver(serde=JsonPlusSerializer(allowed_msgpack_modules=None))
    use(saver, "red")

    clones: list[Any] = [copy.copy(saver), saver.with_allowlist([("decimal", "Decimal")])]

    for number, clone in enumerate(clones):
        assert type(clone) is TieredSaver
        assert clone is not saver
        use(clone, f"clone {number}")
        assert clone._source.current() is saver._source.current()
        assert clone.stats() == saver.stats()
        assert repr(clone) == repr(saver)
    assert saver.stats().checkpoints == 9
    clones[0].close()
    with pytest.raises(SaverClosedError):
        saver.get_tuple(address("red"))


@pytest.mark.parametrize(
    "code",
    [
        'with open_saver() as saver:\n    use(saver, "red")\n    list(saver.list(None))',
        """
async def main():
    async with open_saver() as saver:
        await ause(saver, "red")
        [at async for at in saver.alist(None)]
        await asyncio.gather(*(ause(saver, str(n)) for n in range(20)))
asyncio.run(main())""",
        """
async def main():
    with open_saver() as saver:
        await ause(saver, "red")
        use(saver, "blue")
        saver.delete_thread("blue")
    await asyncio.sleep(0.1)
asyncio.run(main())""",
        """
with open_saver() as saver:
    for number in range(3):
        asyncio.run(ause(saver, str(number)))""",
        """
import redis
from psycopg_pool import ConnectionPool
from langgraph_tiered_saver import TieredConfig
with ConnectionPool(POSTGRES, min_size=2, open=True) as pool, redis.Redis.from_url(REDIS) as client:
    with TieredSaver(client, pool, config=TieredConfig(key_prefix=PREFIX)) as saver:
        use(saver, "red")""",
        "open_saver()",
    ],
    ids=["with", "async with", "with in a loop", "asyncio.run twice", "clients of the user's", "never used"],
)
def test_nothing_is_left_open(code: str, run: Callable[..., Script]) -> None:
    """A saver that is closed closes every socket, as Python's development mode can tell."""
    # Development mode also complains about callbacks that take long, as a blocking call in a loop does.
    quiet = 'import logging\nlogging.getLogger("asyncio").setLevel(logging.ERROR)\n'
    script = run(f"{quiet}{code}\nimport gc\ngc.collect()", flags=("-X", "dev", "-W", "error::ResourceWarning"))

    script.finish()


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_close_closes_every_connection(
    asynchronous: bool, redis_url: str, postgres_url: str, key_prefix: str, make_saver: Callable[..., TieredSaver]
) -> None:
    """After close no socket of the saver is left, on whichever loop it was opened; no garbage collection needed."""
    make_saver().setup()
    make_saver().close()
    gc.collect()
    gc.disable()
    try:

        async def main() -> None:
            before = open_files()
            saver = TieredSaver.from_conn_string(redis_url, postgres_url, key_prefix=key_prefix)
            await asyncio.gather(*(ause(saver, f"{asynchronous} {number}") for number in range(10)))
            await asyncio.to_thread(in_threads, 10, lambda number: use(saver, f"sync, {asynchronous} {number}"))
            assert open_files() > before + 5
            if asynchronous:
                await saver.aclose()
            else:
                saver.close()
                await asyncio.sleep(0.1)  # the loop's own connections are closed on the loop
            # The loop itself has its selector and a pair of sockets.
            assert open_files() <= before + 3

        asyncio.run(main())
    finally:
        gc.enable()


def test_a_saver_that_is_never_used_connects_to_nothing() -> None:
    """Making a saver opens no connection and starts no thread; closing it neither."""
    threads = threading.active_count()

    with TieredSaver.from_conn_string("redis://127.0.0.1:1", "postgresql://127.0.0.1:1/none") as saver:
        assert threading.active_count() == threads
        assert repr(saver).startswith("TieredSaver(")
    assert threading.active_count() == threads


def test_use_goes_on_beside_other_users_of_the_servers(
    make_saver: Callable[..., TieredSaver], redis_url: str, postgres_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """I1: connections that an operator cuts, on both sides and again and again, cost a reconnect and nothing else."""
    caplog.set_level(logging.CRITICAL, "psycopg.pool")
    saver = make_saver()
    chain = Chain(saver, "red")
    acked = [chain.put()]
    saver.flush()
    stop = threading.Event()
    cuts = 0

    def cut() -> None:
        nonlocal cuts
        with (
            redis.Redis.from_url(redis_url) as client,
            psycopg.connect(postgres_url, autocommit=True, row_factory=dict_row) as connection,
        ):
            while not stop.wait(0.05):
                client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
                connection.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    "WHERE datname = current_database() AND pid <> pg_backend_pid()"
                )
                cuts += 1

    cutter = threading.Thread(target=cut)
    cutter.start()
    try:
        deadline = time.monotonic() + 1
        while time.monotonic() < deadline:
            acked += [chain.put(), chain.write()]
    finally:
        stop.set()
        cutter.join()
    saver.flush()

    assert cuts > 3
    assert len(acked) > 20
    assert_durable(postgres_url, acked)
    assert saver.stats().lost_records == 0


def test_a_pool_of_the_users_outlives_the_saver(redis_url: str, postgres_url: str, key_prefix: str) -> None:
    """What the user brought, the user closes: close() leaves client and pool open and usable."""
    with (
        ConnectionPool(postgres_url, min_size=2, open=True) as pool,
        redis.Redis.from_url(redis_url) as client,
    ):
        for number in range(2):
            with TieredSaver(client, pool, config=TieredConfig(key_prefix=key_prefix)) as saver:
                use(saver, f"red {number}")
                asyncio.run(ause(saver, f"blue {number}"))
        with pool.connection() as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)
        assert client.ping()
