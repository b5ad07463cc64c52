"""Calls of the hot tier: what is sent to Redis, apart from how it is sent."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import redis

from langgraph_tiered_saver.codec import EncodedCheckpoint
from langgraph_tiered_saver.config import TieredConfig
from langgraph_tiered_saver.errors import (
    ConfigurationError,
    HotTierRejectedError,
    HotTierUnavailableError,
    InvalidInputError,
    TieredSaverError,
)
from langgraph_tiered_saver.hot import scripts
from langgraph_tiered_saver.hot.clients import AsyncRedis, SyncRedis
from langgraph_tiered_saver.hot.keys import Keyspace, meta_key, seen_bit, sweep_key
from langgraph_tiered_saver.records import frame
from langgraph_tiered_saver.redaction import redact

logger = logging.getLogger(__name__)

OLDEST_REDIS = (6, 2)
# Redis closes the connection on a longer argument (`proto-max-bulk-len`), which would look like an outage.
LARGEST_RECORD = 512 * 1024 * 1024 - 1
_LEASE_TTL_MS = 60_000

# Refusals that pass by themselves or by an operator's hand: starting up, a failover, memory, the disk, rights lost.
_PASSING = ("LOADING", "READONLY", "OOM", "MISCONF", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN", "NOREPLICAS", "BUSY",
            "NOAUTH", "WRONGPASS")  # fmt: skip


# Where redis-py has a class for a refusal, it cuts the word off.
_PASSING_ERRORS = (
    redis.exceptions.ReadOnlyError,
    redis.exceptions.OutOfMemoryError,
    redis.exceptions.TryAgainError,
    redis.exceptions.ClusterDownError,
    redis.exceptions.MasterDownError,
)
# What a call of redis-py may raise; UnicodeError for a host name that cannot be encoded.
REDIS_ERRORS = (redis.RedisError, OSError, UnicodeError)


@dataclass(frozen=True)
class HotCall:
    """One script call: the script, its keys and its arguments."""

    script: scripts.Script
    keys: Sequence[bytes]
    arguments: Sequence[bytes | str | int]


@dataclass(frozen=True)
class Appended:
    """What an appending script replies.

    Attributes:
        sequence: The record's sequence number.
        previous: The previous record's in the same journal; 0 if the journal was empty.
    """

    sequence: int
    previous: int


class HotCalls:
    """Builds the calls for one keyspace."""

    def __init__(self, keyspace: Keyspace, config: TieredConfig, *, evicts: bool = False) -> None:
        self.keyspace = keyspace
        self._ttl = "0" if config.hot_ttl is None else str(int(config.hot_ttl * 1000))
        self._namespaces_ttl = "0" if evicts else self._ttl

    def put(self, encoded: EncodedCheckpoint, payload: bytes) -> HotCall:
        """Acknowledge a checkpoint; the reply is empty when it must carry every channel."""
        position = encoded.position
        keys = self.keyspace.thread(position.thread_id)
        unchanged = [part.encode() for pair in encoded.unchanged for part in pair]
        return HotCall(
            scripts.PUT,
            (keys.hot(position.checkpoint_ns), keys.journal, keys.shard, keys.dirty, keys.namespaces, keys.seen),
            (
                position.thread_id.encode(),
                check_size(payload),
                frame(unchanged),
                frame(channel.encode() for channel in encoded.removed),
                encoded.blob_count,
                self._ttl,
                self._namespaces_ttl,
                int(encoded.has_delta_channels),
                int(encoded.is_old_format),
                seen_bit(position.thread_id, position.checkpoint_ns),
            ),
        )

    def put_writes(self, thread_id: str, checkpoint_ns: str, payload: bytes) -> HotCall:
        """Acknowledge one call's writes."""
        keys = self.keyspace.thread(thread_id)
        return HotCall(
            scripts.PUT_WRITES,
            (keys.hot(checkpoint_ns), keys.journal, keys.shard, keys.dirty, keys.namespaces),
            (thread_id.encode(), check_size(payload), self._ttl, self._namespaces_ttl),
        )

    def get(self, thread_id: str, checkpoint_ns: str, checkpoint_id: str) -> HotCall:
        """Read a checkpoint by id, if it is the hot one, and the journal's length."""
        keys = self.keyspace.thread(thread_id)
        return HotCall(scripts.GET, (keys.hot(checkpoint_ns), keys.journal), (checkpoint_id,))

    def lease(self, thread_id: str, checkpoint_ns: str, token: str) -> HotCall:
        """Begin to warm a namespace; the reply is the journal's length."""
        keys = self.keyspace.thread(thread_id)
        return HotCall(
            scripts.LEASE,
            (keys.hot(checkpoint_ns), keys.journal, keys.namespaces),
            (token, checkpoint_ns.encode(), _LEASE_TTL_MS),
        )

    def warm(
        self,
        thread_id: str,
        checkpoint_ns: str,
        token: str,
        checkpoint: bytes,
        blob_count: int,
        later_writes: str,
        writes: Iterable[bytes],
    ) -> HotCall:
        """Make a checkpoint hot that was read from the cold tier, if the lease still stands."""
        keys, bit = self.keyspace.thread(thread_id), seen_bit(thread_id, checkpoint_ns)
        return HotCall(
            scripts.WARM,
            (keys.hot(checkpoint_ns), keys.namespaces, keys.seen),
            (token, checkpoint, blob_count, self._ttl, self._namespaces_ttl, later_writes.encode(), bit, *writes),
        )

    def maintain(self, thread_id: str, payload: bytes, *, supersedes: bool) -> HotCall:
        """Journal an operation that removes or copies rows, and drop the thread's hot state."""
        keys = self.keyspace.thread(thread_id)
        return HotCall(
            scripts.MAINTAIN,
            (keys.journal, keys.shard, keys.dirty, keys.namespaces),
            (thread_id.encode(), check_size(payload), keys.hot_stem, "1" if supersedes else "0"),
        )

    def journal(self, thread_id: str, most_records: int, most_bytes: int) -> HotCall:
        """Read a journal from its start."""
        return HotCall(scripts.JOURNAL, (self.keyspace.thread(thread_id).journal,), (most_records, most_bytes))

    def ack(self, thread_id: str, up_to: int) -> HotCall:
        """Trim a journal up to and including a sequence number."""
        keys = self.keyspace.thread(thread_id)
        return HotCall(scripts.ACK, (keys.journal, keys.shard, keys.dirty), (thread_id.encode(), up_to + 1))

    def sweep(self, shard: int, grace: float, most_threads: int) -> HotCall:
        """Pick a shard's orphans; `grace` in seconds."""
        return HotCall(scripts.SWEEP, (self.keyspace.dirty(shard),), (int(grace * 1e6), most_threads))


def appended(reply: Any) -> Appended | None:
    """Read the reply of an appending script; None if `put` must carry every channel."""
    return Appended(int(reply[0]), int(reply[1])) if reply else None


def check_size(payload: bytes) -> bytes:
    """Refuse a record that Redis would hang up on.

    Raises:
        InvalidInputError: the record is longer than 512 MiB.
    """
    if len(payload) > LARGEST_RECORD:
        raise InvalidInputError(
            f"The record is {len(payload) / 2**20:.0f} MiB, but Redis takes at most 512 MiB at once; nothing was "
            "written. Keep such values in a file or an object store and their address in the state."
        )
    return payload


def translate(error: Exception) -> TieredSaverError:
    """Turn a redis-py error into ours."""
    text = redact(str(error)) or type(error).__name__
    if isinstance(error, UnicodeError):
        return ConfigurationError("The host name in the Redis URL is not one; correct it.")
    authentication = isinstance(error, redis.AuthenticationError)
    # Inside a script, the refusal stands somewhere in the text instead of in front.
    if isinstance(error, redis.ResponseError) and not (
        authentication or isinstance(error, _PASSING_ERRORS) or any(word in text for word in _PASSING)
    ):
        return HotTierRejectedError(f"Redis refused a command: {text}. Nothing was acknowledged.")
    if authentication:
        hint = "Check the user name and password in the Redis URL."
    elif isinstance(error, redis.TimeoutError):
        hint = "Check that the server is not overloaded, or raise redis_timeout."
    else:
        hint = "Check the Redis URL and that the server runs; the call can be repeated."
    return HotTierUnavailableError(
        f"Redis did not take the command ({type(error).__name__}: {text}). It was not acknowledged. {hint}"
    )


def run(client: SyncRedis, call: HotCall) -> Any:
    """Call a script on a synchronous client, in one round trip.

    Raises:
        HotTierUnavailableError: Redis cannot be reached or is not ready.
        HotTierRejectedError: Redis refused.
    """
    try:
        try:
            return client.execute_command("EVALSHA", call.script.digest, len(call.keys), *call.keys, *call.arguments)
        except redis.exceptions.NoScriptError:
            return client.execute_command("EVAL", call.script.text, len(call.keys), *call.keys, *call.arguments)
    except REDIS_ERRORS as error:
        raise translate(error) from error


async def arun(client: AsyncRedis, call: HotCall) -> Any:
    """Do what `run` does, on an asynchronous client."""
    try:
        try:
            return await client.execute_command(
                "EVALSHA", call.script.digest, len(call.keys), *call.keys, *call.arguments
            )
        except redis.exceptions.NoScriptError:
            return await client.execute_command("EVAL", call.script.text, len(call.keys), *call.keys, *call.arguments)
    except REDIS_ERRORS as error:
        raise translate(error) from error


def run_many(client: SyncRedis, calls: Sequence[HotCall]) -> list[Any]:
    """Call scripts in one round trip (one by one on a Cluster, whose pipelines take no scripts).

    Raises:
        HotTierUnavailableError, HotTierRejectedError: the first call that failed.
    """
    if len(calls) == 1 or isinstance(client, redis.RedisCluster):
        return [run(client, call) for call in calls]
    try:
        pipeline = client.pipeline(transaction=False)
        for call in calls:
            pipeline.execute_command("EVALSHA", call.script.digest, len(call.keys), *call.keys, *call.arguments)
        replies = cast("list[Any]", pipeline.execute(raise_on_error=False))
    except REDIS_ERRORS as error:
        raise translate(error) from error
    for index, reply in enumerate(replies):
        if isinstance(reply, redis.exceptions.NoScriptError):
            replies[index] = run(client, calls[index])
        elif isinstance(reply, Exception):
            raise translate(reply) from reply
    return replies


def read_hash(client: SyncRedis, key: bytes) -> dict[bytes, bytes]:
    """Read a whole hash, in one round trip."""
    try:
        return cast("dict[bytes, bytes]", client.hgetall(key))
    except REDIS_ERRORS as error:
        raise translate(error) from error


async def aread_hash(client: AsyncRedis, key: bytes) -> dict[bytes, bytes]:
    """Do what `read_hash` does, on an asynchronous client."""
    try:
        return cast("dict[bytes, bytes]", await client.hgetall(key))
    except REDIS_ERRORS as error:
        raise translate(error) from error


def acquire_sweep(client: SyncRedis, config: TieredConfig) -> bool:
    """Try to become the one process that looks for orphans during this interval; one command."""
    try:
        key = sweep_key(config.key_prefix)
        return bool(client.set(key, b"1", nx=True, px=max(1, int(config.sweep_interval * 1000))))
    except REDIS_ERRORS as error:
        raise translate(error) from error


def dirty_threads(client: SyncRedis, keyspace: Keyspace) -> list[str]:
    """List every thread that has unflushed records, in one round trip."""
    try:
        pipeline = client.pipeline(transaction=False)
        for shard in range(keyspace.shards):
            pipeline.zrange(keyspace.dirty(shard), 0, -1)
        return [name.decode() for names in pipeline.execute() for name in names]
    except REDIS_ERRORS as error:
        raise translate(error) from error


def check_server(client: SyncRedis, config: TieredConfig) -> bool:
    """Check that the server can be used.

    Returns:
        Whether it may evict keys that have a TTL.

    Raises:
        ConfigurationError: Redis is too old, or may evict the journal.
        HotTierUnavailableError: it cannot be asked.
    """
    try:
        servers, memories = client.info("server"), client.info("memory")
    except REDIS_ERRORS as error:
        raise translate(error) from error
    cluster = isinstance(client, redis.RedisCluster)
    for server in servers.values() if cluster else [servers]:
        version = str(server.get("redis_version", "0"))
        numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
        if numbers < OLDEST_REDIS:
            raise ConfigurationError(
                f"Redis {version} is too old: {'.'.join(map(str, OLDEST_REDIS))} or later, or any Valkey, is needed."
            )
    evicts = False
    for server in memories.values() if cluster else [memories]:
        policy = str(server.get("maxmemory_policy", ""))
        evicts = evicts or policy != "noeviction"
        if policy.startswith("allkeys") and not config.allow_eviction:
            raise ConfigurationError(
                f"Redis is set to maxmemory-policy {policy}, which may evict records that PostgreSQL does not have "
                "yet. Set it to noeviction or a volatile-* policy (only hot state has a TTL), or pass "
                "allow_eviction=True if losing records is acceptable."
            )
    return evicts


def read_meta(client: SyncRedis, prefix: str) -> dict[str, str]:
    """Read what the installation was set up with; empty if it was not."""
    try:
        found = cast("dict[bytes, bytes]", client.hgetall(meta_key(prefix)))
    except REDIS_ERRORS as error:
        raise translate(error) from error
    return {name.decode(): value.decode() for name, value in found.items()}


def write_meta(client: SyncRedis, keyspace: Keyspace, values: Mapping[str, str], clock_floor: int) -> dict[str, str]:
    """Record what the installation is set up with, the first time; later calls change nothing.

    Args:
        client: Client of the server.
        keyspace: The installation's keys.
        values: What to record.
        clock_floor: No sequence number will be less than this one.

    Returns:
        What is recorded now, which another process may have written first.
    """
    try:
        key = meta_key(keyspace.prefix)
        for shard in range(keyspace.shards):
            run(client, HotCall(scripts.CLOCK, (keyspace.shard(shard),), (clock_floor,)))
        for name, value in values.items():
            client.hsetnx(key, name, value)
    except REDIS_ERRORS as error:
        raise translate(error) from error
    return read_meta(client, keyspace.prefix)
