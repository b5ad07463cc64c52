"""Calls of the hot tier: what is sent to Redis, apart from how it is sent."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import redis

from langgraph_tiered_saver.codec import EncodedCheckpoint
from langgraph_tiered_saver.config import TieredConfig
from langgraph_tiered_saver.errors import (
    ConfigurationError,
    HotTierRejectedError,
    HotTierUnavailableError,
    InvalidInputError,
    TieredSaverError,
    stale_writer,
)
from langgraph_tiered_saver.history import HistoryWarming
from langgraph_tiered_saver.hot import clients, scripts
from langgraph_tiered_saver.hot.clients import AsyncRedis, SyncRedis
from langgraph_tiered_saver.hot.cluster import is_cluster
from langgraph_tiered_saver.hot.keys import Keyspace, meta_key, seen_bit, sweep_key
from langgraph_tiered_saver.records import frame
from langgraph_tiered_saver.redaction import redact

logger = logging.getLogger(__name__)

OLDEST_REDIS = (6, 2)
# Redis closes the connection on a longer argument (`proto-max-bulk-len`), which would look like an outage.
LARGEST_RECORD = 512 * 1024 * 1024 - 1
_LEASE_TTL_MS = 60_000
_FILLING_MS = 60_000
FORMAT = "3"  # of keys, scripts and records

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


class HotCall(NamedTuple):
    """One script call: the script, its keys and its arguments."""

    script: scripts.Script
    keys: Sequence[bytes]
    arguments: Sequence[bytes | str | int]


class HotRead(NamedTuple):
    """A read of a whole hot hash, in the generation that the shard is in.

    Two commands in one round trip are cheaper than a script here, whose reply would pass through Lua. The hash is read
    first: if the generation is the right one after that, it was then.
    """

    hot: bytes
    shard: bytes
    generation: int


class Appended(NamedTuple):
    """What an appending script replies.

    Attributes:
        sequence: The record's sequence number.
        previous: The previous record's in the same journal; 0 if the journal was empty.
    """

    sequence: int
    previous: int


class Writer:
    """Names, in the hot hashes, the process whose memory holds all that an unflushed checkpoint was built from.

    Attributes:
        name: Another one after each call whose record may be in Redis, but is not held in memory.
    """

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        """Take a new name, so that no checkpoint is built on what only Redis may have."""
        self.name = secrets.token_hex(4)


class LeaseUnknownError(TieredSaverError):
    """The run lease must be made known to Redis again; never leaves the library."""


class HotCalls:
    """Builds the calls for one keyspace.

    Attributes:
        keyspace: The keys.
        generation: The generation in which the calls are made; the scripts refuse any other one than their own.
    """

    def __init__(
        self,
        keyspace: Keyspace,
        config: TieredConfig,
        generation: int,
        *,
        evicts: bool = False,
        writer: Writer | None = None,
        run_leases: Mapping[str, str] | None = None,
    ) -> None:
        """Prepare.

        Args:
            keyspace: The keys.
            config: Settings.
            generation: The generation.
            evicts: The server may evict what has a TTL.
            writer: Names what this process's memory holds.
            run_leases: The tokens of the threads whose run lease this process holds.
        """
        self.keyspace = keyspace
        self.generation = generation
        self._writer = writer or Writer()
        self._run_leases = {} if run_leases is None else run_leases
        self._ttl = "0" if config.hot_ttl is None else str(int(config.hot_ttl * 1000))
        self._namespaces_ttl = "0" if evicts else self._ttl
        self._ttls = f"{self._ttl} {'0' if evicts else '='}"

    def put(self, encoded: EncodedCheckpoint, payload: bytes) -> HotCall:
        """Acknowledge a checkpoint; the reply is empty when it must carry every channel."""
        position = encoded.position
        keys = self.keyspace.thread(position.thread_id)
        return HotCall(
            scripts.PUT,
            (keys.hot(position.checkpoint_ns), keys.journal, keys.shard, keys.dirty, keys.namespaces, keys.seen),
            (
                check_size(payload),
                frame([part.encode() for pair in encoded.unchanged for part in pair]),
                frame([channel.encode() for channel in encoded.removed]),
                _delta_steps(encoded),
                f"{self._ttls} {encoded.is_old_format:d} {seen_bit(*position[:2])} {self._writer.name} "
                + self._run_leases.get(position.thread_id, ""),
            ),
        )

    def put_writes(self, thread_id: str, checkpoint_ns: str, payload: bytes) -> HotCall:
        """Acknowledge one call's writes."""
        keys = self.keyspace.thread(thread_id)
        return HotCall(
            scripts.PUT_WRITES,
            (keys.hot(checkpoint_ns), keys.journal, keys.shard, keys.dirty, keys.namespaces),
            (check_size(payload), f"{self._ttls} {self._run_leases.get(thread_id, '')}"),
        )

    def get(self, thread_id: str, checkpoint_ns: str) -> HotRead:
        """Read the latest checkpoint."""
        keys = self.keyspace.thread(thread_id)
        return HotRead(keys.hot(checkpoint_ns), keys.shard, self.generation)

    def get_by_id(self, thread_id: str, checkpoint_ns: str, checkpoint_id: str) -> HotCall:
        """Read a checkpoint, if it is the hot one, and the journal's length."""
        keys = self.keyspace.thread(thread_id)
        return HotCall(
            scripts.GET, (keys.hot(checkpoint_ns), keys.shard, keys.journal), (self.generation, checkpoint_id)
        )

    def lease(self, thread_id: str, checkpoint_ns: str, token: str) -> HotCall:
        """Begin to warm a namespace; the reply is the journal's length."""
        keys = self.keyspace.thread(thread_id)
        return HotCall(
            scripts.LEASE,
            (keys.hot(checkpoint_ns), keys.journal, keys.namespaces, keys.shard),
            (token, checkpoint_ns.encode(), _LEASE_TTL_MS, self.generation),
        )

    def warm(
        self,
        thread_id: str,
        checkpoint_ns: str,
        token: str,
        checkpoint: bytes,
        later_writes: str,
        writes: Iterable[bytes],
    ) -> HotCall:
        """Make a checkpoint hot that was read from the cold tier, if the lease still stands."""
        keys, bit = self.keyspace.thread(thread_id), seen_bit(thread_id, checkpoint_ns)
        return HotCall(
            scripts.WARM,
            (keys.hot(checkpoint_ns), keys.namespaces, keys.seen, keys.shard),
            (token, checkpoint, self._ttl, self._namespaces_ttl, later_writes.encode(), bit, *writes),
        )

    def warm_history(self, thread_id: str, token: str, warming: HistoryWarming) -> HotCall:
        """Keep what the cold tier knows of the hot checkpoint's history, if the lease still stands."""
        keys, at = self.keyspace.thread(thread_id), warming.position
        return HotCall(
            scripts.WARM_HISTORY,
            (keys.hot(at.checkpoint_ns), keys.shard),
            (token, self.generation, at.checkpoint_id.encode(), warming.sequence, *warming.channels),
        )

    def maintain(self, thread_id: str, payload: bytes, *, supersedes: bool) -> HotCall:
        """Journal an operation that removes or copies rows, and drop the thread's hot state."""
        keys = self.keyspace.thread(thread_id)
        return HotCall(
            scripts.MAINTAIN,
            (keys.journal, keys.shard, keys.dirty, keys.namespaces),
            (
                thread_id.encode(),
                check_size(payload),
                keys.hot_stem,
                "1" if supersedes else "0",
                self.generation,
                self._run_leases.get(thread_id, ""),
            ),
        )

    def run_lease(self, what: str, thread_id: str, token: str, ttl: float) -> HotCall:
        """Take (`"acquire"`), `"renew"` or `"release"` a thread's run lease; `ttl` in seconds."""
        keys = self.keyspace.thread(thread_id)
        return HotCall(
            scripts.RUN_LEASE, (keys.shard,), (thread_id.encode(), self.generation, what, token, int(ttl * 1e6))
        )

    def journal(self, thread_id: str, most_records: int, most_bytes: int, generation: int | None) -> HotCall:
        """Read a journal from its start, in a generation; None: in whatever generation it is."""
        keys = self.keyspace.thread(thread_id)
        return HotCall(scripts.JOURNAL, (keys.journal, keys.shard), (most_records, most_bytes, generation or ""))

    def ack(self, thread_id: str, up_to: int) -> HotCall:
        """Trim a journal up to and including a sequence number."""
        keys = self.keyspace.thread(thread_id)
        return HotCall(scripts.ACK, (keys.journal, keys.shard, keys.dirty), (thread_id.encode(), up_to + 1))

    def sweep(self, shard: int, grace: float, most_threads: int) -> HotCall:
        """Pick a shard's orphans; `grace` in seconds."""
        return HotCall(scripts.SWEEP, (self.keyspace.dirty(shard),), (int(grace * 1e6), most_threads))


def _delta_steps(encoded: EncodedCheckpoint) -> bytes:
    """Frame what `advance_history` is given."""
    if not (encoded.has_delta_channels or encoded.delta_channels or encoded.has_no_channels):
        return b""
    parts = [b"%d" % encoded.has_delta_channels, b"%d" % encoded.has_no_channels]
    for step in encoded.delta_channels:
        parts += (step.channel.encode(), step.kind.value, step.version.encode())
    return frame(parts)


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
    if text.startswith("TIERED"):
        return _translate_own(text)
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


def _translate_own(text: str) -> TieredSaverError:
    """Turn a refusal of our scripts into an error."""
    if text.startswith("TIEREDSTALE"):
        return stale_writer("")
    if text.startswith("TIEREDLEASE"):
        return LeaseUnknownError("Redis does not know the run lease that this process holds.")
    return _another_generation(text.partition(" ")[2])


def _another_generation(detail: str) -> HotTierUnavailableError:
    return HotTierUnavailableError(
        f"Redis is not in the generation that this process trusts ({detail}): it has lost something, or another "
        "process has opened a later one. Nothing was acknowledged."
    )


def run(client: SyncRedis, call: HotCall) -> Any:
    """Call a script on a synchronous client, in one round trip.

    Raises:
        HotTierUnavailableError: Redis cannot be reached or is not ready.
        HotTierRejectedError: Redis refused.
    """
    try:
        replies = client.exchange((_by_digest(call),))
        if isinstance(replies[0], redis.exceptions.NoScriptError):
            replies = client.exchange((_by_text(call),))
    except REDIS_ERRORS as error:
        raise translate(error) from error
    return _accepted(replies[0])


async def arun(client: AsyncRedis, call: HotCall) -> Any:
    """Do what `run` does, on an asynchronous client."""
    try:
        replies = await client.exchange((_by_digest(call),))
        if isinstance(replies[0], redis.exceptions.NoScriptError):
            replies = await client.exchange((_by_text(call),))
    except REDIS_ERRORS as error:
        raise translate(error) from error
    return _accepted(replies[0])


def read(client: SyncRedis, request: HotRead) -> list[bytes]:
    """Read a hot hash on a synchronous client, in one round trip.

    Returns:
        Its fields and values in turn; empty if there is none.

    Raises:
        HotTierUnavailableError: Redis cannot be reached or is not ready, or is in another generation.
        HotTierRejectedError: Redis refused.
    """
    try:
        replies = client.exchange(_reading(request))
    except REDIS_ERRORS as error:
        raise translate(error) from error
    return _of_generation(replies, request.generation)


async def aread(client: AsyncRedis, request: HotRead) -> list[bytes]:
    """Do what `read` does, on an asynchronous client."""
    try:
        replies = await client.exchange(_reading(request))
    except REDIS_ERRORS as error:
        raise translate(error) from error
    return _of_generation(replies, request.generation)


def _by_digest(call: HotCall) -> tuple[bytes | str | int, ...]:
    return ("EVALSHA", call.script.digest, len(call.keys), *call.keys, *call.arguments)


def _by_text(call: HotCall) -> tuple[bytes | str | int, ...]:
    return ("EVAL", call.script.text, len(call.keys), *call.keys, *call.arguments)


def _reading(request: HotRead) -> tuple[tuple[bytes | str | int, ...], ...]:
    return ("HGETALL", request.hot), ("HGET", request.shard, "g")


def _accepted(reply: Any) -> Any:
    if isinstance(reply, Exception):
        raise translate(reply) from reply
    return reply


def _of_generation(replies: Sequence[Any], generation: int) -> list[bytes]:
    fields: list[bytes] = _accepted(replies[0])
    known = _accepted(replies[1])
    if known != b"%d" % generation:
        raise _another_generation(f"the generation here is {known.decode() if known else 'unknown'}")
    return fields


def run_many(client: SyncRedis, calls: Sequence[HotCall]) -> list[Any]:
    """Call scripts in one round trip (to each server of a Cluster).

    Raises:
        HotTierUnavailableError, HotTierRejectedError: the first call that failed.
    """
    if len(calls) == 1:
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


def wait_for_replicas(client: SyncRedis, key: bytes, config: TieredConfig) -> str:
    """Wait until replicas, or append-only files, have everything that the server of a key has now.

    Replication is one stream: who has a small write made now has everything before it, on whatever connection that was.

    Returns:
        What is short; "" if nothing is.

    Raises:
        HotTierUnavailableError, HotTierRejectedError: the server cannot be asked.
    """
    wait_ms = int(config.hot_ack_timeout * 1000)
    wanted: tuple[str | int, ...] = ("WAIT", config.hot_ack, wait_ms)
    if config.hot_ack_aof:
        wanted = ("WAITAOF", 1, config.hot_ack, wait_ms)
    try:
        # On every kind of client, a command without a key goes to the server of the one before it.
        pipeline = client.pipeline(transaction=False)
        pipeline.set(key, b"1", px=_LEASE_TTL_MS)
        pipeline.execute_command(*wanted)
        reply = pipeline.execute()[1]
    except REDIS_ERRORS as error:
        raise translate(error) from error
    local, replicas = reply if config.hot_ack_aof else (1, reply)
    if not local:
        return f"The append-only file of Redis was not on disk within {config.hot_ack_timeout:g} s"
    if replicas < config.hot_ack:
        return f"{replicas} of {config.hot_ack} replicas had a write within {config.hot_ack_timeout:g} s"
    return ""


def acquire_sweep(client: SyncRedis, config: TieredConfig) -> bool:
    """Try to become the one process that looks for orphans during this interval; one command."""
    try:
        key = sweep_key(config.key_prefix)
        return bool(client.set(key, b"1", nx=True, px=max(1, int(config.sweep_interval * 1000))))
    except REDIS_ERRORS as error:
        raise translate(error) from error


def dirty_threads(client: SyncRedis, keyspace: Keyspace, generation: int | None) -> list[str]:
    """List every thread that has unflushed records, in one round trip.

    Args:
        client: Client of the server.
        keyspace: The installation's keys.
        generation: The generation that it must be in; None: whatever it is in.

    Raises:
        HotTierUnavailableError: Redis cannot be reached, or is in another generation.
        HotTierRejectedError: Redis refused.
    """
    calls = [
        HotCall(scripts.DIRTY, (keyspace.dirty(shard), keyspace.shard(shard)), (generation or "",))
        for shard in range(keyspace.shards)
    ]
    return [name.decode() for names in run_many(client, calls) for name in names]


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
    cluster = is_cluster(client)
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


@dataclass(frozen=True)
class HotState:
    """What Redis tells about itself.

    Attributes:
        recorded: The generation it was prepared for last; 0 if for none.
        opened: The last generation that PostgreSQL is known to have opened; 0 if none.
        instances: Run ids of its servers.
        is_whole: It is what it was when that generation was opened: the same servers, and every shard is in it.
        is_filled: It was told which threads PostgreSQL has.
        evicts: It may evict what has a TTL.
    """

    recorded: int
    opened: int
    instances: frozenset[str]
    is_whole: bool
    is_filled: bool
    evicts: bool

    def holds(self, generation: int) -> bool:
        """Whether everything that was acknowledged in a generation is there."""
        return self.is_whole and self.recorded == generation


def look(client: SyncRedis, config: TieredConfig, keyspace: Keyspace) -> HotState:
    """Ask Redis what it is and holds, and whether it takes writes; about five round trips.

    Raises:
        ConfigurationError: it cannot be used.
        HotTierUnavailableError, HotTierRejectedError: it does not answer, or takes no writes.
    """
    evicts = check_server(client, config)
    instances = instances_of(client)
    meta = read_meta(client, keyspace.prefix)
    check_meta(meta, keyspace)
    calls = [
        HotCall(scripts.PROBE, (keyspace.shard(shard), keyspace.probe(shard)), ()) for shard in range(keyspace.shards)
    ]
    known = {(reply[0], reply[1]) for reply in run_many(client, calls)}
    recorded = int(meta.get("generation", 0))
    now = b"%d" % recorded
    return HotState(
        recorded,
        int(meta.get("opened", 0)),
        instances,
        instances <= frozenset(meta.get("instances", "").split(","))
        and {generation for generation, _ in known} == {now},
        {filled for _, filled in known} == {now},
        evicts,
    )


def check_meta(meta: Mapping[str, str], keyspace: Keyspace | None) -> None:
    """Check that what Redis holds under the key prefix is of this version, and of this installation.

    Raises:
        ConfigurationError: it is not.
    """
    if meta and meta.get("format") != FORMAT:
        raise ConfigurationError(
            f"Redis holds data of format {meta.get('format')!r} under this key prefix, but this version reads "
            f"{FORMAT!r}. Upgrade, or choose another key_prefix."
        )
    if meta and keyspace is not None and meta.get("shards") != str(keyspace.shards):
        raise ConfigurationError(
            f"Redis holds data of {meta.get('shards')} shards under key prefix {keyspace.prefix!r}, but PostgreSQL "
            f"records {keyspace.shards}: they belong to different installations. Choose another key_prefix."
        )


@dataclass(frozen=True)
class Preparation:
    """Redis as it was prepared for a generation, which it enters only if it is still that.

    Attributes:
        generation: The generation.
        member: The process that prepared it.
        instances: Run ids of its servers then.
    """

    generation: int
    member: str
    instances: frozenset[str]


def prepare(client: SyncRedis, keyspace: Keyspace, generation: int, clock_floor: int, member: str) -> Preparation:
    """Prepare every shard for a generation.

    Args:
        client: Client of the server.
        keyspace: The installation's keys.
        generation: The generation.
        clock_floor: No sequence number will be less than this one.
        member: This process. Its mark is on each shard until somebody opens a generation, however often it prepares.

    Raises:
        HotTierUnavailableError, HotTierRejectedError: it is not done everywhere; it can be repeated.
    """
    prepared = Preparation(generation, member, instances_of(client))
    arguments = generation, clock_floor, member
    run_many(client, [HotCall(scripts.PREPARE, (keyspace.shard(s),), arguments) for s in range(keyspace.shards)])
    return prepared


def enter(client: SyncRedis, keyspace: Keyspace, prepared: Preparation) -> None:
    """Let every shard, and the metadata, enter a generation; of those who prepared it, only one may.

    Raises:
        HotTierUnavailableError: Redis cannot be reached, or was emptied since it was prepared.
        HotTierRejectedError: it is not done everywhere.
    """
    arguments = prepared.generation, prepared.member
    run_many(client, [HotCall(scripts.OPEN, (keyspace.shard(s),), arguments) for s in range(keyspace.shards)])
    meta = {
        "format": FORMAT,
        "shards": str(keyspace.shards),
        "generation": str(prepared.generation),
        "instances": ",".join(sorted(prepared.instances)),
    }
    try:
        client.hset(meta_key(keyspace.prefix), mapping=meta)
    except REDIS_ERRORS as error:
        raise translate(error) from error


def restore_run_leases(
    client: SyncRedis, keyspace: Keyspace, prepared: Preparation, held: Iterable[tuple[str, str, int]]
) -> None:
    """Let Redis know the run leases that PostgreSQL records, and no other ones, before a generation is opened.

    Args:
        client: Client of the server.
        keyspace: The installation's keys.
        prepared: What Redis has entered.
        held: Thread, token, and the microseconds that are left.

    Raises:
        HotTierUnavailableError, HotTierRejectedError: it is not done everywhere; it can be repeated.
    """
    arguments: list[list[bytes | str | int]] = [[prepared.generation, prepared.member] for _ in range(keyspace.shards)]
    for thread_id, token, left in held:
        arguments[keyspace.shard_of(thread_id)] += (thread_id.encode(), token, left)
    calls = [HotCall(scripts.RUN_LEASES, (keyspace.shard(s),), given) for s, given in enumerate(arguments)]
    run_many(client, calls)


def record_opened(client: SyncRedis, prefix: str, generation: int) -> None:
    """Record that a generation is open, for processes that begin while PostgreSQL cannot tell them."""
    run(client, HotCall(scripts.RECORD_OPENED, (meta_key(prefix),), (generation,)))


def acquire_filling(client: SyncRedis, prefix: str) -> bool:
    """Try to become the one process that tells Redis which threads there are; one command."""
    try:
        return bool(client.set(b"{%b}:filling" % prefix.encode(), b"1", nx=True, px=_FILLING_MS))
    except REDIS_ERRORS as error:
        raise translate(error) from error


def fill(client: SyncRedis, keyspace: Keyspace, generation: int, bits: Mapping[int, bytes | bytearray]) -> None:
    """Mark threads and namespaces as seen, in every shard.

    Raises:
        HotTierUnavailableError, HotTierRejectedError: it is not done everywhere; it can be repeated.
    """
    for shard in range(keyspace.shards):
        seen = keyspace.seen(shard)
        keys = (seen, keyspace.shard(shard), seen + b":new")
        run(client, HotCall(scripts.FILL, keys, (generation, bytes(bits.get(shard, b"")))))


def instances_of(client: SyncRedis) -> frozenset[str]:
    """Give the run ids of the servers behind a client."""
    try:
        return clients.instances(client)
    except REDIS_ERRORS as error:
        raise translate(error) from error
