"""The guard on every new connection: it is told whose server answers before any command of ours is sent."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import redis

ConnectFunction = Callable[[Any], Any]  # redis-py's `redis_connect_func`


class ConnectionGuard(Protocol):
    """Decides whether a new connection may be used. Called from any thread and any event loop; must not block."""

    def connected(self, run_id: str) -> None:
        """Look at the server that a new connection reached.

        Args:
            run_id: The server's run id, another one after each of its starts; "" if it does not tell.

        Raises:
            redis.RedisError: the connection is discarded, and the error comes out of the command that needed it.
                Not a `redis.ConnectionError`, which redis-py would take for a reason to try again.
        """


def connect_function(guard: ConnectionGuard | None, given: ConnectFunction | None = None) -> ConnectFunction | None:
    """Make what a synchronous connection calls once its socket is open.

    Args:
        guard: Is told the run id, after redis-py's handshake. None: nobody is.
        given: What the user's own client calls instead of redis-py's handshake.
    """
    if guard is None:
        return given

    def connect(connection: Any) -> None:
        try:
            if given is None:
                connection.on_connect()
            else:
                given(connection)
            connection.send_command("INFO", "server", check_health=False)
            try:
                reply = connection.read_response()
            except redis.ResponseError as error:
                reply = _refused(error)
            guard.connected(_run_id(reply))
        except BaseException:
            # redis-py cleans up after its own errors only; half a handshake must not pass for a connection.
            connection.disconnect()
            raise

    return connect


def async_connect_function(
    guard: ConnectionGuard | None, given: ConnectFunction | None = None
) -> Callable[[Any], Awaitable[None]] | None:
    """Do what `connect_function` does, for an asynchronous connection."""
    if guard is None and given is None:
        return None

    async def connect(connection: Any) -> None:
        try:
            if given is None:
                await connection.on_connect()
            elif inspect.isawaitable(pending := given(connection)):
                await pending
            if guard is not None:
                await connection.send_command("INFO", "server", check_health=False)
                try:
                    reply = await connection.read_response()
                except redis.ResponseError as error:
                    reply = _refused(error)
                guard.connected(_run_id(reply))
        except BaseException:
            await connection.disconnect(nowait=True)
            raise

    return connect


def _refused(error: redis.ResponseError) -> bytes:
    """Tell a server that never answers this question from one that cannot at the moment."""
    if isinstance(error, redis.exceptions.NoPermissionError) or "unknown command" in str(error).lower():
        return b""
    raise error


def _run_id(reply: Any) -> str:
    text = reply.decode(errors="replace") if isinstance(reply, bytes) else str(reply)
    return next((line[7:].strip() for line in text.splitlines() if line.startswith("run_id:")), "")
