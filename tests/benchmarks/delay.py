"""A network between an agent and its servers: a proxy that adds to every round trip, in a process of its own.

    python -m tests.benchmarks.delay TARGET SECONDS

TARGET is `host:port` or the path of a Unix socket. The port where it listens is the only line it prints; it ends when
its standard input does. It is no part of the measuring process, whose interpreter lock it would share.
"""

from __future__ import annotations

import contextlib
import select
import socket
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit, urlunsplit

if TYPE_CHECKING:
    from tests.benchmarks.stage import Urls

_CHUNK = 256 * 1024
_PROBES = 200
_CORRECTIONS = 3


@dataclass
class _Flow:
    """One direction of a connection: what was read, and when it may go on."""

    source: socket.socket
    target: socket.socket
    delay: float
    waiting: deque[tuple[float, bytes]] = field(default_factory=deque)


class Relay:
    """Forwards connections; replies go on a while after they were read, so that a round trip takes that much longer."""

    def __init__(self, target: str, seconds: float) -> None:
        self._target, self._seconds = target, seconds
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port: int = self._listener.getsockname()[1]
        self._flows: dict[socket.socket, _Flow] = {}

    def run(self) -> None:
        """Forward until standard input ends."""
        standard_input = sys.stdin.fileno()
        while True:
            now = time.monotonic()
            due = [flow.waiting[0][0] for flow in self._flows.values() if flow.waiting]
            blocked = [flow.target for flow in self._flows.values() if flow.waiting and flow.waiting[0][0] <= now]
            # select, not epoll: its time-out is in microseconds.
            timeout = max(0.0, min(due) - now) if due and not blocked else None
            sources = [standard_input, self._listener, *self._flows]
            readable, _, _ = select.select(sources, blocked, [], timeout)
            for item in readable:
                if item == standard_input:
                    return
                if item is self._listener:
                    self._accept()
                elif item in self._flows:
                    self._read(self._flows[item])
            for flow in list(self._flows.values()):
                self._write(flow)

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        if self._target.startswith("/"):
            server = socket.socket(socket.AF_UNIX)
            server.connect(self._target)
        else:
            host, _, port = self._target.rpartition(":")
            server = socket.create_connection((host, int(port)))
            server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for item in (client, server):
            item.setblocking(False)
        self._flows[client] = _Flow(client, server, 0.0)
        self._flows[server] = _Flow(server, client, self._seconds)

    def _read(self, flow: _Flow) -> None:
        try:
            data = flow.source.recv(_CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            flow.waiting.append((time.monotonic() + flow.delay, data))
            self._write(flow)
        else:
            self._close(flow)

    def _write(self, flow: _Flow) -> None:
        while flow.waiting and flow.waiting[0][0] <= time.monotonic():
            due, data = flow.waiting.popleft()
            try:
                sent = flow.target.send(data)
            except BlockingIOError:
                sent = 0
            except OSError:
                self._close(flow)
                return
            if sent < len(data):
                flow.waiting.appendleft((due, data[sent:]))
                return

    def _close(self, flow: _Flow) -> None:
        for item in (flow.source, flow.target):
            self._flows.pop(item, None)
            item.close()


class _Process:
    """A relay in a process of its own."""

    def __init__(self, target: str, seconds: float) -> None:
        command = [sys.executable, "-m", "tests.benchmarks.delay", target, str(seconds)]
        pipe, root = subprocess.PIPE, Path(__file__).parents[2]
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=root)
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())

    def close(self) -> None:
        """End it."""
        self._process.communicate(timeout=10)


class Network:
    """Puts a relay in front of each server. What the relays themselves cost is part of what they add."""

    def __init__(self, urls: Urls, redis: float, postgres: float) -> None:
        """Say how many seconds are added to a round trip to each server."""
        self._urls, self._wanted = urls, (redis, postgres)
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Urls:
        seconds = self._wanted
        for _ in range(_CORRECTIONS):
            with contextlib.ExitStack() as stack:
                added = added_latency(self._urls, self._open(stack, seconds))
            too_much = added.redis - self._wanted[0], added.postgres - self._wanted[1]
            seconds = max(0.0, seconds[0] - too_much[0]), max(0.0, seconds[1] - too_much[1])
        return self._open(self._stack, seconds)

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _open(self, stack: contextlib.ExitStack, seconds: tuple[float, float]) -> Urls:
        redis, postgres = urlsplit(self._urls.redis), urlsplit(self._urls.postgres)
        folder = parse_qs(postgres.query)["host"][0]
        relays = []
        for target, delay in zip((f"127.0.0.1:{redis.port}", f"{folder}/.s.PGSQL.5432"), seconds, strict=True):
            relays.append(_Process(target, delay))
            stack.callback(relays[-1].close)
        # Neither TLS nor GSSAPI is asked for: a round trip each, when connecting.
        options = "sslmode=disable&gssencmode=disable"
        return type(self._urls)(
            urlunsplit(redis._replace(netloc=f":{redis.password}@127.0.0.1:{relays[0].port}")),
            urlunsplit(postgres._replace(netloc=f"postgres@127.0.0.1:{relays[1].port}", query=options)),
        )


@dataclass(frozen=True)
class Added:
    """Seconds that were added to a round trip."""

    redis: float
    postgres: float


def added_latency(direct: Urls, delayed: Urls) -> Added:
    """Measure how much longer a round trip takes, by its median."""
    near, far = _round_trips(direct), _round_trips(delayed)
    return Added(far[0] - near[0], far[1] - near[1])


def _round_trips(urls: Urls) -> tuple[float, float]:
    import psycopg
    import redis

    with redis.Redis.from_url(urls.redis, protocol=2) as client:
        to_redis = _median(client.ping)
    with psycopg.connect(urls.postgres, autocommit=True, prepare_threshold=0) as connection:
        to_postgres = _median(lambda: connection.execute("SELECT 1"))
    return to_redis, to_postgres


def _median(call: Callable[[], Any]) -> float:
    took = []
    for _ in range(_PROBES):
        started = time.perf_counter()
        call()
        took.append(time.perf_counter() - started)
    return statistics.median(took)


def main() -> None:
    """Run a relay."""
    relay = Relay(sys.argv[1], float(sys.argv[2]))
    print(relay.port, flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        relay.run()


if __name__ == "__main__":
    main()
