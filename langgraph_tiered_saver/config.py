"""Settings of a tiered saver: one frozen dataclass, validated when it is made."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_type_hints

from langgraph_tiered_saver.errors import ConfigurationError

WriteMode = Literal["behind", "through"]
Storage = Literal["standard", "compact"]

ENVIRONMENT_PREFIX = "LANGGRAPH_TIERED_"

_KEY_PREFIX = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_POSTGRES_IDENTIFIER_BYTES = 63


@dataclass(frozen=True)
class TieredConfig:
    """Every setting of a `TieredSaver`, with its unit and default.

    All times are in seconds, all sizes in bytes. Each field can also be set by an environment variable that
    `TieredSaver.from_env` reads: `LANGGRAPH_TIERED_` and the field's name in capitals.

    Raises:
        ConfigurationError: a value is out of range; the message names the field.
    """

    key_prefix: str = "lgt"
    """First part of every Redis key; letters, digits, `_`, `.` and `-`. Savers that share threads share it."""

    postgres_schema: str | None = None
    """PostgreSQL schema of the tables, created if missing. None: the connection's own `search_path`."""

    auto_setup: bool = True
    """Create tables and hot-tier metadata on first use. False: call `setup()` or `asetup()` yourself."""

    write_mode: WriteMode = "behind"
    """`"behind"`: a write returns when Redis has it. `"through"`: it also waits until PostgreSQL has it."""

    storage: Storage = "standard"
    """`"standard"`: PostgreSQL holds every value whole, as PostgresSaver does. `"compact"`: a value that has only grown
    is stored as what it adds to the one before it; plain PostgresSaver then reads through views."""

    delta_memory_bytes: int = 64 * 1024 * 1024
    """Most bytes of the latest values kept in memory, which tell what a step added; the flusher keeps as many.
    0: every step sends whole values."""

    reuse_memory_bytes: int = 0
    """Most bytes of serialized messages that are kept and used again for messages that did not change; make it twice
    what the live conversations take, or serializing becomes slower. 0: every step serializes all of them."""

    shard_count: int = 64
    """How many hash tags threads are spread over. Recorded at the first setup; the recorded number wins."""

    hot_ttl: float | None = 7 * 24 * 3600.0
    """Seconds after the last write until a thread leaves the hot tier. None: never. The journal has no TTL."""

    allow_eviction: bool = False
    """Accept a Redis with an `allkeys-*` eviction policy, which may evict records that are not flushed yet."""

    flush_linger: float = 0.005
    """Seconds the flusher waits for more records before it writes a batch. Under load it waits four times what the last
    one took, up to 0.1 s. Not paid by anybody who waits."""

    flush_max_records: int = 1000
    """Most records in one transaction."""

    flush_max_bytes: int = 8 * 1024 * 1024
    """Most bytes in one transaction. A single larger record makes a transaction of its own."""

    max_backlog_records: int = 100_000
    """Most records acknowledged by this process and not yet in PostgreSQL; at the bound writes wait."""

    max_backlog_bytes: int = 1024 * 1024 * 1024
    """Most bytes of such records, counted as they lie in the journal; at the bound writes wait."""

    max_memory_bytes: int = 256 * 1024 * 1024
    """Most bytes of such records kept in this process. Beyond it the flusher re-reads them from the journal."""

    backlog_timeout: float = 30.0
    """Seconds a write waits at the backlog bound before it raises `BacklogFullError`."""

    flush_timeout: float = 60.0
    """Seconds that `flush()`, write-through and reads that need a flush wait for it, unless told otherwise."""

    close_timeout: float = 10.0
    """Seconds that `close()` drains before it leaves the rest in the journal."""

    exit_timeout: float = 3.0
    """Seconds an interpreter that exits without `close()` spends on draining."""

    sweep_interval: float = 15.0
    """Seconds between two looks for orphans, by all processes together. 0: this process never looks."""

    orphan_grace: float = 10.0
    """Age in seconds at which an unflushed record counts as an orphan and may be adopted by anybody."""

    fallback: bool = True
    """Redis away: go on through PostgreSQL, writes before they return. False: raise `HotTierUnavailableError`."""

    poll_interval: float = 1.0
    """Seconds between two looks at PostgreSQL, by which a process hears that another one has gone past Redis."""

    durable_channels: str = "__interrupt__,__error__,__resume__"
    """Writes to these channels (separated by commas) return once PostgreSQL has them, in either `write_mode`."""

    durable_strict: bool = False
    """Such a write while PostgreSQL is away: True raises `FlushTimeoutError`, False logs, counts and returns."""

    hot_ack: int = 0
    """Replicas that must have a write before it returns (Redis' `WAIT`). 0: none is waited for."""

    hot_ack_aof: bool = False
    """Wait until the append-only file of the master, and of `hot_ack` replicas, is on disk (`WAITAOF`, Redis 7.2)."""

    hot_ack_timeout: float = 1.0
    """Seconds to wait for either."""

    hot_ack_strict: bool = False
    """Fewer than asked for: True raises `AcknowledgementShortfallError`, False logs and goes on."""

    retention_keep_last: int | None = None
    """Newest checkpoints of each namespace that `langgraph-tiered worker` leaves. None: all."""

    retention_max_age: float | None = None
    """Age in seconds beyond which the worker removes a checkpoint that is not its namespace's latest. None: never."""

    retention_delete_idle: float | None = None
    """Age in seconds of a thread's newest checkpoint beyond which the worker deletes the thread. None: never."""

    retention_interval: float = 3600.0
    """Seconds between two passes of the worker over all threads, by all workers together."""

    redis_timeout: float = 3.0
    """Seconds for one Redis command, or for connecting, before Redis counts as away."""

    redis_retries: int = 1
    """How often a Redis command is repeated when its connection broke. Every script may safely run twice."""

    redis_pool_size: int = 50
    """Most Redis connections for the synchronous calls, and as many for each event loop."""

    postgres_timeout: float = 10.0
    """Seconds to get a PostgreSQL connection before `ColdTierUnavailableError`."""

    postgres_statement_timeout: float = 60.0
    """Seconds for one transaction of the flusher or one read, whether the server runs or hangs. 0: no bound of ours."""

    postgres_pool_size: int = 10
    """Most PostgreSQL connections of this process; one of them is the flusher's."""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            _check_type(name, getattr(self, name), get_args(hint) or (hint,))
        _check(bool(_KEY_PREFIX.fullmatch(self.key_prefix)), "key_prefix", self.key_prefix,
               "1 to 64 letters, digits, '_', '.' or '-'")  # fmt: skip
        schema = self.postgres_schema
        if schema is not None:
            usable = 0 < len(schema.encode(errors="replace")) <= _POSTGRES_IDENTIFIER_BYTES and _is_text(schema)
            usable = usable and "\0" not in schema and not schema.startswith("pg_") and schema != "$user"
            _check(usable, "postgres_schema", schema, "1 to 63 bytes, not '$user' and not starting with 'pg_'")
        _check(self.write_mode in get_args(WriteMode), "write_mode", self.write_mode, "'behind' or 'through'")
        _check(self.storage in get_args(Storage), "storage", self.storage, "'standard' or 'compact'")
        _check(1 <= self.shard_count <= 4096, "shard_count", self.shard_count, "1 to 4096")
        _check(self.hot_ttl is None or self.hot_ttl >= 1, "hot_ttl", self.hot_ttl, "at least 1 second, or None")
        for name in ("flush_max_records", "flush_max_bytes", "max_backlog_records", "max_backlog_bytes",
                     "redis_pool_size"):  # fmt: skip
            _check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        _check(self.postgres_pool_size >= 2, "postgres_pool_size", self.postgres_pool_size,
               "at least 2: the flusher holds one while readers need another")  # fmt: skip
        keep_last = self.retention_keep_last
        _check(keep_last is None or keep_last >= 1, "retention_keep_last", keep_last, "at least 1, or None")
        for name in ("retention_max_age", "retention_delete_idle"):
            age = getattr(self, name)
            _check(age is None or age > 0, name, age, "more than 0 seconds, or None")
        for name in ("redis_timeout", "postgres_timeout", "retention_interval"):
            _check(getattr(self, name) > 0, name, getattr(self, name), "more than 0 seconds")
        _check(0.01 <= self.poll_interval <= 60, "poll_interval", self.poll_interval, "0.01 to 60 seconds")
        _check(_is_text(self.durable_channels), "durable_channels", self.durable_channels, "text in Unicode")
        for name in ("flush_linger", "delta_memory_bytes", "reuse_memory_bytes", "max_memory_bytes", "backlog_timeout",
                     "flush_timeout", "close_timeout", "exit_timeout", "sweep_interval", "orphan_grace",
                     "redis_retries", "hot_ack", "hot_ack_timeout", "postgres_statement_timeout"):  # fmt: skip
            _check(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> TieredConfig:
        """Make a configuration from keyword settings.

        Raises:
            ConfigurationError: a setting is unknown, of the wrong type or out of range.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(settings) - known):
            raise ConfigurationError(
                f"Unknown setting {', '.join(map(repr, unknown))}. Known settings: {', '.join(sorted(known))}."
            )
        try:
            return cls(**settings)
        except TypeError as error:
            raise ConfigurationError(f"A setting has the wrong type: {error}.") from error

    @classmethod
    def settings_from_env(cls, environ: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Read the settings that `LANGGRAPH_TIERED_*` variables name.

        Args:
            environ: Variables to read instead of the process's own.

        Raises:
            ConfigurationError: a variable's text cannot be read as its field's type.
        """
        environ = os.environ if environ is None else environ
        settings: dict[str, Any] = {}
        hints = get_type_hints(cls)
        for field in dataclasses.fields(cls):
            text = environ.get(ENVIRONMENT_PREFIX + field.name.upper())
            if text is not None:
                settings[field.name] = _parse(field.name, text, hints[field.name])
        return settings


def parse_seconds(text: str) -> float:
    """Read a number of seconds, or of minutes, hours or days if it ends in `m`, `h` or `d`.

    Raises:
        ValueError: the text is neither.
    """
    number = text.strip()
    unit = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}.get(number[-1:].lower())
    return float(number) if unit is None else float(number[:-1]) * unit


def _check(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise ConfigurationError(f"{name}={value!r} cannot be used: it must be {allowed}.")


def _check_type(name: str, value: object, kinds: tuple[Any, ...]) -> None:
    """Refuse a value of another type; a whole number will do for seconds, but not infinity or True."""
    if isinstance(value, bool):
        _check(bool in kinds, name, value, "another type than bool")
    elif isinstance(value, (int, float)):
        _check(float in kinds or (int in kinds and isinstance(value, int)), name, value, "a whole number")
        _check(math.isfinite(value), name, value, "a finite number")
    elif isinstance(value, str):
        _check(
            bool({str, "behind", "standard"} & set(kinds)),
            name,
            value,
            "a number" if bool not in kinds else "True or False",
        )
    else:
        _check(value is None and type(None) in kinds, name, value, "a number, a text, True or False")


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _parse(name: str, text: str, hint: Any) -> Any:
    """Read an environment variable's text as a field's type."""
    kinds = get_args(hint) or (hint,)
    if type(None) in kinds and text.lower() in ("", "none"):
        return None
    try:
        if bool in kinds:
            return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}[text.lower()]
        if float in kinds:
            return parse_seconds(text)
        if int in kinds:
            return int(text)
    except (KeyError, ValueError):
        raise ConfigurationError(
            f"{ENVIRONMENT_PREFIX}{name.upper()}={text!r} cannot be read as {hint}. Correct or unset it."
        ) from None
    return text
