"""Processes that a test moves step by step: real code on real servers, with a network, clocks and deaths of its own.

Every process of a `World` is a saver with its runtime, but without threads: its client calls, its flusher's rounds and
its health checks are tasks, each of which stops before every call to a server. A test says which task goes on, and
whether its call arrives, arrives twice, is lost on the way, or loses its reply. So any interleaving, crash and stall
can be had, again and again, between the real Lua scripts and the real SQL. Only one task runs at any moment; a
transaction, or what else is done on one borrowed connection, is one call.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import uuid
from dataclasses import dataclass
from enum import Enum
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, cast

import psycopg
import pytest
import redis
from psycopg import sql
from psycopg.rows import dict_row

from langgraph_tiered_saver import TieredConfig, TieredSaver, drivers, flusher, health, runtime
from langgraph_tiered_saver.backlog import Backlog
from langgraph_tiered_saver.cold import pool, schema
from langgraph_tiered_saver.cold.pool import ColdPool
from langgraph_tiered_saver.health import InstanceGuard
from langgraph_tiered_saver.hot import scripts
from langgraph_tiered_saver.hot.keys import Keyspace
from langgraph_tiered_saver.hot.lanes import LaneClient
from langgraph_tiered_saver.runtime import Runtime
from tests.fault.stack import RedisServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from langgraph_tiered_saver.operations import Wait

POLL = 20.0  # seconds between two looks at PostgreSQL: long, so that real time does not count beside the world's
PATIENCE = 3 * POLL
_STUCK = 30.0  # real seconds after which a task that does not come back has met a lock
_MOST_CALLS = 2000


class Outcome(Enum):
    """What becomes of a call to a server."""

    ARRIVES = "arrives"
    TWICE = "arrives twice, because the first reply was lost"
    UNANSWERED = "arrives, and its reply is lost"
    LOST = "is lost on the way"


class Killed(BaseException):
    """The process died here."""


class Task:
    """A piece of a process's work, which stops before each call to a server.

    Attributes:
        name: What it is.
        at: Where it stands.
        done: It has ended.
        result: What it returned.
        error: What it raised.
    """

    _of_thread: ClassVar[threading.local] = threading.local()

    def __init__(self, process: Process, name: str, work: Callable[[], Any]) -> None:
        """Prepare; nothing runs yet."""
        self.process, self.name = process, name
        self.at = "its start"
        self.done = False
        self.result: Any = None
        self.error: BaseException | None = None
        self._work = work
        self._waits_for: Callable[[], bool] | None = None
        self._outcome = Outcome.ARRIVES
        self._killed = False
        self._thread: threading.Thread | None = None
        # Two locks hand the turn over: a baton that is taken by releasing it.
        self._go, self._back = threading.Lock(), threading.Lock()
        self._go.acquire()
        self._back.acquire()

    def __repr__(self) -> str:
        return f"{self.process.name} {self.name} at {self.at}"

    # --- the test's side ---------------------------------------------------------------------------------------------

    @property
    def can_go_on(self) -> bool:
        """Whether it neither has ended nor waits for another task."""
        return not self.done and (self._waits_for is None or self._waits_for())

    def run(self, cut: int | None = None, outcome: Outcome | None = None, *, stay: bool = False) -> None:
        """Go on until the end, or until it waits for another task.

        Args:
            cut: So many calls arrive; the next one has the outcome. None: all arrive.
            outcome: None: it stays before that call.
            stay: It stays after that call.
        """
        calls = 0
        if self._thread is None and self.can_go_on:
            self._advance()
        while self.can_go_on:
            assert calls < _MOST_CALLS, f"{self} never ends"
            if calls == cut:
                if outcome is None:
                    return
                self._outcome = outcome
            self._advance()
            if calls == cut and stay:
                return
            calls += 1

    def kill(self) -> None:
        """End it where it stands."""
        self._killed = True
        if self._thread is None:
            self.done = True
            self.process.tasks.remove(self)
        while not self.done:
            self._advance()

    def _advance(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self.name, daemon=True)
            self._thread.start()
        self._go.release()
        assert self._back.acquire(timeout=_STUCK), f"{self} does not come back"
        self.process.world.moved(self)

    # --- its own side ------------------------------------------------------------------------------------------------

    @classmethod
    def current(cls) -> Task | None:
        """Give the task that runs in this thread."""
        return getattr(cls._of_thread, "task", None)

    def stop(self, at: str, waits_for: Callable[[], bool] | None = None) -> Outcome:
        """Hand the turn back; go on when the test says so."""
        self.at, self._waits_for = at, waits_for
        self._outcome = Outcome.ARRIVES
        self._back.release()
        self._go.acquire()
        self._waits_for = None
        if self._killed:
            raise Killed
        return self._outcome

    def _run(self) -> None:
        self._of_thread.task = self
        self._go.acquire()
        try:
            if not self._killed:
                self.result = self._work()
        except Killed:
            pass
        except BaseException as error:
            self.error = error
        self.done = True
        self.at = "its end"
        self._back.release()


# --- connections -----------------------------------------------------------------------------------------------------


class _RedisLine:
    """A process's way to Redis: what the library uses of a `redis.Redis`."""

    def __init__(self, process: Process, guard: InstanceGuard | None) -> None:
        self._process = process
        self._guard = guard
        self._connected_to: str | None = None

    def _call(self, what: str, work: Callable[[redis.Redis], Any]) -> Any:
        world = self._process.world
        outcome = self._process.stop(f"redis {what}")
        if outcome is Outcome.LOST or not (world.redis_is_up and self._process.reaches_redis):
            self._connected_to = None
            raise redis.ConnectionError("Connection refused.")
        if self._connected_to != world.run_id and self._guard is not None:
            self._guard.connected(world.run_id)
        self._connected_to = world.run_id
        if outcome is Outcome.TWICE:
            with contextlib.suppress(redis.ResponseError):
                work(world.redis)
        result = work(world.redis)
        # The reply may be long in coming.
        self._process.stop(f"redis {what} is answered")
        if outcome is Outcome.UNANSWERED:
            self._connected_to = None
            raise redis.TimeoutError("Timeout reading from socket")
        return result

    def reconnect(self) -> None:
        self._connected_to = None

    def info(self, section: str) -> dict[str, Any]:
        world = self._process.world
        known = {"run_id": world.run_id, "redis_version": "7.2.0", "maxmemory_policy": "noeviction"}
        return cast("dict[str, Any]", self._call(f"INFO {section}", lambda _: known))

    def execute_command(self, *arguments: Any) -> Any:
        return self._call(_name_of(arguments), lambda client: client.execute_command(*arguments))

    def exchange(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        def exchange(client: redis.Redis) -> list[Any]:
            lane = LaneClient(connection_pool=client.connection_pool)
            try:
                return lane.exchange(commands)
            finally:
                lane.give_back()

        replies: list[Any] = self._call("+".join(map(_name_of, commands)), exchange)
        return replies

    def give_back(self) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        if not callable(getattr(redis.Redis, name, None)):
            raise AttributeError(name)
        return lambda *arguments, **options: self._call(
            name.upper(), lambda client: getattr(client, name)(*arguments, **options)
        )

    def pipeline(self, transaction: bool = True) -> _Pipeline:
        return _Pipeline(self._call)

    def close(self) -> None:
        pass


def _name_of(arguments: Sequence[Any]) -> str:
    """Name a command, or the script that it calls."""
    names = {script.digest: script.name for script in vars(scripts).values() if isinstance(script, scripts.Script)}
    return names.get(arguments[1], str(arguments[0])) if len(arguments) > 1 else str(arguments[0])


class _Pipeline:
    """Commands that are sent together."""

    def __init__(self, call: Callable[[str, Callable[[redis.Redis], Any]], Any]) -> None:
        self._call = call
        self._commands: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        if not callable(getattr(redis.Redis, name, None)):
            raise AttributeError(name)
        return lambda *arguments, **options: self._commands.append((name, arguments, options))

    def execute(self, raise_on_error: bool = True) -> list[Any]:
        def work(client: redis.Redis) -> list[Any]:
            pipeline = client.pipeline(transaction=False)
            for name, arguments, options in self._commands:
                getattr(pipeline, name)(*arguments, **options)
            return pipeline.execute(raise_on_error=raise_on_error)

        return cast("list[Any]", self._call(f"{len(self._commands)} commands", work))


class _PostgresLine(ColdPool):
    """A process's way to PostgreSQL: the real pool, but for where it gets a connection from."""

    def __init__(self, process: Process, config: TieredConfig) -> None:
        given: Any = SimpleNamespace(max_size=1, conninfo="", kwargs={}, closed=False)
        super().__init__(given, config, ours=True)
        self._opened = True
        self._process = process

    @contextlib.contextmanager
    def _borrow(self, statements: int) -> Iterator[Any]:
        world = self._process.world
        outcome = self._process.stop("postgres")
        if outcome is Outcome.LOST or not self._is_there():
            raise psycopg.OperationalError("connection refused")
        self._process.is_in_transaction = True
        try:
            yield world.postgres
        finally:
            self._process.is_in_transaction = False
        world.writes += 1
        self._process.stop("postgres is answered")
        if outcome in (Outcome.UNANSWERED, Outcome.TWICE):
            raise psycopg.OperationalError("server closed the connection unexpectedly")

    def answers(self) -> bool:
        if not self._is_there():
            self._refusal = psycopg.OperationalError("connection refused")
        return self._is_there()

    def _is_there(self) -> bool:
        return self._process.world.postgres_is_up and self._process.reaches_postgres


# --- processes -------------------------------------------------------------------------------------------------------


class _Turn:
    """A lock that is held while its holder waits for a server: others of the process wait as tasks do."""

    def __init__(self) -> None:
        self._held = False

    def __enter__(self) -> None:
        while self._held:
            task = Task.current()
            assert task is not None
            task.stop("lock", lambda: not self._held)
        self._held = True

    def __exit__(self, *_: object) -> None:
        self._held = False


class _Runtime(Runtime):
    def _reconnect(self) -> None:
        self.client.reconnect()


class Process:
    """A process: a saver, what it does, and what happens to it.

    Attributes:
        world: Where it lives.
        name: Its name.
        saver: Its saver.
        tasks: What it is doing.
        is_alive: It was not killed.
        is_stalled: It was stopped, and nothing of it runs.
        is_in_transaction: It is using the connection to PostgreSQL.
        reaches_redis: Redis is there for it.
        reaches_postgres: PostgreSQL is there for it.
        heard: When it last learned from PostgreSQL how things are, by the world's clock.
    """

    def __init__(self, world: World, name: str, **settings: Any) -> None:
        """Start it."""
        self.world, self.name = world, name
        self.tasks: list[Task] = []
        self.is_alive, self.is_stalled = True, False
        self.is_in_transaction = False
        self.reaches_redis = self.reaches_postgres = True
        self.heard = world.clock
        config = TieredConfig(**{**world.settings, **settings})
        guard = InstanceGuard()
        self.runtime = _Runtime(
            _RedisLine(self, guard),
            cast("Any", SimpleNamespace(close_others=lambda: None)),
            _PostgresLine(self, config),
            config,
            guard=guard,
            make_probe=lambda: _RedisLine(self, None),
        )
        self.runtime._setup_lock = cast("Any", _Turn())
        self.saver = TieredSaver.__new__(TieredSaver)
        self.saver._initialise(lambda: self.runtime, config, None)

    def stop(self, at: str) -> Outcome:
        """Let the running task stop before a call.

        Not before one to Redis that is made within a transaction: there is one connection to PostgreSQL for all.
        """
        task = Task.current()
        outcome = Outcome.ARRIVES if task is None or self.is_in_transaction else task.stop(at)
        if task is not None:
            self.world.trace.append(f"{self.name} {task.name}: {at} {outcome.value}")
        return outcome

    def start(self, name: str, work: Callable[[], Any]) -> Task:
        """Make a task of some work."""
        task = Task(self, name, work)
        self.tasks.append(task)
        return task

    def flushing(self) -> Task:
        """Give the flusher's round that is under way, or a new one."""
        return self._only("flush", self._flush)

    def checking(self) -> Task:
        """Give the health check that is under way, or a new one."""
        return self._only("check", self._check)

    def adopting(self) -> Task:
        """Give the look for orphans that is under way, or a new one."""
        return self._only("adopt", self._adopt)

    def _only(self, name: str, work: Callable[[], Any]) -> Task:
        return next((task for task in self.tasks if task.name == name), None) or self.start(name, work)

    def _flush(self) -> None:
        if not self.runtime.ready:
            return
        one = self.runtime.flusher

        def step() -> None:
            try:
                type(one).step(one)
            finally:
                one._stopping.set()

        one.step = step  # type: ignore[method-assign]
        one._stopping.clear()
        one._run()

    def _check(self) -> None:
        if not self.runtime.ready:
            return
        try:
            self.runtime.health.step()
        except Exception as error:
            self.runtime.health._refuse(cast("Any", error))
            if not isinstance(error, runtime.TieredSaverError):
                raise
        else:
            if self.runtime.pool.broken is None and self.reaches_postgres and self.world.postgres_is_up:
                self.heard = self.world.clock

    def _adopt(self) -> None:
        if self.runtime.ready and self.runtime.backlog.uses_journal:
            with contextlib.suppress(runtime.TieredSaverError):
                self.runtime.flusher.adopt_orphans(0.0)

    def beat(self) -> None:
        """Do what the pulse of a process does that runs: notice that it stood still."""
        if self.runtime.ready:
            self.runtime.health._doubt()
            self.runtime.health._pulse_at = self.world.clock

    def go_on(self) -> None:
        """Let everything that is under way go on, as it does while a process is left alone."""
        while not self.is_stalled and (ready := [task for task in self.tasks if task.can_go_on]):
            for task in ready:
                task.run()

    def kill(self) -> None:
        """End it as SIGKILL does."""
        self.is_alive = False
        for task in list(self.tasks):
            task.kill()
        # Nothing of it may run when the interpreter exits.
        self.runtime.closed = True


# --- the world -------------------------------------------------------------------------------------------------------


class World:
    """The servers, the network and the processes.

    Attributes:
        clock: Seconds, for processes and PostgreSQL.
        redis: The real server's client.
        postgres: A connection to the real server.
        run_id: Redis' run id.
        processes: Those that live.
        writes: How often something was done in PostgreSQL.
        trace: The calls to the servers, and what became of them.
        on_move: Called after every step of a task.
    """

    settings: ClassVar[dict[str, Any]] = {
        "key_prefix": "world",
        "shard_count": 1,
        "flush_linger": 0.0,
        "sweep_interval": 0.0,
        "poll_interval": POLL,
    }

    def __init__(self, redis_url: str, postgres_url: str) -> None:
        """Connect; the tables will be in a schema of its own, which `close` drops."""
        self.redis: redis.Redis = redis.Redis.from_url(redis_url, protocol=2)
        self.postgres: psycopg.Connection[Any] = psycopg.connect(
            postgres_url, autocommit=True, row_factory=dict_row, prepare_threshold=0
        )
        self._schema = sql.Identifier(f"world_{uuid.uuid4().hex}")
        self.postgres.execute(sql.SQL("CREATE SCHEMA {}").format(self._schema))
        self.postgres.execute(sql.SQL("SET search_path TO {}").format(self._schema))
        self.processes: list[Process] = []
        self.on_move: Callable[[Task], None] = lambda _: None
        self.keyspace = Keyspace(self.settings["key_prefix"], 1)
        for script in vars(scripts).values():
            if isinstance(script, scripts.Script):
                self.redis.script_load(script.text)
        self._forget()

    def set_up(self) -> None:
        """Create the tables."""
        first = Process(self, "first")
        first.saver.setup()
        first.kill()

    def begin(self) -> None:
        """Begin anew: nothing is stored, and nobody lives."""
        self.end()
        self._forget()
        self.redis.flushdb()
        for table in (
            "checkpoints",
            "checkpoint_blobs",
            "checkpoint_writes",
            "tiered_threads",
            "tiered_quarantine",
            "tiered_members",
        ):
            self.postgres.execute(f"DELETE FROM {table}".encode())
        self.postgres.execute(
            "UPDATE tiered_generation SET number = 1, opened = false, started_at = clock_timestamp(), "
            "unreachable_at = '-infinity'"
        )

    def end(self) -> None:
        """Kill everybody."""
        for process in self.processes:
            process.kill()
        self.processes = []

    def close(self) -> None:
        """Kill everybody and disconnect."""
        self.end()
        self.redis.close()
        self.postgres.execute(sql.SQL("DROP SCHEMA {} CASCADE").format(self._schema))
        self.postgres.close()

    def _forget(self) -> None:
        self.redis_is_up = self.postgres_is_up = True
        self.run_id = "run-0"
        self.clock = 1000.0
        self.writes = self._count = 0
        self.trace: list[str] = []

    def start(self, **settings: Any) -> Process:
        """Start a process."""
        self._count += 1
        process = Process(self, f"P{self._count}", **settings)
        self.processes.append(process)
        return process

    def kill(self, process: Process) -> None:
        """Kill a process."""
        process.kill()
        self.processes.remove(process)

    def moved(self, task: Task) -> None:
        """Look at what a step of a task has changed."""
        if task.done:
            task.process.tasks.remove(task)
        self.on_move(task)

    def go_on(self) -> None:
        """Let tasks go on that waited for others."""
        while ready := [
            task
            for process in self.processes
            if not process.is_stalled
            for task in process.tasks
            if task._waits_for is not None and task.can_go_on
        ]:
            for task in ready:
                task.run()

    def pass_time(self, seconds: float) -> None:
        """Let time pass, in which every process that runs does what it does by itself."""
        while seconds > 0:
            self.clock += min(seconds, POLL)
            # PostgreSQL's clock is real, so everything that it remembers is made older.
            for table, column in (
                ("members", "seen_at"),
                ("generation", "started_at"),
                ("generation", "unreachable_at"),
            ):
                self.postgres.execute(
                    f"UPDATE tiered_{table} SET {column} = {column} - make_interval(secs => %s)".encode(),
                    (min(seconds, POLL),),
                )
            seconds -= POLL
            for process in self.processes:
                process.go_on()
                if not process.is_stalled:
                    process.beat()
                    for task in (process.checking(), process.flushing()):
                        task.run()
                process.go_on()
            self.go_on()

    # --- what happens to Redis ---------------------------------------------------------------------------------------

    def wipe(self) -> None:
        """Empty Redis."""
        self.redis.flushdb()

    def evict(self) -> None:
        """Forget what is hot, as an eviction or a time to live does."""
        if hot := self.redis.keys("*:hot:*"):
            self.redis.delete(*hot)

    def restart(self, snapshot: Snapshot | None = None) -> None:
        """Restart Redis, with what it has or had."""
        self.run_id = f"run-{int(self.run_id[4:]) + 1}"
        if snapshot is not None:
            pipeline = self.redis.pipeline()
            pipeline.flushdb()
            for key, dump in snapshot.keys.items():
                pipeline.restore(key, 0, dump)
            pipeline.execute()

    def snapshot(self) -> Snapshot:
        """Remember what Redis has, as an append-only file or a replica does that then falls behind."""
        keys = self.redis.keys("*")
        pipeline = self.redis.pipeline()
        for key in keys:
            pipeline.dump(key)
        return Snapshot(dict(zip(keys, pipeline.execute(), strict=True)))


@dataclass(frozen=True)
class Snapshot:
    """What Redis had."""

    keys: dict[bytes, bytes]


# --- what the library's modules see ----------------------------------------------------------------------------------


class _Threads:
    """The module `threading` for modules that start threads: here they become tasks, or nothing."""

    def __getattr__(self, name: str) -> Any:
        return getattr(threading, name)

    class Thread:
        """A thread of the library."""

        def __init__(self, target: Callable[[], Any], name: str, daemon: bool) -> None:
            self._target, self._name = target, name

        def start(self) -> None:
            """Make a task of what is done once; what goes on for ever is done when the test says so."""
            task = Task.current()
            if self._name.endswith("-fill") and task is not None:
                task.process.start("fill", self._target)

        def join(self, timeout: float | None = None) -> None:
            """Wait for nothing."""


@contextlib.contextmanager
def new_world(postgres_url: str) -> Iterator[World]:
    """Make a world on a Redis and a schema of its own, and let the library run in it."""
    with RedisServer(options={"appendonly": "no"}) as server, pytest.MonkeyPatch.context() as patch:
        world = World(server.url, postgres_url)
        library = logging.getLogger("langgraph_tiered_saver")
        before = library.level
        try:
            # Not by setting the attribute: loggers remember which levels are off until they are told.
            library.setLevel(logging.CRITICAL)
            _install(world, patch)
            world.set_up()
            yield world
        finally:
            library.setLevel(before)
            world.close()


def _install(world: World, patch: pytest.MonkeyPatch) -> None:
    """Let the library run in a world: with its clock, without threads and without waiting for anything."""

    def sleep(seconds: float) -> None:
        if (task := Task.current()) is not None:
            task.stop("sleep")
        # Who sleeps a moment again and again comes to an end as soon as who sleeps for long.
        world.clock += max(seconds, 1.0)

    def wait(request: Wait) -> int:
        task = Task.current()
        assert task is not None
        deadline = None if request.timeout is None else world.clock + request.timeout
        for index, ticket in enumerate(request.tickets):

            def over(ticket: Any = ticket) -> bool:
                return ticket.done() or (deadline is not None and world.clock >= deadline)

            while not over():
                task.stop("wait", over)
            if not ticket.done():
                return sum(not waiting.done() for waiting in request.tickets[index:])
            ticket.result()
        return 0

    def raise_it(*_: Any) -> None:
        raise  # an unexpected error, which the flusher would only log

    clock = SimpleNamespace(monotonic=lambda: world.clock, sleep=sleep)
    for module in (health, runtime, flusher, pool, schema):
        patch.setattr(module, "time", clock)
    for threaded in (health, flusher):
        patch.setattr(threaded, "threading", _Threads())
    patch.setattr(flusher.logger, "exception", raise_it)
    patch.setattr(runtime, "atexit", SimpleNamespace(register=lambda *_: None))
    patch.setattr(drivers, "_wait", wait)
    for name in ("wait", "linger"):
        patch.setattr(Backlog, name, lambda *_, **__: None)
