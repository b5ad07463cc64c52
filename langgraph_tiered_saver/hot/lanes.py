"""Clients of one server that keep connections between calls, and send what is called at once in one piece.

A call of a script takes Redis some 30 µs. redis-py takes longer than that to borrow a connection, look at it, count it
and give it back; its asynchronous connections put every command into a task of its own. So exchanges go another way
here, on connections that redis-py's pools have made: authentication, TLS, Sentinel and the guard are theirs.

* A synchronous exchange takes an idle connection from a stack of ours.
* Asynchronous exchanges of one event loop share one connection, and those of one turn of the loop one system call;
  replies come in the order of the commands.

A connection that breaks is made anew and the exchange repeated, as often as the pool's retry policy says: everything
that is sent this way may run twice.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import hiredis
import redis
import redis.asyncio as aioredis
from redis.backoff import ExponentialWithJitterBackoff

RETRY_BASE = 0.02  # seconds
RETRY_CAP = 0.25

Command = tuple[bytes | str | int, ...]
_pack: Callable[[Command], bytes] = hiredis.pack_command  # type: ignore[assignment]


def backoff() -> ExponentialWithJitterBackoff:
    """Give the pauses between the attempts of one call."""
    return ExponentialWithJitterBackoff(base=RETRY_BASE, cap=RETRY_CAP)


def _attempts(pool: Any) -> int:
    retry = pool.connection_kwargs.get("retry")
    return 1 + (retry.get_retries() if retry is not None else 0)


class LaneClient(redis.Redis):
    """A synchronous client; every method from any thread."""

    def __init__(self, *, connection_pool: Any, **given: Any) -> None:
        super().__init__(connection_pool=connection_pool, **given)
        self._idle: deque[Any] = deque()
        # Pipelines and other commands borrow from the same pool.
        self._most_idle = max(1, getattr(connection_pool, "max_connections", 2) // 2)
        self._attempts = _attempts(connection_pool)

    def exchange(self, commands: Sequence[Command]) -> list[Any]:
        """Send commands in one round trip.

        Returns:
            The replies as Redis gave them; the error, where it refused.

        Raises:
            redis.RedisError, OSError: the server cannot be reached or does not answer; it may have run them.
        """
        packed = _pack(commands[0]) if len(commands) == 1 else b"".join(map(_pack, commands))
        pool = self.connection_pool
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = pool.get_connection()
        failures = 0
        while True:
            try:
                connection.send_packed_command((packed,))
                replies = []
                for _ in commands:
                    try:
                        replies.append(connection.read_response(disable_decoding=True))
                    except redis.ResponseError as error:
                        replies.append(error)
            except redis.ConnectionError:
                connection.disconnect()
                failures += 1
                if failures >= self._attempts:
                    pool.release(connection)
                    raise
                # Of this connection, not of the next idle one: the server may have closed them all.
                time.sleep(backoff().compute(failures))
            except BaseException:
                connection.disconnect()
                pool.release(connection)
                raise
            else:
                if len(self._idle) < self._most_idle:
                    self._idle.append(connection)
                else:
                    pool.release(connection)
                return replies

    def give_back(self) -> None:
        """Return the idle connections to the pool."""
        while self._idle:
            try:
                connection = self._idle.pop()
            except IndexError:
                return
            self.connection_pool.release(connection)

    def close(self) -> None:
        """Close every connection. A later call opens new ones."""
        self.give_back()
        super().close()


class AsyncLaneClient(aioredis.Redis):
    """An asynchronous client, for one event loop."""

    def __init__(self, *, connection_pool: Any, **given: Any) -> None:
        super().__init__(connection_pool=connection_pool, **given)
        self._lane: _Lane | None = None
        self._spent: list[Any] = []
        self._connecting: asyncio.Lock | None = None
        self._attempts = _attempts(connection_pool)

    async def exchange(self, commands: Sequence[Command]) -> list[Any]:
        """Send commands in one round trip; see `LaneClient.exchange`.

        A caller that is cancelled leaves its commands to the server.
        """
        packed = _pack(commands[0]) if len(commands) == 1 else b"".join(map(_pack, commands))
        failures = 0
        while True:
            lane = self._lane
            if lane is None or lane.broken:
                lane = await self._connect()
            try:
                return await lane.exchange(packed, len(commands))
            except redis.ConnectionError:
                failures += 1
                if failures >= self._attempts:
                    raise
                await asyncio.sleep(backoff().compute(failures))

    async def _connect(self) -> _Lane:
        if self._connecting is None:
            self._connecting = asyncio.Lock()
        async with self._connecting:
            if self._lane is not None and not self._lane.broken:
                return self._lane
            await self._clear()
            pool: Any = self.connection_pool
            connection = await pool.get_connection()
            self._lane = _Lane(connection)
            return self._lane

    async def retire(self) -> None:
        """Let the connection be made anew; exchanges that are under way are left alone."""
        lane = self._lane
        if lane is not None:
            lane.retire()

    async def aclose(self, *arguments: Any, **given: Any) -> None:
        """Close every connection. A later call opens new ones."""
        if self._lane is not None:
            self._lane.fail(redis.ConnectionError("The client was closed"))
        await self._clear()
        await super().aclose(*arguments, **given)

    async def _clear(self) -> None:
        """Give the pool its connection back."""
        lane, self._lane = self._lane, None
        if lane is not None:
            await lane.connection.disconnect(nowait=True)
            await self.connection_pool.release(lane.connection)


class _Lane(asyncio.Protocol):
    """One connection that many calls share.

    Attributes:
        connection: redis-py's, which has opened it.
        broken: It takes no more commands.
    """

    def __init__(self, connection: Any) -> None:
        self.connection = connection
        self.broken = False
        self._retired = False
        self._loop = asyncio.get_running_loop()
        self._timeout: float | None = connection.socket_timeout
        self._timer: asyncio.TimerHandle | None = None
        self._reader = hiredis.Reader(replyError=_refusal, protocolError=redis.exceptions.InvalidResponse,
                                      notEnoughData=_NOTHING)  # fmt: skip
        # Who waits, since when, for how many replies; and those that have come of the first one's.
        self._waiting: deque[tuple[asyncio.Future[list[Any]], float, int]] = deque()
        self._replies: list[Any] = []
        self._unsent: list[bytes] = []
        # redis-py has no public name for this. Its own protocol is told when the connection ends, which it waits for.
        self._transport: asyncio.Transport = connection._writer.transport  # noqa: SLF001
        self._former: Any = self._transport.get_protocol()
        self._transport.set_protocol(self)

    def exchange(self, packed: bytes, count: int) -> asyncio.Future[list[Any]]:
        """Send commands, whose replies the future will hold."""
        now = self._loop.time()
        future: asyncio.Future[list[Any]] = self._loop.create_future()
        if self._waiting:
            # With what else is called in this turn of the loop.
            if not self._unsent:
                self._loop.call_soon(self._send)
            self._unsent.append(packed)
        else:
            self._transport.write(packed)
        self._waiting.append((future, now, count))
        if self._timer is None and self._timeout is not None:
            self._timer = self._loop.call_later(self._timeout, self._look_at_the_clock)
        return future

    def _send(self) -> None:
        unsent, self._unsent = self._unsent, []
        if not self.broken:
            self._transport.write(b"".join(unsent))

    def data_received(self, data: bytes) -> None:
        """Hand out replies."""
        self._reader.feed(data)
        try:
            while (reply := self._reader.gets()) is not _NOTHING:
                self._replies.append(reply)
                if isinstance(reply, redis.exceptions.ReadOnlyError):
                    # The next connection may reach the new master.
                    self.retire()
                future, _, count = self._waiting[0]
                if len(self._replies) == count:
                    self._waiting.popleft()
                    replies, self._replies = self._replies, []
                    if not future.done():
                        future.set_result(replies)
        except (redis.RedisError, IndexError) as error:
            self.fail(redis.ConnectionError(f"Redis sent what nobody asked for ({error})"))
        if self._retired and not self._waiting:
            self.fail(redis.ConnectionError("The connection was given up"))

    def connection_lost(self, exc: Exception | None) -> None:
        """The server, or this process, has closed the connection."""
        self.fail(redis.ConnectionError(f"Connection closed by server. {exc or ''}".strip()))
        self._former.connection_lost(exc)

    def retire(self) -> None:
        """Take no more commands, and close when the last reply has come."""
        self.broken = self._retired = True
        if self._unsent:
            unsent, self._unsent = self._unsent, []
            self._transport.write(b"".join(unsent))
        if not self._waiting:
            self._transport.abort()

    def fail(self, error: redis.RedisError) -> None:
        """Close at once; whoever waits is told the error."""
        self.broken = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        waiting, self._waiting = self._waiting, deque()
        for future, *_ in waiting:
            if not future.done():
                future.set_exception(type(error)(*error.args))
        if not self._loop.is_closed():
            self._transport.abort()

    def _look_at_the_clock(self) -> None:
        assert self._timeout is not None  # noqa: S101 - or there would be no timer
        self._timer = None
        if not self._waiting:
            return
        left = self._waiting[0][1] + self._timeout - self._loop.time()
        if left <= 0:
            self.fail(redis.TimeoutError("Timeout reading from socket"))
        else:
            self._timer = self._loop.call_later(left, self._look_at_the_clock)


_NOTHING = object()


# Those that something depends on here; of the others the text is enough.
_REFUSALS: dict[str, type[redis.ResponseError]] = {
    "ASK": redis.exceptions.AskError,
    "CLUSTERDOWN": redis.exceptions.ClusterDownError,
    "MASTERDOWN": redis.exceptions.MasterDownError,
    "MOVED": redis.exceptions.MovedError,
    "NOPERM": redis.exceptions.NoPermissionError,
    "NOSCRIPT": redis.exceptions.NoScriptError,
    "READONLY": redis.exceptions.ReadOnlyError,
    "TRYAGAIN": redis.exceptions.TryAgainError,
}


def _refusal(text: str) -> redis.ResponseError:
    """Make an error of a refusal, whose first word says what it is; redis-py's classes do without that word."""
    word, _, rest = text.partition(" ")
    kind = _REFUSALS.get(word)
    return redis.ResponseError(text) if kind is None else kind(rest)
