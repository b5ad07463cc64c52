"""Processes that die at a named crash point, and what they do until they get there.

They are forked from a server that has imported other people's packages, not ours: that saves most of a start, and ours
is imported with `LANGGRAPH_TIERED_CRASH_POINT` in the environment. So this module imports ours only where it is used.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from langgraph.checkpoint.base import CheckpointTuple

    from tests.fault.workers import Acked, Chain, Place

MOST_STEPS = 300  # a child that has not died by then ends, which is a failure

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["__main__", "langgraph.checkpoint.postgres", "psycopg_pool", "redis.asyncio", __name__])


class Child:
    """A process that is to die at a crash point."""

    def __init__(self, place: Place, name: str, point: str, **options: Any) -> None:
        """Start it.

        Args:
            place: Where it meets the others.
            name: Its own, among those of one test.
            point: Where it dies, as `LANGGRAPH_TIERED_CRASH_POINT` names it.
            **options: What `work` reads.
        """
        self.point = point
        self._output = place.directory / f"{name}.out"
        self._errors = place.directory / f"{name}.err"
        options |= {"redis_url": place.redis_url, "postgres_url": place.postgres_url}
        options["settings"] = {"key_prefix": place.key_prefix, **options.get("settings", {})}
        self._process = _forks.Process(target=_run, args=(point, self._output, self._errors, options))
        self._process.start()

    def die(self, timeout: float = 60.0) -> None:
        """Wait until it has died at its crash point."""
        self._process.join(timeout)
        code = self._process.exitcode
        errors = self._errors.read_text() if self._errors.exists() else ""
        assert code == -signal.SIGKILL, f"the child ended with {code}, not at {self.point}:\n{errors[-3000:]}"

    def end(self) -> None:
        """Kill it if it still lives."""
        self._process.kill()
        self._process.join()

    def acked(self) -> list[Acked]:
        """Give what was acknowledged to it."""
        from tests.fault.workers import Acked

        return [Acked(*report) for report in self.reports() if len(report) == 4]

    def reports(self) -> list[list[Any]]:
        """Give everything it has reported; a line it was killed in does not count."""
        *lines, _ = self._output.read_bytes().split(b"\n")
        return [json.loads(line) for line in lines]


def _run(point: str, output: Path, errors: Path, options: dict[str, Any]) -> None:
    """Become a child: a process of its own environment and outputs."""
    os.environ["LANGGRAPH_TIERED_CRASH_POINT"] = point
    for number, path in ((1, output), (2, errors)):
        with path.open("wb") as file:
            os.dup2(file.fileno(), number)
    asyncio.run(work(options))


def resume(chain: Chain, found: CheckpointTuple | None) -> Chain:
    """Let a chain go on where a thread stands."""
    if found is not None:
        chain.config = found.config
        chain.versions = {name: str(version) for name, version in found.checkpoint["channel_versions"].items()}
        chain.step = found.checkpoint["channel_values"]["step"]
    return chain


async def work(options: dict[str, Any]) -> None:
    """Go on with some threads, delete one, and write until something ends this process.

    Options: `asynchronous` (call the saver's `a...` methods), `threads`, `steps` (how many before the delete),
    `deletes` (a thread), `wipes` (empty Redis once everything is flushed).
    """
    import redis

    from tests.fault.workers import Chain, address, open_saver, report

    saver = open_saver(options)

    async def do(target: Any, name: str, *arguments: Any) -> Any:
        if options["asynchronous"]:
            return await getattr(target, f"a{name}")(*arguments)
        return getattr(target, name)(*arguments)

    chains = [resume(Chain(saver, name), await do(saver, "get_tuple", address(name))) for name in options["threads"]]

    async def step() -> None:
        for chain in chains:
            report(*await do(chain, "put"))
            report(*await do(chain, "write"))

    for _ in range(options.get("steps", 1)):
        await step()
    if options.get("deletes"):
        await do(saver, "delete_thread", options["deletes"])
        report("deleted", options["deletes"])
    if options.get("wipes"):
        await do(saver, "flush")
        with redis.Redis.from_url(options["redis_url"]) as client:
            client.flushall()
    for _ in range(MOST_STEPS):
        await step()
