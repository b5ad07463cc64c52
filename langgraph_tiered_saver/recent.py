"""The values that were stored last, in memory: what tells what a step added to a conversation."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import NamedTuple

# What the bookkeeping of an entry takes beside its bytes, about.
_OVERHEAD = 512


class ChannelKey(NamedTuple):
    """Names a channel of a thread's namespace."""

    thread_id: str
    checkpoint_ns: str
    channel: str


class StoredValue(NamedTuple):
    """A version of a channel as the serializer made it.

    Attributes:
        version: The version.
        type: The serializer's name of the format.
        data: The bytes.
    """

    version: str
    type: str
    data: bytes


class RecentValues:
    """The last value of each channel, those used last first, bounded in bytes; every method from any thread."""

    def __init__(self, most_bytes: int) -> None:
        """Keep at most so many bytes; 0 keeps nothing."""
        self._most_bytes = most_bytes
        self._bytes = 0
        self._lock = threading.Lock()
        self._values: OrderedDict[ChannelKey, StoredValue] = OrderedDict()
        self._of_thread: dict[str, set[ChannelKey]] = {}

    @property
    def bytes(self) -> int:
        """What it holds now."""
        return self._bytes

    def get(self, key: ChannelKey) -> StoredValue | None:
        """Give a channel's last value."""
        with self._lock:
            value = self._values.get(key)
            if value is not None:
                self._values.move_to_end(key)
            return value

    def put(self, key: ChannelKey, value: StoredValue) -> None:
        """Keep a channel's new value instead of its last one."""
        size = len(value.data) + _OVERHEAD
        with self._lock:
            self._drop(key)
            if size > self._most_bytes:
                return
            self._values[key] = value
            self._of_thread.setdefault(key.thread_id, set()).add(key)
            self._bytes += size
            while self._bytes > self._most_bytes:
                self._drop(next(iter(self._values)))

    def drop(self, key: ChannelKey) -> None:
        """Forget a channel's value."""
        with self._lock:
            self._drop(key)

    def drop_thread(self, thread_id: str) -> None:
        """Forget the values of a thread."""
        with self._lock:
            for key in tuple(self._of_thread.get(thread_id, ())):
                self._drop(key)

    def _drop(self, key: ChannelKey) -> None:
        value = self._values.pop(key, None)
        if value is not None:
            self._bytes -= len(value.data) + _OVERHEAD
            keys = self._of_thread[key.thread_id]
            keys.discard(key)
            if not keys:
                del self._of_thread[key.thread_id]
