"""Asynchronous clients of a Redis Cluster; one for each event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import redis
import redis.asyncio as aioredis
from redis.commands import AsyncCoreCommands

from langgraph_tiered_saver.errors import ConfigurationError
from langgraph_tiered_saver.hot import options
from langgraph_tiered_saver.hot.cluster import (
    ERRORS,
    Site,
    add,
    alone,
    fill,
    first,
    flatten,
    learn,
    plain_commands,
    replies_of,
    split,
    unit_of,
    unit_of_many,
)
from langgraph_tiered_saver.hot.slots import Address, Exchange, Refresh, Unit, deliver

_Commands: Any = AsyncCoreCommands


class AsyncClusterClient(_Commands):  # type: ignore[misc]
    """What `cluster.ClusterClient` is, for one event loop."""

    def __init__(self, site: Site) -> None:
        """Remember how to connect."""
        self._site = site
        self._nodes: dict[Address, Any] = {}
        self._former: list[Any] = []
        self._refreshing: asyncio.Task[Exception | None] | None = None

    async def execute_command(self, *arguments: Any, **given: Any) -> Any:
        """Run a command that names a key; see `cluster.ClusterClient.execute_command` for the errors."""
        return first((await self.deliver([unit_of(arguments, given)]))[0])

    async def exchange(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Send commands with keys of one slot in one round trip; see `lanes.LaneClient.exchange`."""
        return replies_of((await self.deliver([unit_of_many(commands)]))[0])

    def pipeline(self, transaction: bool = False) -> AsyncClusterPipeline:
        """Collect commands that are sent in one round trip, to all masters at once."""
        if transaction:
            raise redis.exceptions.RedisClusterException("A transaction cannot span the servers of a Cluster.")
        return AsyncClusterPipeline(self)

    async def reconnect(self) -> None:
        """Close the idle connections."""
        for node in list(self._nodes.values()):
            await node.retire()
            await node.connection_pool.disconnect(inuse_connections=False)

    async def aclose(self) -> None:
        """Close every connection. A later command opens new ones."""
        nodes, self._nodes, self._former = [*self._nodes.values(), *self._former], {}, []
        for node in nodes:
            await node.aclose()

    async def deliver(self, units: Sequence[Unit]) -> list[Any]:
        """Send units; see `slots.deliver` for what comes back."""
        steps = deliver(self._site.slots, units, self._site.config.redis_timeout)
        answer: Any = None
        try:
            while True:
                step = steps.send(answer)
                if isinstance(step, Exchange):
                    answer = await self._exchange(step)
                elif isinstance(step, Refresh):
                    answer = await self._refresh(step)
                else:
                    await asyncio.sleep(step.seconds)
        except StopIteration as stop:
            results: list[Any] = stop.value
            return results

    async def _exchange(self, step: Exchange) -> dict[Address, Any]:
        if len(step.parts) == 1:
            return {address: await self._send(address, part) for address, part in step.parts.items()}
        replies = await asyncio.gather(*(self._send(address, part) for address, part in step.parts.items()))
        return dict(zip(step.parts, replies, strict=True))

    async def _send(self, address: Address, part: Sequence[tuple[Unit, bool]]) -> list[list[Any]] | Exception:
        node = self._node(address)
        try:
            if (plain := plain_commands(part)) is not None:
                return [(await node.exchange(plain))[len(plain) - len(part[0][0].commands) :]]
            if (command := alone(part)) is not None:
                try:
                    return [[await node.execute_command(*command[0], **command[1])]]
                except redis.ResponseError as error:
                    return [[error]]
            pipeline = node.pipeline(transaction=False)
            fill(pipeline, part)
            return split(part, await pipeline.execute(raise_on_error=False))
        except ERRORS as error:
            return error

    def _node(self, address: Address) -> Any:
        node = self._nodes.get(address)
        if node is None:
            make: Any = aioredis.BlockingConnectionPool
            retry = options.async_retries(self._site.config)
            node = self._nodes[address] = options.async_client_of(make(**self._site.of_node(address), retry=retry))
        return node

    async def _refresh(self, request: Refresh) -> Exception | None:
        """Load the slots anew; None, or what went wrong with the last server that was asked."""
        if self._site.slots.version != request.version:
            return None
        if self._refreshing is None or self._refreshing.done():
            # A task, because others wait for it, too, and whoever began it may be cancelled.
            deadline = time.monotonic() + request.seconds
            candidates = self._site.slots.candidates(request.failed)
            self._refreshing = asyncio.get_running_loop().create_task(self._ask_in_turn(candidates, deadline))
        done, _ = await asyncio.wait((self._refreshing,), timeout=request.seconds)
        if not done:
            return redis.TimeoutError("Nobody told in time which Redis server has which slot")
        return done.pop().result()

    async def _ask_in_turn(self, candidates: Sequence[Address], deadline: float) -> Exception | None:
        problem: Exception | None = None
        for index, address in enumerate(candidates):
            seconds = (deadline - time.monotonic()) / (len(candidates) - index)
            if problem is not None and seconds <= 0:
                break
            if (problem := await self._ask(address, seconds)) is None:
                await self._forget(self._site.slots.masters())
                break
        return problem

    async def _ask(self, address: Address, seconds: float) -> Exception | None:
        make: Any = aioredis.ConnectionPool
        question = self._site.of_question(address, seconds)
        client: Any = aioredis.Redis.from_pool(make(**question, retry=options.async_none()))
        try:
            try:
                reply = await client.execute_command("CLUSTER", "SLOTS")
            except redis.ResponseError as refusal:
                reply = refusal
            learn(self._site, address, reply)
        except (*ERRORS, ConfigurationError) as error:
            return error
        finally:
            await client.aclose()
        return None

    async def _forget(self, masters: Sequence[Address]) -> None:
        """Let go of servers that are no longer masters. A connection in use is closed with the client."""
        for address in [address for address in self._nodes if address not in masters]:
            node = self._nodes.pop(address)
            self._former.append(node)
            await node.retire()
            await node.connection_pool.disconnect(inuse_connections=False)


class AsyncClusterPipeline:
    """Commands that are sent in one round trip. One without keys (WAIT) goes with the one before it."""

    def __init__(self, client: AsyncClusterClient) -> None:
        """Begin empty."""
        self._client = client
        self._units: list[Unit] = []

    def execute_command(self, *arguments: Any, **given: Any) -> AsyncClusterPipeline:
        """Add a command."""
        add(self._units, arguments, given)
        return self

    async def execute(self, raise_on_error: bool = True) -> list[Any]:
        """Send the commands, and empty the pipeline; see `cluster.ClusterPipeline.execute`."""
        units, self._units = self._units, []
        return flatten(units, await self._client.deliver(units) if units else [], raise_on_error=raise_on_error)
