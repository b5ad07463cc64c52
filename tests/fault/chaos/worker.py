"""A worker: a process that runs graphs on many threads, and is killed now and then.

`python -m tests.fault.chaos.worker OPTIONS`, the options as JSON, until its standard input ends. A thread is driven by
one worker at a time: who holds the lock of a slot, which the kernel takes back from the dead, drives the thread that
the slot names and hands it over after every turn. Everybody reads everybody's threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import random
import sys
import threading
import time
import traceback
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from langgraph.checkpoint.base import empty_checkpoint
from langgraph.checkpoint.base.id import uuid6
from langgraph.types import Command

from langgraph_tiered_saver import TieredSaverError
from tests.fault.chaos import graphs
from tests.fault.chaos.operations import LoggedSaver, OperationLog

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator

    from langchain_core.runnables import RunnableConfig

_TURNS = 40  # of one thread, before a new one takes its place
_STATUS_SECONDS = 0.1
# Of so many slots, one is driven through the saver's own methods; that one's thread and the next one's are deleted by
# others, too.
_RAW_SLOTS = 5
_ACTIONS = {"chat": 40, "fan": 18, "ask": 20, "fork": 10, "delete": 8, "list": 7}


@dataclass(frozen=True)
class Options:
    """What a worker is told.

    Attributes:
        name: Its name, which no other process has.
        directory: The run's; `operations`, `slots`, `status` and `problems` are in it.
        redis_url: The hot tier.
        postgres_url: The cold tier.
        settings: The saver's settings.
        seed: Of what it does.
        slots: How many threads live at a time.
        drivers: How many threads of the process, or tasks of its event loop, drive; one more only reads.
        think: Seconds between two turns of a driver, on average.
        asynchronous: Use the asynchronous methods, in one event loop.
    """

    name: str
    directory: str
    redis_url: str
    postgres_url: str
    settings: dict[str, Any]
    seed: str
    slots: int
    drivers: int
    think: float
    asynchronous: bool

    def as_json(self) -> str:
        """Give the command line's form."""
        return json.dumps(asdict(self))


class Api:
    """The calls that a driver makes, for either kind; the synchronous ones return without ever having waited."""

    def __init__(self, saver: LoggedSaver, *, asynchronous: bool) -> None:
        self.saver, self.asynchronous = saver, asynchronous
        self.graph = graphs.build(saver)

    async def call(self, target: Any, name: str, *arguments: Any, **options: Any) -> Any:
        """Call a method, or the asynchronous one of its name with an `a` in front."""
        if self.asynchronous:
            return await getattr(target, f"a{name}")(*arguments, **options)
        return getattr(target, name)(*arguments, **options)

    async def collect(self, target: Any, name: str, *arguments: Any, **options: Any) -> list[Any]:
        """Call a method that gives an iterator, and collect what it gives."""
        if self.asynchronous:
            return [item async for item in getattr(target, f"a{name}")(*arguments, **options)]
        return list(getattr(target, name)(*arguments, **options))

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        if self.asynchronous:
            await asyncio.sleep(seconds)
        else:
            time.sleep(seconds)  # noqa: ASYNC251 - no event loop runs in this thread


class Slot:
    """A place for one thread at a time.

    Attributes:
        thread_id: The thread.
        turns: How many it has had.
    """

    def __init__(self, directory: Path, number: int) -> None:
        self._file, self.number = directory / f"{number}.json", number
        self._read()

    def _read(self) -> None:
        self.thread_id, self.turns = f"s{self.number}-0", 0
        with contextlib.suppress(FileNotFoundError):
            self.thread_id, self.turns = json.loads(self._file.read_bytes())

    @contextlib.contextmanager
    def claim(self) -> Iterator[bool]:
        """Try to become the one who drives; what the slot says is read anew."""
        with self._file.with_suffix(".lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            self._read()
            yield True

    def save(self, **changes: Any) -> None:
        """Change what the slot says, for others and for ever; only who drives may."""
        vars(self).update(changes)
        new = self._file.with_suffix(f".{os.getpid()}")
        new.write_text(json.dumps([self.thread_id, self.turns]))
        new.replace(self._file)

    def retire(self) -> None:
        """Let a new thread take the place."""
        number = int(self.thread_id.split("-")[1])
        self.save(thread_id=f"s{self.number}-{number + 1}", turns=0)

    @contextlib.contextmanager
    def deleting(self) -> Iterator[None]:
        """Leave a mark while a delete of the thread is under way, and for ever if it fails or its process dies."""
        mark = self._file.with_name(f"deleting-{self.thread_id}-{uuid.uuid4().hex}")
        mark.touch()
        yield
        mark.unlink()

    @property
    def is_uncertain(self) -> bool:
        """Whether a delete may happen at any time, so that nobody may rely on anything written since."""
        return any(self._file.parent.glob(f"deleting-{self.thread_id}-*"))

    def disturb(self) -> None:
        """Note that somebody else than its driver changes the thread."""
        self._file.with_name(f"disturbed-{self.thread_id}").touch()

    @property
    def is_disturbed(self) -> bool:
        """Whether somebody else than its driver has changed the thread, so that its state need not make sense."""
        return self._file.with_name(f"disturbed-{self.thread_id}").exists()


class Driver:
    """One of the loops of a worker."""

    def __init__(self, worker: Worker, api: Api, number: int) -> None:
        self.worker, self.api, self.saver = worker, api, api.saver
        self.random = random.Random(f"{worker.options.seed}/{number}")

    async def watch(self) -> None:
        """Read, and do nothing else, until the worker is told to stop."""
        await self.run(looks=1.0, think=self.worker.options.think / 3)

    async def run(self, looks: float = 0.3, think: float | None = None) -> None:
        """Take turns until the worker is told to stop.

        Args:
            looks: How many of the turns, from 0 to 1, only read.
            think: Seconds between two turns, on average; the worker's if None.
        """
        directory, options = self.worker.directory / "slots", self.worker.options
        think = options.think if think is None else think
        while not self.worker.stopping:
            slot = Slot(directory, self.random.randrange(options.slots))
            try:
                if self.random.random() < looks:
                    await self._look(slot)
                else:
                    with slot.claim() as claimed:
                        if claimed:
                            await self._turn(slot)
            except TieredSaverError:
                # The log has it. Whoever takes the slot next resumes the thread.
                await self.api.sleep(self.random.uniform(0.05, 0.3))
            except Exception:
                if not slot.is_disturbed:
                    self.worker.report(slot.thread_id, traceback.format_exc())
                await self.api.sleep(0.1)
            await self.api.sleep(think * self.random.uniform(0.2, 1.8))

    async def _look(self, slot: Slot) -> None:
        """Read a thread that somebody else may be driving."""
        config: RunnableConfig = {"configurable": {"thread_id": slot.thread_id}}
        if slot.number % _RAW_SLOTS < 2 and self.random.random() < 0.05:
            # Under the hands of whoever drives it.
            slot.disturb()
            await self._delete(slot)
        elif self.random.random() < 0.2:
            listed = await self.api.collect(self.saver, "list", config, limit=self.random.randint(1, 4))
            if listed:
                await self.api.call(self.saver, "get_tuple", listed[-1].config)
        else:
            found = await self.api.call(self.saver, "get_tuple", config)
            if found is not None and "messages" in found.checkpoint["channel_values"]:
                self._check(slot, found.checkpoint["channel_values"], finished=False)

    async def _turn(self, slot: Slot) -> None:
        """Drive a thread one turn."""
        if slot.is_uncertain:
            await self.api.call(self.saver, "delete_thread", slot.thread_id)
            slot.retire()
        elif slot.turns >= _TURNS:
            slot.retire()
        else:
            slot.save(turns=slot.turns + 1)
            await (self._raw_turn(slot) if slot.number % _RAW_SLOTS == 0 else self._graph_turn(slot))

    async def _graph_turn(self, slot: Slot) -> None:
        config: RunnableConfig = {"configurable": {"thread_id": slot.thread_id}}
        state = await self.api.call(self.api.graph, "get_state", config)
        # Not `next`: a task whose writes are stored while its step is not applied yet is no longer named there.
        self._check(slot, state.values, finished=not state.tasks)
        if state.tasks:
            asked = any(task.interrupts for task in state.tasks)
            given: Any = Command(resume=f"yes {self.random.randrange(1000)}") if asked else None
            await self.api.call(self.api.graph, "invoke", given, config)
            return
        action = self.random.choices([*_ACTIONS], [*_ACTIONS.values()])[0]
        if action == "delete":
            await self._delete(slot)
        elif action == "list":
            await self.api.collect(self.saver, "list", config, limit=5)
        elif action == "fork" and state.values:
            await self._fork(config)
        else:
            await self.api.call(self.api.graph, "invoke", {"do": action, "size": self.random.randint(1, 5)}, config)

    async def _fork(self, config: RunnableConfig) -> None:
        """Go on from an older checkpoint."""
        history = await self.api.collect(self.api.graph, "get_state_history", config, limit=8)
        older = [state for state in history if not state.tasks and state.values]
        if older:
            state = self.random.choice(older)
            update = graphs.message(state.values, "fork")
            await self.api.call(self.api.graph, "update_state", state.config, update, as_node="answer")

    async def _delete(self, slot: Slot) -> None:
        with slot.deleting():
            await self.api.call(self.saver, "delete_thread", slot.thread_id)
        await self.api.call(self.saver, "get_tuple", {"configurable": {"thread_id": slot.thread_id}})

    async def _raw_turn(self, slot: Slot) -> None:
        """Write a few checkpoints and writes by the saver's own methods, and read them back."""
        config: RunnableConfig = {"configurable": {"thread_id": slot.thread_id, "checkpoint_ns": ""}}
        found = await self.api.call(self.saver, "get_tuple", config)
        if self.random.random() < 0.1:
            # What follows names a parent and versions that are gone.
            await self._delete(slot)
        versions: dict[str, Any] = dict(found.checkpoint["channel_versions"]) if found else {}
        step = found.checkpoint["channel_values"]["step"] if found else -1
        at = found.config if found else config
        for _ in range(self.random.randint(1, 4)):
            step += 1
            values = {"step": step, "log": [*range(step + 1)], "constant": {"thread": slot.thread_id}}
            changed = {
                channel: self.saver.get_next_version(versions.get(channel), None)
                for channel in values
                if channel != "constant" or channel not in versions
            }
            versions |= changed
            checkpoint = empty_checkpoint()
            checkpoint |= {"id": str(uuid6()), "channel_values": values, "channel_versions": dict(versions)}
            metadata: Any = {"source": "loop", "step": step, "parents": {}}
            at = await self.api.call(self.saver, "put", at, checkpoint, metadata, changed)
            for task in range(2):
                writes = [("log", [step, task]), ("step", step + 1)]
                await self.api.call(self.saver, "put_writes", at, writes, f"task-{task}")
        await self.api.call(self.saver, "get_tuple", self.random.choice([at, config]))

    def _check(self, slot: Slot, values: dict[str, Any], *, finished: bool) -> None:
        problem = graphs.broken(values, finished=finished)
        if problem and not slot.is_disturbed:
            self.worker.report(slot.thread_id, f"{problem}: {values!r:.2000}")


class Worker:
    """The process.

    Attributes:
        directory: The run's.
        stopping: Nobody begins another turn.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.directory = Path(options.directory)
        self.stopping = False
        self.saver = LoggedSaver.from_conn_string(options.redis_url, options.postgres_url, **options.settings)
        self.saver.log = OperationLog(self.directory / "operations", options.name)
        self._lock = threading.Lock()
        self._stats: dict[str, Any] = {}

    def report(self, thread_id: str, text: str) -> None:
        """Report something that must not happen."""
        with self._lock, (self.directory / "problems" / f"{self.options.name}.jsonl").open("a") as file:
            file.write(json.dumps({"thread": thread_id, "at": time.monotonic_ns(), "text": text}) + "\n")

    def run(self) -> None:
        """Drive until told to stop, then close."""
        threading.Thread(target=self._wait_for_the_end, daemon=True).start()
        threading.Thread(target=self._tell, daemon=True).start()
        api = Api(self.saver, asynchronous=self.options.asynchronous)
        drivers = [Driver(self, api, number) for number in range(self.options.drivers + 1)]
        loops = [drivers[0].watch(), *(driver.run() for driver in drivers[1:])]
        if self.options.asynchronous:
            asyncio.run(self._run_all(loops))
        else:
            threads = [threading.Thread(target=run_synchronously, args=(loop,)) for loop in loops]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            self.saver.close()
        self._write_status()

    async def _run_all(self, loops: list[Coroutine[Any, Any, None]]) -> None:
        await asyncio.gather(*loops)
        await self.saver.aclose()

    def _wait_for_the_end(self) -> None:
        sys.stdin.read()
        self.stopping = True

    def _tell(self) -> None:
        while True:
            self._write_status()
            time.sleep(_STATUS_SECONDS)

    def _write_status(self) -> None:
        at = time.monotonic_ns()
        with contextlib.suppress(TieredSaverError):
            self._stats = asdict(self.saver.stats())
        file = self.directory / "status" / f"{self.options.name}.json"
        new = file.with_suffix(f".{threading.get_ident()}")
        new.write_text(json.dumps({"at": at, "answered": self.saver.log.answered, "stats": self._stats}))
        new.replace(file)


def run_synchronously(work: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine that never waits, without an event loop."""
    with contextlib.suppress(StopIteration):
        work.send(None)
        raise RuntimeError("a synchronous driver waited for an event loop")


def main() -> None:
    """Run a worker."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    Worker(Options(**json.loads(sys.argv[1]))).run()


if __name__ == "__main__":
    main()
