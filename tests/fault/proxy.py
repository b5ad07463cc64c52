"""A TCP proxy that misbehaves on demand, in front of any server on the loopback interface.

    with Proxy(server_port) as proxy:
        client = connect(proxy.port)
        proxy.deaf()

Its thread knows nothing of the protocols that pass through it.
"""

from __future__ import annotations

import contextlib
import errno
import selectors
import socket
import struct
import threading
import time
from collections import deque
from concurrent.futures import Future
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Self

_CHUNK = 64 * 1024
_MOST_BUFFERED = 1024 * 1024  # bytes in one direction; whoever sends more has to wait
_TIMEOUT = 10.0
_HOST = "127.0.0.1"


class _Flow:
    """What travels in one direction of a connection."""

    def __init__(self, source: socket.socket, target: socket.socket) -> None:
        self.source, self.target = source, target
        self.waiting: deque[tuple[float, bytes]] = deque()  # when it may go on, and what; b"" is the end
        self.buffered = 0
        self.ended = False  # the source will send no more

    def due(self, now: float) -> bool:
        """Whether something may go on now."""
        return bool(self.waiting) and self.waiting[0][0] <= now


class _Connection:
    """A client's connection and the one to the server that belongs to it."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client, self.server = client, server
        self.requests = _Flow(client, server)
        self.replies = _Flow(server, client)
        self.connecting = True
        self.armed = False  # a request went by whose reply is to be dropped
        self.orphaned = False  # the client was cut off; what the server still says goes nowhere
        self.tail = b""  # the last bytes of the requests, in which a pattern may begin


class Proxy:
    """Forwards connections to a port of this machine, as well as the current mode lets it.

    A mode holds until the next one; each method returns when it is in force. `cut` is no mode: it happens once.

    Attributes:
        port: Where clients connect. It stays the same, and nobody else can get it, until `close`.
    """

    def __init__(self, target_port: int) -> None:
        self._target = target_port
        # Bound but never listening, it keeps the port ours while nobody listens.
        self._reservation = _bound(0)
        self.port: int = self._reservation.getsockname()[1]
        self._listener: socket.socket | None = None
        self._connections: set[_Connection] = set()
        self._deaf = False
        self._delay = 0.0
        self._drops: float = 0
        self._pattern = b""
        self._dropped = 0
        self._orders: deque[tuple[Callable[[], object], Future[None]]] = deque()
        self._closing = False
        self._selector = selectors.DefaultSelector()
        self._bell, self._ear = socket.socketpair()
        self._bell.setblocking(False)
        self._ear.setblocking(False)
        self._selector.register(self._ear, selectors.EVENT_READ)
        self._listen()
        self._thread = threading.Thread(target=self._run, name=f"proxy-{self.port}", daemon=True)
        self._thread.start()

    # --- modes -------------------------------------------------------------------------------------------------------

    def heal(self) -> None:
        """Forward everything; what was held back goes on."""
        self._order(self._enter)

    def refuse(self) -> None:
        """Refuse new connections (ECONNREFUSED); those that exist go on."""
        self._order(lambda: self._enter(listening=False))

    def cut(self) -> None:
        """Reset every connection now (RST, on both sides); what is on its way is lost."""
        self._order(self._cut)

    def down(self) -> None:
        """Reset every connection and refuse new ones, as if the server had died."""

        def go_down() -> None:
            self._enter(listening=False)
            self._cut()

        self._order(go_down)

    def deaf(self) -> None:
        """Accept connections, but read and forward nothing; existing connections stall."""
        self._order(lambda: self._enter(deaf=True))

    def delay(self, seconds: float) -> None:
        """Hold back everything for so many seconds, each way."""
        self._order(lambda: self._enter(delay=seconds))

    def drop_reply(self, count: int | None = None, matching: bytes = b"") -> None:
        """Let requests reach the server, which executes them, and cut the client off instead of replying.

        Args:
            count: For the next so many requests, then forward everything again; until another mode if None.
            matching: Only requests whose bytes contain this.
        """
        drops = float("inf") if count is None else count
        self._order(lambda: self._enter(drops=drops, pattern=matching))

    def retarget(self, port: int) -> None:
        """Send new connections to another port, as a failover to another server does; reset the existing ones."""

        def move() -> None:
            self._target = port
            self._cut()

        self._order(move)

    # --- looking on --------------------------------------------------------------------------------------------------

    @property
    def connections(self) -> int:
        """How many clients are connected."""
        return sum(not connection.orphaned for connection in list(self._connections))

    @property
    def held(self) -> int:
        """How many bytes were read and have not gone on, both ways."""
        return sum(c.requests.buffered + c.replies.buffered for c in list(self._connections))

    @property
    def dropped(self) -> int:
        """How many replies were dropped so far."""
        return self._dropped

    # --- the end -----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Reset every connection and give the port back."""
        if self._thread.is_alive():
            self._order(lambda: setattr(self, "_closing", True))
            self._thread.join(_TIMEOUT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- the thread --------------------------------------------------------------------------------------------------

    def _order(self, work: Callable[[], object]) -> None:
        """Have the thread do something, and wait until it is done."""
        done: Future[None] = Future()
        self._orders.append((work, done))
        with contextlib.suppress(BlockingIOError):
            self._bell.send(b"!")
        done.result(_TIMEOUT)

    def _run(self) -> None:
        while not self._closing:
            touched: set[_Connection] = set()
            for key, _ in self._selector.select(self._until_due()):
                if isinstance(key.data, _Connection):
                    touched.add(key.data)
                elif key.fileobj is self._listener:
                    touched |= self._accept()
                else:
                    self._ear.recv(_CHUNK)
                    self._obey()
                    touched |= self._connections
            if self._delay:
                touched |= self._connections
            for connection in touched & self._connections:
                if not self._deaf:
                    self._move(connection)
                if connection in self._connections:
                    self._watch(connection)
        self._cut()
        self._stop_listening()
        for item in (self._reservation, self._bell, self._ear, self._selector):
            item.close()

    def _obey(self) -> None:
        while self._orders:
            work, done = self._orders.popleft()
            try:
                work()
                done.set_result(None)
            except Exception as error:
                done.set_exception(error)

    def _until_due(self) -> float | None:
        """Seconds until something that was delayed goes on."""
        if self._deaf or not self._delay:
            return None
        flows = [flow for c in self._connections for flow in (c.requests, c.replies) if flow.waiting]
        return max(0.0, min(flow.waiting[0][0] for flow in flows) - time.monotonic()) if flows else None

    def _move(self, connection: _Connection) -> None:
        """Bring a connection as far as it goes without waiting."""
        try:
            self._finish_connecting(connection)
            if not connection.connecting:
                for flow in (connection.requests, connection.replies):
                    self._read(connection, flow)
                    self._write(flow)
                self._bury(connection)
        except OSError:
            self._reset(connection)

    def _finish_connecting(self, connection: _Connection) -> None:
        if connection.connecting:
            result = connection.server.connect_ex((_HOST, self._target))
            if result in (0, errno.EISCONN):
                connection.connecting = False
            elif result not in (errno.EINPROGRESS, errno.EALREADY):
                raise OSError(result, "the server cannot be reached")

    def _read(self, connection: _Connection, flow: _Flow) -> None:
        while not flow.ended and flow.buffered < _MOST_BUFFERED:
            if flow is connection.requests and connection.orphaned:
                return
            try:
                data = flow.source.recv(_CHUNK)
            except BlockingIOError:
                return
            flow.ended = not data
            if flow is connection.requests:
                self._arm(connection, data)
            elif connection.armed and not connection.orphaned and data:
                self._drop(connection)
            if not (flow is connection.replies and connection.orphaned):
                flow.waiting.append((time.monotonic() + self._delay, data))
                flow.buffered += len(data)

    def _arm(self, connection: _Connection, data: bytes) -> None:
        if self._drops and data and not connection.armed:
            text = connection.tail + data
            if self._pattern in text:
                connection.armed = True
                self._drops -= 1
            connection.tail = text[max(0, len(text) - len(self._pattern) + 1) :] if self._pattern else b""

    def _drop(self, connection: _Connection) -> None:
        """Reset the client alone: a reset of the server's side would take back what it has not read yet."""
        self._dropped += 1
        connection.orphaned = True
        connection.replies.waiting.clear()
        connection.requests.waiting.append((0.0, b""))
        self._forget(connection.client)
        _reset(connection.client)

    def _write(self, flow: _Flow) -> None:
        while flow.due(time.monotonic()):
            due, data = flow.waiting[0]
            if not data:
                with contextlib.suppress(OSError):  # it may have been reset already
                    flow.target.shutdown(socket.SHUT_WR)
                flow.waiting.popleft()
                continue
            try:
                sent = flow.target.send(data)
            except BlockingIOError:
                return
            flow.buffered -= sent
            if sent == len(data):
                flow.waiting.popleft()
            else:
                flow.waiting[0] = (due, data[sent:])

    def _bury(self, connection: _Connection) -> None:
        """Close a connection whose both directions have ended, or whose server has after the client was cut off."""
        requests, replies = connection.requests, connection.replies
        over = replies.ended and not replies.waiting
        if over and (connection.orphaned or (requests.ended and not requests.waiting)):
            self._discard(connection)
            connection.client.close()
            connection.server.close()

    def _watch(self, connection: _Connection) -> None:
        """Tell the selector what a connection waits for."""
        now = time.monotonic()
        for own, other in (
            (connection.requests, connection.replies),
            (connection.replies, connection.requests),
        ):
            # A socket is the source of one flow and the target of the other.
            events = 0
            if own.source is connection.client and connection.orphaned:
                continue
            if self._deaf:
                pass
            elif connection.connecting:
                events = selectors.EVENT_WRITE if own.source is connection.server else 0
            else:
                if not own.ended and own.buffered < _MOST_BUFFERED:
                    events |= selectors.EVENT_READ
                if other.due(now):
                    events |= selectors.EVENT_WRITE
            known = self._selector.get_map().get(own.source)
            if known is None and events:
                self._selector.register(own.source, events, connection)
            elif known is not None and not events:
                self._selector.unregister(own.source)
            elif known is not None and known.events != events:
                self._selector.modify(own.source, events, connection)

    def _forget(self, item: socket.socket) -> None:
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(item)

    def _accept(self) -> set[_Connection]:
        assert self._listener is not None
        try:
            client, _ = self._listener.accept()
        except OSError:  # it is gone already
            return set()
        server = socket.socket()
        for item in (client, server):
            item.setblocking(False)
            item.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = _Connection(client, server)
        self._connections.add(connection)
        return {connection}

    # --- what orders do, in the thread -------------------------------------------------------------------------------

    def _enter(
        self,
        *,
        listening: bool = True,
        deaf: bool = False,
        delay: float = 0.0,
        drops: float = 0,
        pattern: bytes = b"",
    ) -> None:
        """Enter a mode; without arguments, the one that forwards everything."""
        self._deaf, self._delay, self._drops, self._pattern = deaf, delay, drops, pattern
        for connection in self._connections:
            connection.armed, connection.tail = False, b""
            for flow in (connection.requests, connection.replies):
                flow.waiting = deque((0.0, data) for _, data in flow.waiting)
        if listening:
            self._listen()
        else:
            self._stop_listening()

    def _listen(self) -> None:
        if self._listener is None:
            self._listener = _bound(self.port)
            self._listener.setblocking(False)
            self._listener.listen(256)
            self._selector.register(self._listener, selectors.EVENT_READ)

    def _stop_listening(self) -> None:
        if self._listener is not None:
            self._forget(self._listener)
            self._listener.close()
            self._listener = None

    def _cut(self) -> None:
        for connection in list(self._connections):
            self._reset(connection)

    def _reset(self, connection: _Connection) -> None:
        self._discard(connection)
        _reset(connection.client)
        _reset(connection.server)

    def _discard(self, connection: _Connection) -> None:
        self._connections.discard(connection)
        self._forget(connection.client)
        self._forget(connection.server)


def _bound(port: int) -> socket.socket:
    """Make a socket that shares its port with others of ours, and only with those."""
    item = socket.socket()
    item.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    item.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    item.bind((_HOST, port))
    return item


def _reset(item: socket.socket) -> None:
    """Close a socket with RST instead of FIN."""
    with contextlib.suppress(OSError):
        item.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    item.close()
