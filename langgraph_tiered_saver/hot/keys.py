"""Names of the Redis keys.

Every key of a thread carries the same hash tag, `{prefix:shard}`, so that one script may touch a thread's keys
and its shard's keys on a Cluster. The tag comes first and the prefix cannot contain braces, so braces in a
thread id never become a tag.
"""

from __future__ import annotations

import functools
import zlib
from dataclasses import dataclass

# 16 KiB for each shard.
_SEEN_BITS = 1 << 17


@dataclass(frozen=True)
class ThreadKeys:
    """The keys of one thread and of its shard."""

    journal: bytes
    shard: bytes
    dirty: bytes
    namespaces: bytes
    seen: bytes
    probe: bytes
    hot_stem: bytes

    def hot(self, checkpoint_ns: str) -> bytes:
        """Name the hash that holds the latest checkpoint of a namespace."""
        return self.hot_stem + checkpoint_ns.encode()


@functools.lru_cache(maxsize=2048)
def seen_bit(thread_id: str, checkpoint_ns: str) -> int:
    """Give the bit of a thread and namespace among those that a shard has seen.

    Two may share one: whoever finds it set knows nothing, whoever finds it clear knows that this one is new.
    """
    return zlib.crc32(f"{len(thread_id)}:{thread_id}{checkpoint_ns}".encode()) % _SEEN_BITS


@dataclass(frozen=True)
class Keyspace:
    """Names all keys of one installation.

    Attributes:
        prefix: `TieredConfig.key_prefix`.
        shards: How many hash tags there are, as recorded at the first setup.
    """

    prefix: str
    shards: int

    def shard_of(self, thread_id: str) -> int:
        """Give the shard of a thread; the same in every process and version."""
        return zlib.crc32(thread_id.encode()) % self.shards

    def tag(self, shard: int) -> bytes:
        """Give the hash tag of a shard."""
        return b"{%b:%d}" % (self.prefix.encode(), shard)

    def dirty(self, shard: int) -> bytes:
        """Name the sorted set of a shard's threads that have unflushed records."""
        return self.tag(shard) + b":dirty"

    def shard(self, shard: int) -> bytes:
        """Name the hash that holds a shard's generation, its clock and what is known of each journal."""
        return self.tag(shard) + b":shard"

    def seen(self, shard: int) -> bytes:
        """Name the bits of the threads and namespaces that a shard has seen."""
        return self.tag(shard) + b":seen"

    def probe(self, shard: int) -> bytes:
        """Name the key that tells whether a shard takes writes."""
        return self.tag(shard) + b":probe"

    def thread(self, thread_id: str) -> ThreadKeys:
        """Name the keys of a thread."""
        return _thread_keys(self, thread_id)

    def _name(self, thread_id: str) -> ThreadKeys:
        shard = self.shard_of(thread_id)
        tag = self.tag(shard)
        name = thread_id.encode()
        return ThreadKeys(
            tag + b":journal:" + name,
            tag + b":shard",
            tag + b":dirty",
            tag + b":namespaces:" + name,
            tag + b":seen",
            tag + b":probe",
            # The length keeps "a:b" + "c" apart from "a" + "b:c".
            b"%b:hot:%d:%b:" % (tag, len(name), name),
        )


# A run asks for the same thread's again and again.
@functools.lru_cache(maxsize=2048)
def _thread_keys(keyspace: Keyspace, thread_id: str) -> ThreadKeys:
    return keyspace._name(thread_id)  # noqa: SLF001 - of the class above


def meta_key(prefix: str) -> bytes:
    """Name the hash that records what the installation was set up with."""
    return b"{%b}:meta" % prefix.encode()


def sweep_key(prefix: str) -> bytes:
    """Name the lease that lets one process at a time look for orphans."""
    return b"{%b}:sweep" % prefix.encode()
