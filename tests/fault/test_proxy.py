"""The proxy does what its modes say, in front of an echo server and in front of a real Valkey."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.fault.proxy import Proxy
from tests.support import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture
def echo() -> Iterator[int]:
    """The port of a server that sends back what it gets, and ends when its client has."""

    def serve(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while data := connection.recv(65536):
                connection.sendall(data)

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(10)


@pytest.fixture
def proxy(echo: int) -> Iterator[Proxy]:
    """A proxy in front of the echo server."""
    with Proxy(echo) as proxy:
        yield proxy


@pytest.fixture
def connect(proxy: Proxy) -> Iterator[Callable[[], socket.socket]]:
    """A function that connects to the proxy; all connections are closed after the test."""
    opened: list[socket.socket] = []

    def connect() -> socket.socket:
        opened.append(socket.create_connection(("127.0.0.1", proxy.port), timeout=5))
        return opened[-1]

    yield connect
    for connection in opened:
        connection.close()


def receive(connection: socket.socket, count: int) -> bytes:
    """Receive so many bytes, or those before the end."""
    data = b""
    while len(data) < count and (more := connection.recv(count - len(data))):
        data += more
    return data


def ask(connection: socket.socket, text: bytes) -> bytes:
    """Send a text and receive as many bytes."""
    connection.sendall(text)
    return receive(connection, len(text))


def test_it_forwards_much_in_both_directions_and_the_end(proxy: Proxy, connect: Callable[[], socket.socket]) -> None:
    """Nothing is lost or reordered, however slowly it is read, and a half-closed connection goes on."""
    connection, data = connect(), b"".join(b"%07d\n" % number for number in range(1_000_000))

    def send() -> None:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)

    sender = threading.Thread(target=send)
    sender.start()

    assert receive(connection, len(data)) == data
    assert connection.recv(1) == b""
    sender.join(10)
    wait_until(lambda: proxy.connections == 0)


def test_it_refuses_and_keeps_its_port(proxy: Proxy, connect: Callable[[], socket.socket]) -> None:
    """Refused means ECONNREFUSED for new connections only, and the port is still there afterwards."""
    old = connect()
    proxy.refuse()

    with pytest.raises(ConnectionRefusedError):
        connect()
    assert ask(old, b"still") == b"still"

    proxy.down()
    with pytest.raises(ConnectionRefusedError):
        connect()
    with pytest.raises(ConnectionResetError):
        old.recv(1)

    proxy.heal()
    assert ask(connect(), b"again") == b"again"


def test_it_cuts_once(proxy: Proxy, connect: Callable[[], socket.socket]) -> None:
    """Every connection of that moment is reset; later ones are not."""
    connections = [connect(), connect()]
    assert [ask(connection, b"x") for connection in connections] == [b"x", b"x"]

    proxy.cut()

    for connection in connections:
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
    assert ask(connect(), b"later") == b"later"


def test_it_goes_deaf_and_forgets_nothing(proxy: Proxy, connect: Callable[[], socket.socket]) -> None:
    """While deaf, old and new connections stall without an error; healed, they get what was sent meanwhile."""
    old = connect()
    assert ask(old, b"before") == b"before"
    proxy.deaf()
    new = connect()
    for connection in (old, new):
        connection.sendall(b"during")
        connection.settimeout(0.1)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        connection.settimeout(5)

    proxy.heal()

    assert [receive(connection, 6) for connection in (old, new)] == [b"during", b"during"]


def test_it_delays_each_way(proxy: Proxy, connect: Callable[[], socket.socket]) -> None:
    """A round trip takes twice the delay; healed, what was held back goes on at once and in order."""
    connection = connect()
    proxy.delay(0.1)
    began = time.monotonic()
    assert ask(connection, b"slow") == b"slow"
    assert time.monotonic() - began >= 0.2

    proxy.delay(60)
    connection.sendall(b"first ")
    wait_until(lambda: proxy.held == len(b"first "))
    proxy.heal()

    assert ask(connection, b"second") + receive(connection, 6) == b"first second"


def test_a_server_that_is_away(echo: int) -> None:
    """A connection whose server refuses is closed; one made after the server moved reaches the new place."""
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    with Proxy(port) as proxy:
        # The reset may come before or after the connection counts as made.
        with (
            pytest.raises(ConnectionResetError),
            socket.create_connection(("127.0.0.1", proxy.port), timeout=5) as connection,
        ):
            connection.recv(1)

        proxy.retarget(echo)

        with socket.create_connection(("127.0.0.1", proxy.port), timeout=5) as connection:
            assert ask(connection, b"moved") == b"moved"


def test_a_command_is_executed_though_its_reply_is_lost(redis_url: str, key_prefix: str) -> None:
    """With a reply dropped, Valkey has executed the command exactly once and the client got a broken connection."""
    parts = urlsplit(redis_url)
    assert parts.port is not None
    with Proxy(parts.port) as proxy:
        through = urlunsplit(parts._replace(netloc=f":{parts.password}@127.0.0.1:{proxy.port}"))
        never = Retry(NoBackoff(), 0)
        with redis.Redis.from_url(redis_url) as direct, redis.Redis.from_url(through, retry=never) as client:
            key = f"{key_prefix}:count"
            assert client.incr(key) == 1

            proxy.drop_reply(1)
            with pytest.raises(redis.ConnectionError):
                client.incr(key)
            assert client.incr(key) == 3

            proxy.drop_reply(matching=b"INCR")
            assert client.get(key) == b"3"
            for _ in range(2):
                with pytest.raises(redis.ConnectionError):
                    client.incr(key)
            proxy.heal()

            assert (client.incr(key), proxy.dropped) == (6, 3)
            direct.delete(key)
