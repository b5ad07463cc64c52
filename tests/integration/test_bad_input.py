"""Whatever is wrong: a typed error that says what to do, in time, with nothing written and no password in it."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import shutil
import socket
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import psycopg
import pytest
import redis
from langgraph.checkpoint.base import Checkpoint
from psycopg.conninfo import make_conninfo

from langgraph_tiered_saver import (
    ColdTierRejectedError,
    ColdTierUnavailableError,
    ConfigurationError,
    HotTierRejectedError,
    HotTierUnavailableError,
    InvalidInputError,
    SerializationError,
    TieredConfig,
    TieredSaver,
    TieredSaverError,
)
from langgraph_tiered_saver.embedded import EmbeddedServers
from langgraph_tiered_saver.hot import tier
from tests.fault.workers import Chain, address, in_threads, values_of
from tests.support import wait_until

SECRET = "Geh€im-7%x"  # not only ASCII, and with a character that means something in a URL
QUOTED = quote(SECRET, safe="")
SLACK = 1.5  # seconds beyond the configured time-out
TIMES = {"redis_timeout": 1.0, "postgres_timeout": 2.0, "flush_timeout": 2.0, "close_timeout": 0.3}

Snapshot = tuple[dict[bytes, bytes | None], dict[str, list[Any]]]


def snapshot(redis_url: str, postgres_url: str, key_prefix: str) -> Snapshot:
    """Read every key below the prefix, and every row of every table."""
    with redis.Redis.from_url(redis_url) as client:
        keys = {key: client.dump(key) for key in client.scan_iter(f"{{{key_prefix}*", 1000)}
        keys = {key: value for key, value in keys.items() if not key.endswith((b":sweep", b":probe", b":filling"))}
    with psycopg.connect(postgres_url) as connection:
        tables = connection.execute(
            "SELECT table_name FROM information_schema.tables "
            "WHERE table_schema = 'public' AND table_name <> 'tiered_members'"
        ).fetchall()
        rows = {
            table: sorted(connection.execute(f'SELECT * FROM "{table}"').fetchall(), key=repr) for (table,) in tables
        }
    return keys, rows


@pytest.fixture
def unchanged(
    redis_url: str, postgres_url: str, key_prefix: str
) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """A function that gives a context in which nothing may be written."""

    @contextlib.contextmanager
    def unchanged() -> Iterator[None]:
        before = snapshot(redis_url, postgres_url, key_prefix)
        yield
        assert snapshot(redis_url, postgres_url, key_prefix) == before

    return unchanged


def chain_of(error: BaseException | None) -> Iterator[BaseException]:
    """Give an error and everything that led to it, whether Python would print it or not."""
    seen: list[BaseException] = []
    waiting = [error]
    while waiting:
        at = waiting.pop()
        if at is not None and at not in seen:
            seen.append(at)
            yield at
            waiting += [at.__cause__, at.__context__]


def assert_kept_secret(
    error: BaseException, saver: TieredSaver | None = None, log: str = "", secrets: tuple[str, ...] = (SECRET, QUOTED)
) -> None:
    """Check that no part of an error, of the log and of the saver's name holds the password."""
    texts = ["".join(traceback.format_exception(error)), log, repr(saver), repr(saver and saver.config)]
    for each in chain_of(error):
        texts += [str(each), repr(each), repr(each.args), repr(getattr(each, "__notes__", ""))]
    for text in texts:
        for secret in secrets:
            assert secret not in text


def timed(call: Callable[[], Any], expected: type[TieredSaverError], seconds: float, match: str = ".") -> Exception:
    """Call, and give the error, which must be of the type and come in time."""
    began = time.monotonic()
    with pytest.raises(expected, match=match) as caught:
        call()
    assert time.monotonic() - began < seconds + SLACK
    return caught.value


def calls_of(saver: TieredSaver) -> dict[str, Callable[[], Any]]:
    """Give one call of every kind."""
    chain = Chain(saver, "red")
    arguments = chain.next()
    config = address("red", arguments[1]["id"])

    async def alist() -> list[Any]:
        return [at async for at in saver.alist(None)]

    return {
        "get_tuple": lambda: saver.get_tuple(address("red")),
        "aget_tuple": lambda: asyncio.run(saver.aget_tuple(address("red"))),
        "get_tuple by id": lambda: saver.get_tuple(config),
        "put": lambda: saver.put(*arguments),
        "aput": lambda: asyncio.run(saver.aput(*arguments)),
        "put_writes": lambda: saver.put_writes(config, [("log", 1)], "task"),
        "aput_writes": lambda: asyncio.run(saver.aput_writes(config, [("log", 1)], "task")),
        "list": lambda: list(saver.list(None)),
        "alist": lambda: asyncio.run(alist()),
        "delete_thread": lambda: saver.delete_thread("red"),
        "adelete_thread": lambda: asyncio.run(saver.adelete_thread("red")),
        "prune": lambda: saver.prune(["red"]),
        "copy_thread": lambda: saver.copy_thread("red", "blue"),
        "delete_for_runs": lambda: saver.delete_for_runs(["run"]),
        "thread_ids": saver.thread_ids,
        "setup": saver.setup,
        "asetup": lambda: asyncio.run(saver.asetup()),
    }


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        yield listener.getsockname()[1]


@pytest.fixture
def refused_port() -> int:
    """A port on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def guarded() -> Iterator[EmbeddedServers]:
    """Servers of these tests' own, whose settings they may change; PostgreSQL asks one role for its password."""
    directory = Path(tempfile.mkdtemp(prefix="tiered-guarded-"))
    try:
        with EmbeddedServers.start(directory) as servers:
            rules = directory / "postgres" / "pg_hba.conf"
            rules.write_text("local all guarded scram-sha-256\n" + rules.read_text())
            with psycopg.connect(servers.postgres_url, autocommit=True) as connection:
                connection.execute("SELECT pg_reload_conf()")
                connection.execute("CREATE ROLE guarded LOGIN PASSWORD 'the right one'")
            yield servers
    finally:
        shutil.rmtree(directory, ignore_errors=True)


# --- servers that are away -------------------------------------------------------------------------------------------


@pytest.fixture
def hosts(refused_port: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Give host parts of URLs that lead nowhere, without asking a name server."""
    resolve = socket.getaddrinfo

    def getaddrinfo(host: Any, *arguments: Any, **named: Any) -> Any:
        if host == "no-such-host.invalid":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return resolve(host, *arguments, **named)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return {"refused": f"127.0.0.1:{refused_port}", "unresolvable": "no-such-host.invalid:6379"}


@pytest.mark.parametrize("host", ["no..such..host", f"{'long' * 20}.invalid"])
@pytest.mark.parametrize("tier_name", ["Redis", "PostgreSQL"])
def test_a_host_that_cannot_be(
    tier_name: str, host: str, redis_url: str, postgres_url: str, key_prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    """I7: a name that no host can have is a typed error, when the saver is made or at its first use."""
    if tier_name == "Redis":
        urls = f"redis://user:{QUOTED}@{host}:6379/0", postgres_url
    else:
        urls = redis_url, f"postgresql://user:{QUOTED}@{host}/database"

    with pytest.raises((ConfigurationError, HotTierUnavailableError, ColdTierUnavailableError)) as caught:
        TieredSaver.from_conn_string(*urls, key_prefix=key_prefix, **TIMES).get_tuple(address("red"))

    assert_kept_secret(caught.value, None, caplog.text)


@pytest.mark.parametrize("where", ["refused", "unresolvable"])
def test_redis_is_away(
    where: str, hosts: dict[str, str], postgres_url: str, key_prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    """I7: every call says that Redis cannot be reached, and PostgreSQL is not touched."""
    url = f"redis://user:{QUOTED}@{hosts[where]}/0"
    saver = TieredSaver.from_conn_string(url, postgres_url, key_prefix=key_prefix, **TIMES)

    for name, call in calls_of(saver).items():
        error = timed(call, HotTierUnavailableError, TIMES["redis_timeout"], "Check the Redis URL")
        assert_kept_secret(error, saver, caplog.text)
        assert isinstance(error, ConnectionError), name
    saver.close()

    with psycopg.connect(postgres_url) as connection:
        assert connection.execute("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'").fetchone() == (0,)


@pytest.mark.parametrize("where", ["refused", "unresolvable", "no such file"])
def test_postgresql_is_away(
    where: str, hosts: dict[str, str], redis_url: str, key_prefix: str, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """I7: before anything was set up, every call says that PostgreSQL cannot be reached, and Redis is not touched."""
    place = quote(str(tmp_path), safe="") if where == "no such file" else hosts[where]
    url = f"postgresql://user:{QUOTED}@{place}/database"
    saver = TieredSaver.from_conn_string(redis_url, url, key_prefix=key_prefix, **TIMES)

    for call in calls_of(saver).values():
        error = timed(call, ColdTierUnavailableError, TIMES["postgres_timeout"], "Check the PostgreSQL URL")
        assert_kept_secret(error, saver, caplog.text)
    saver.close()

    with redis.Redis.from_url(redis_url) as client:
        assert list(client.scan_iter(f"{{{key_prefix}*", 1000)) == []


@pytest.mark.parametrize("name", ["get_tuple", "aput", "asetup"])
def test_redis_says_nothing(
    name: str, silent_port: int, postgres_url: str, key_prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    """I8: a Redis that takes connections and never answers costs its time-out."""
    url = f"redis://user:{QUOTED}@127.0.0.1:{silent_port}/0"
    saver = TieredSaver.from_conn_string(url, postgres_url, key_prefix=key_prefix, **TIMES)

    error = timed(calls_of(saver)[name], HotTierUnavailableError, TIMES["redis_timeout"], "redis_timeout")

    assert_kept_secret(error, saver, caplog.text)
    saver.close()


@pytest.mark.parametrize("name", ["aget_tuple", "put", "setup"])
def test_postgresql_says_nothing(
    name: str, silent_port: int, redis_url: str, key_prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    """I8: a PostgreSQL that takes connections and never answers costs its time-out."""
    url = f"postgresql://user:{QUOTED}@127.0.0.1:{silent_port}/database"
    saver = TieredSaver.from_conn_string(redis_url, url, key_prefix=key_prefix, **TIMES)

    error = timed(calls_of(saver)[name], ColdTierUnavailableError, TIMES["postgres_timeout"], "timeout|time-out")

    assert_kept_secret(error, saver, caplog.text)
    saver.close()
    with redis.Redis.from_url(redis_url) as client:
        assert list(client.scan_iter(f"{{{key_prefix}*", 1000)) == []


@pytest.mark.parametrize("tier_name", ["Redis", "PostgreSQL"])
def test_those_who_wait_together_wait_no_longer(
    tier_name: str, silent_port: int, redis_url: str, postgres_url: str, key_prefix: str
) -> None:
    """I8: ten callers that meet a silent server at once are all answered by one time-out, not one after another."""
    if tier_name == "Redis":
        expected, seconds = HotTierUnavailableError, TIMES["redis_timeout"]
        urls = f"redis://127.0.0.1:{silent_port}/0", postgres_url
    else:
        expected, seconds = ColdTierUnavailableError, TIMES["postgres_timeout"]  # type: ignore[assignment]
        urls = redis_url, f"postgresql://127.0.0.1:{silent_port}/database"
    saver = TieredSaver.from_conn_string(*urls, key_prefix=key_prefix, **TIMES)
    try:
        in_threads(10, lambda _: timed(lambda: saver.get_tuple(address("red")), expected, seconds))  # type: ignore[arg-type,return-value]
    finally:
        saver.close()


def test_redis_is_away_later(guarded: EmbeddedServers, refused_port: int, postgres_url: str, key_prefix: str) -> None:
    """I7: an unreachable Redis is never answered as "no checkpoint", though PostgreSQL would have it."""
    with TieredSaver.from_conn_string(guarded.redis_url, postgres_url, key_prefix=key_prefix) as saver:
        Chain(saver, "red").put()
    away = TieredSaver.from_conn_string(
        f"redis://127.0.0.1:{refused_port}", postgres_url, key_prefix=key_prefix, fallback=False
    )

    for call in (lambda: away.get_tuple(address("red")), lambda: asyncio.run(away.aget_tuple(address("red")))):
        timed(call, HotTierUnavailableError, 1)


def test_postgresql_is_away_later(
    make_saver: Callable[..., TieredSaver], refused_port: int, redis_url: str, key_prefix: str, postgres_url: str
) -> None:
    """I7: once set up, what is hot is answered, what only PostgreSQL could answer is an error, and writes go on."""
    saver = make_saver()
    Chain(saver, "red").put()
    saver.flush()
    url = f"postgresql://user:{QUOTED}@127.0.0.1:{refused_port}/database"
    away = TieredSaver.from_conn_string(redis_url, url, key_prefix=key_prefix, **TIMES)

    found = away.get_tuple(address("red"))
    chain = Chain(away, "blue")
    acked = [chain.put(), chain.write()]
    blue = asyncio.run(away.aget_tuple(address("blue")))

    assert found is not None
    assert blue is not None
    assert blue.checkpoint["channel_values"] == values_of("blue", 0)
    calls = calls_of(away)
    for name in ("list", "alist", "thread_ids", "delete_for_runs"):
        timed(calls[name], ColdTierUnavailableError, TIMES["flush_timeout"])
    for call in (
        lambda: away.get_tuple(address("nobody")),
        lambda: asyncio.run(away.aget_tuple(address("nobody"))),
        lambda: away.get_tuple(address("red", "an older one")),
    ):
        timed(call, ColdTierUnavailableError, TIMES["flush_timeout"])
    away.close()
    assert len(list(saver.list(address("blue")))) == len(acked) / 2


# --- servers that refuse ---------------------------------------------------------------------------------------------


def test_a_wrong_redis_password(
    redis_url: str,
    postgres_url: str,
    key_prefix: str,
    unchanged: Callable[[], contextlib.AbstractContextManager[None]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A wrong password, a wrong user and none at all: the error says what to check, and shows neither password."""
    right = urlsplit(redis_url)
    assert right.password is not None
    with unchanged():
        for user in (f":{QUOTED}@", f"nobody:{QUOTED}@", ""):
            url = f"redis://{user}{right.hostname}:{right.port}/0"
            saver = TieredSaver.from_conn_string(url, postgres_url, key_prefix=key_prefix, **TIMES)
            for call in calls_of(saver).values():
                error = timed(call, HotTierUnavailableError, TIMES["redis_timeout"], "user name and password")
                assert_kept_secret(error, saver, caplog.text, (SECRET, QUOTED, right.password))
            saver.close()


def test_a_wrong_postgresql_password(
    guarded: EmbeddedServers, key_prefix: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """A wrong password, none at all and an unknown database: an error that says what to check, and Redis untouched."""
    right = make_conninfo(guarded.postgres_url, user="guarded", password="the right one")
    with psycopg.connect(right) as connection:
        assert connection.pgconn.used_password
    for url in (
        make_conninfo(guarded.postgres_url, user="guarded", password=SECRET),
        guarded.postgres_url.replace("postgres@", f"guarded:{QUOTED}@"),
        make_conninfo(guarded.postgres_url, user="guarded"),
        make_conninfo(right, dbname="no such database", application_name=SECRET[:5]),
    ):
        saver = TieredSaver.from_conn_string(guarded.redis_url, url, key_prefix=key_prefix, **TIMES)
        for call in calls_of(saver).values():
            error = timed(call, ColdTierUnavailableError, TIMES["postgres_timeout"], "password")
            assert_kept_secret(error, saver, caplog.text + "".join(capfd.readouterr()), (SECRET, QUOTED, "right one"))
        saver.close()
    with redis.Redis.from_url(guarded.redis_url) as client:
        assert list(client.scan_iter(f"{{{key_prefix}*", 1000)) == []


def test_a_postgresql_user_without_rights(guarded: EmbeddedServers, key_prefix: str) -> None:
    """PostgreSQL lets us in and nothing more: an error that trying again will not help, and Redis untouched."""
    url = make_conninfo(guarded.postgres_url, user="guarded", password="the right one")
    saver = TieredSaver.from_conn_string(guarded.redis_url, url, key_prefix=key_prefix, **TIMES)

    for call in calls_of(saver).values():
        error = timed(call, ColdTierRejectedError, TIMES["postgres_timeout"], "rights")
        assert_kept_secret(error, saver, "", ("right one",))
    saver.close()

    with redis.Redis.from_url(guarded.redis_url) as client:
        assert list(client.scan_iter(f"{{{key_prefix}*", 1000)) == []


@pytest.mark.parametrize("denied", ["-@scripting", "-hset", "-info", "-xadd"])
def test_a_redis_user_without_rights(
    denied: str, redis_url: str, postgres_url: str, key_prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Redis lets us in and refuses a command that we need: an error that trying again will not help."""
    parts = urlsplit(redis_url)
    with redis.Redis.from_url(redis_url) as whole:
        whole.acl_setuser(
            "tiered-denied", enabled=True, passwords=[f"+{SECRET}"], commands=["+@all", denied], keys=["*"], reset=True
        )
        try:
            url = f"redis://tiered-denied:{QUOTED}@{parts.hostname}:{parts.port}/0"
            saver = TieredSaver.from_conn_string(url, postgres_url, key_prefix=key_prefix, **TIMES)
            calls = calls_of(saver)
            for name in ("put", "aput", "put_writes", "aput_writes"):
                error = timed(calls[name], HotTierRejectedError, TIMES["postgres_timeout"])
                assert_kept_secret(error, saver, caplog.text)
            saver.close()
        finally:
            whole.acl_deluser("tiered-denied")
        assert list(whole.scan_iter(f"{{{key_prefix}:*}}:journal:*", 1000)) == []


class OldRedis(threading.Thread):
    """A server that speaks Redis' protocol and says that it is an old one."""

    def __init__(self, info: str) -> None:
        super().__init__(daemon=True)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.info = info
        self.commands: list[bytes] = []

    def run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                threading.Thread(target=self.serve, args=(connection,), daemon=True).start()

    def serve(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as stream, contextlib.suppress(OSError, ValueError):
            while header := stream.readline():
                words = []
                for _ in range(int(header[1:])):
                    length = int(stream.readline()[1:])
                    words.append(stream.read(length + 2)[:-2])
                self.commands.append(words[0].upper())
                text = self.info.encode() if words[0].upper() == b"INFO" else b"OK"
                connection.sendall(b"$%d\r\n%b\r\n" % (len(text), text))


@pytest.mark.parametrize("version", ["6.0.16", "5.0.14", "2.8", "unknown", ""])
def test_a_redis_that_is_too_old(version: str, postgres_url: str, key_prefix: str) -> None:
    """An old Redis is named with the version that is needed, and gets no command that writes."""
    server = OldRedis(f"redis_version:{version}\r\nmaxmemory_policy:noeviction\r\n")
    server.start()
    saver = TieredSaver.from_conn_string(f"redis://127.0.0.1:{server.port}", postgres_url, key_prefix=key_prefix)

    for call in calls_of(saver).values():
        timed(call, ConfigurationError, 1.0, r"too old: 6\.2 or later")
    saver.close()
    server.listener.close()

    assert set(server.commands) <= {b"CLIENT", b"INFO"}
    with psycopg.connect(postgres_url) as connection:
        assert connection.execute("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'").fetchone() == (0,)


@pytest.mark.parametrize("policy", ["allkeys-lru", "allkeys-lfu", "allkeys-random"])
def test_a_redis_that_may_evict_the_journal(
    policy: str, guarded: EmbeddedServers, make_database: Callable[[], str], key_prefix: str
) -> None:
    """I1: an allkeys-* policy is refused, with the settings that would do; unless the user says that it is fine."""
    url = make_database()
    with redis.Redis.from_url(guarded.redis_url) as client:
        client.config_set("maxmemory-policy", policy)
        try:
            saver = TieredSaver.from_conn_string(guarded.redis_url, url, key_prefix=key_prefix)
            for call in calls_of(saver).values():
                timed(call, ConfigurationError, 1.0, rf"{policy}.*noeviction or a volatile.*allow_eviction=True")
            saver.close()
            assert list(client.scan_iter(f"{{{key_prefix}*", 1000)) == []
            with TieredSaver.from_conn_string(
                guarded.redis_url, url, key_prefix=key_prefix, allow_eviction=True
            ) as other:
                Chain(other, "red").put()
            client.config_set("maxmemory-policy", "volatile-lru")
            with TieredSaver.from_conn_string(guarded.redis_url, url, key_prefix=key_prefix) as other:
                assert other.get_tuple(address("red")) is not None
        finally:
            client.config_set("maxmemory-policy", "noeviction")


@contextlib.contextmanager
def refusing(client: redis.Redis, why: str) -> Iterator[None]:
    """Let a Redis refuse writes for a reason that passes."""
    if why == "READONLY":
        client.replicaof("127.0.0.1", "1")
    else:
        client.config_set(*{"OOM": ("maxmemory", 1), "NOREPLICAS": ("min-replicas-to-write", 1)}[why])
    try:
        yield
    finally:
        client.replicaof("NO", "ONE")
        client.config_set("maxmemory", 0)
        client.config_set("min-replicas-to-write", 0)


@pytest.mark.parametrize("why", ["OOM", "READONLY", "NOREPLICAS"])
def test_a_redis_that_refuses_for_now(why: str, guarded: EmbeddedServers, postgres_url: str, key_prefix: str) -> None:
    """I7: full, demoted to a replica or without one, Redis refuses a write: nothing of it is kept; later it works."""
    with (
        redis.Redis.from_url(guarded.redis_url) as client,
        TieredSaver.from_conn_string(
            guarded.redis_url, postgres_url, key_prefix=key_prefix, sweep_interval=0, fallback=False, poll_interval=0.1
        ) as saver,
    ):
        chain = Chain(saver, "red")
        chain.put()
        saver.flush()
        before = snapshot(guarded.redis_url, postgres_url, key_prefix)
        arguments = chain.next()
        with refusing(client, why):
            for call in (
                lambda: saver.put(*arguments),
                lambda: asyncio.run(saver.aput(*arguments)),
                lambda: saver.put_writes(chain.config, [("log", 1)], "task"),
            ):
                timed(call, HotTierUnavailableError, 1.0, "nothing was acknowledged")
        wait_until(lambda: saver.stats().hot_trusted)
        found = saver.get_tuple(address("red"))
        assert found is not None
        assert found.checkpoint["channel_values"]["step"] == 0
        assert snapshot(guarded.redis_url, postgres_url, key_prefix) == before
        saver.put(*arguments)
        saver.flush()
        assert len(list(saver.list(address("red")))) == 2


# --- URLs ------------------------------------------------------------------------------------------------------------

GOOD_REDIS, GOOD_POSTGRES = "redis://127.0.0.1:1/0", "postgresql://127.0.0.1:1/database"


@pytest.mark.parametrize(
    "url",
    [
        "",
        " ",
        None,
        7,
        b"redis://127.0.0.1",
        "127.0.0.1:6379",
        f"http://user:{QUOTED}@127.0.0.1:6379",
        f"redis:/user:{QUOTED}@127.0.0.1:6379",
        f"postgresql://user:{QUOTED}@127.0.0.1:6379",
        f"redis://user:{QUOTED}@127.0.0.1:port/0",
        f"redis://user:{QUOTED}@127.0.0.1:99999/0",
        f"redis://user:{QUOTED}@[::1/0",
        f"redis://user:{QUOTED}@127.0.0.1/0?socket_timeout=soon",
        f"redis://user:{QUOTED}@127.0.0.1/0?no_such_option=1",
        f"redis://127.0.0.1/0?password={QUOTED}&no_such_option=1",
    ],
)
def test_a_redis_url_that_cannot_be_used(url: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Refused when the saver is made, before anything is connected, with what a URL looks like."""
    with pytest.raises(ConfigurationError, match="Redis URL") as caught:
        TieredSaver.from_conn_string(url, GOOD_POSTGRES)

    assert_kept_secret(caught.value, None, caplog.text)


@pytest.mark.parametrize(
    "url",
    [
        "",
        " ",
        None,
        7,
        "database",
        f"postgresql+psycopg://user:{QUOTED}@127.0.0.1:5432/database",
        f"postgresql+asyncpg://user:{SECRET}@127.0.0.1/database",
        f"mysql://user:{QUOTED}@127.0.0.1/database",
        f"http://user:{QUOTED}@127.0.0.1/database",
        f"postgresql://user:{QUOTED}@127.0.0.1/database?no_such_option=1",
        f"postgresql://user:{QUOTED}@[::1/database",
        f"postgresql://user:{QUOTED}%ZZ@127.0.0.1/database",
        f"host=127.0.0.1 password='{SECRET}' no_such_option=1",
        f"host=127.0.0.1 password='{SECRET}",
        f"host=127.0.0.1 password = {SECRET} port",
        f"host=127.0.0.1 sslpassword={SECRET} no_such_option=1",
    ],
)
def test_a_postgresql_url_that_cannot_be_used(url: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Refused when the saver is made, before anything is connected, with what a URL looks like."""
    with pytest.raises(ConfigurationError, match=r"PostgreSQL URL.*postgresql://") as caught:
        TieredSaver.from_conn_string(GOOD_REDIS, url)

    assert_kept_secret(caught.value, None, caplog.text)


@pytest.mark.parametrize("character", list("/?#@:[] %"))
def test_a_password_that_was_not_quoted(character: str, caplog: pytest.LogCaptureFixture) -> None:
    """A URL that is cut at a character of its password shows no piece of it, whatever fails with it and when."""
    pieces = ("Anfang", "Schluss")
    password = pieces[0] + character + pieces[1]
    for urls in (
        (f"redis://user:{password}@127.0.0.1:1/0", GOOD_POSTGRES),
        (f"redis://:{password}@127.0.0.1:1/0", GOOD_POSTGRES),
        (GOOD_REDIS, f"postgresql://user:{password}@127.0.0.1:1/database"),
        (GOOD_REDIS, f"postgresql+psycopg://user:{password}@127.0.0.1:1/database"),
    ):
        savers: list[TieredSaver] = []

        def use(urls: tuple[str, str] = urls, savers: list[TieredSaver] = savers) -> None:
            savers += [TieredSaver.from_conn_string(*urls, **TIMES)]
            if urls[0] is GOOD_REDIS:
                # Redis is asked first; what PostgreSQL's side says shows without it.
                savers[0]._source.current().cold(lambda connection: connection.execute("SELECT 1"))
            savers[0].get_tuple(address("red"))

        with pytest.raises(TieredSaverError) as caught:
            use()
        assert_kept_secret(caught.value, savers[0] if savers else None, caplog.text, pieces)
        for saver in savers:
            saver.close()


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("key_prefix", ""),
        ("key_prefix", "with space"),
        ("key_prefix", "{tag}"),
        ("key_prefix", "ü"),
        ("key_prefix", "x" * 65),
        ("key_prefix", "a\n"),
        ("key_prefix", None),
        ("key_prefix", b"lgt"),
        ("postgres_schema", ""),
        ("postgres_schema", "pg_mine"),
        ("postgres_schema", "x" * 64),
        ("postgres_schema", "ü" * 32),
        ("postgres_schema", "a\0b"),
        ("postgres_schema", "a\ud800b"),
        ("postgres_schema", 7),
        ("write_mode", "Behind"),
        ("write_mode", None),
        ("shard_count", 0),
        ("shard_count", 5000),
        ("shard_count", 2.5),
        ("shard_count", "64"),
        ("hot_ttl", 0.5),
        ("hot_ttl", -1),
        ("hot_ttl", math.nan),
        ("hot_ttl", math.inf),
        ("flush_linger", -0.1),
        ("flush_max_records", 0),
        ("flush_max_records", 10.5),
        ("flush_max_bytes", 0),
        ("max_backlog_records", 0),
        ("max_backlog_bytes", -5),
        ("max_memory_bytes", -1),
        ("backlog_timeout", -1),
        ("backlog_timeout", math.inf),
        ("flush_timeout", math.nan),
        ("flush_timeout", math.inf),
        ("close_timeout", "soon"),
        ("exit_timeout", None),
        ("sweep_interval", -1),
        ("orphan_grace", -1),
        ("redis_timeout", 0),
        ("redis_timeout", math.inf),
        ("redis_retries", -1),
        ("redis_retries", 1.5),
        ("redis_pool_size", 0),
        ("redis_pool_size", 2.5),
        ("postgres_timeout", 0),
        ("postgres_timeout", math.inf),
        ("postgres_statement_timeout", -1),
        ("postgres_pool_size", 1),
        ("postgres_pool_size", 2.5),
    ],
)
def test_a_setting_out_of_range(name: str, value: Any) -> None:
    """Refused when the saver is made; the message names the setting and what it may be."""
    with pytest.raises(ConfigurationError, match=rf"{name}|wrong type"):
        TieredSaver.from_conn_string(GOOD_REDIS, GOOD_POSTGRES, **{name: value})


def test_an_unknown_setting() -> None:
    """The message names it, and those that there are."""
    with pytest.raises(ConfigurationError, match=r"Unknown setting 'hot_tll'.*hot_ttl"):
        TieredSaver.from_conn_string(GOOD_REDIS, GOOD_POSTGRES, hot_tll=5)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("SHARD_COUNT", "many"),
        ("SHARD_COUNT", "2.5"),
        ("SHARD_COUNT", ""),
        ("HOT_TTL", "a week"),
        ("HOT_TTL", "0"),
        ("HOT_TTL", "inf"),
        ("AUTO_SETUP", "perhaps"),
        ("REDIS_TIMEOUT", "None"),
        ("REDIS_TIMEOUT", "nan"),
        ("WRITE_MODE", "sideways"),
        ("KEY_PREFIX", "{}"),
        ("FLUSH_TIMEOUT", "inf"),
    ],
)
def test_an_environment_variable_that_cannot_be_read(name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused when the saver is made; the message names the variable or its setting."""
    monkeypatch.setenv("LANGGRAPH_TIERED_REDIS_URL", GOOD_REDIS)
    monkeypatch.setenv("LANGGRAPH_TIERED_POSTGRES_URL", GOOD_POSTGRES)
    TieredSaver.from_env().close()
    monkeypatch.setenv(f"LANGGRAPH_TIERED_{name}", text)

    with pytest.raises(ConfigurationError, match=f"(?i){name}"):
        TieredSaver.from_env()


def test_a_missing_url_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the variables, the documented fallbacks work, and no URL is shown."""
    for name in ("LANGGRAPH_TIERED_REDIS_URL", "REDIS_URL", "LANGGRAPH_TIERED_POSTGRES_URL", "DATABASE_URL"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigurationError, match=r"LANGGRAPH_TIERED_REDIS_URL \(or REDIS_URL\)"):
        TieredSaver.from_env()
    monkeypatch.setenv("REDIS_URL", f"redis://:{QUOTED}@127.0.0.1:1")
    with pytest.raises(ConfigurationError, match=r"LANGGRAPH_TIERED_POSTGRES_URL \(or DATABASE_URL\)") as caught:
        TieredSaver.from_env()
    assert_kept_secret(caught.value)
    monkeypatch.setenv("DATABASE_URL", GOOD_POSTGRES)
    monkeypatch.setenv("LANGGRAPH_TIERED_HOT_TTL", "none")
    monkeypatch.setenv("LANGGRAPH_TIERED_AUTO_SETUP", "no")
    monkeypatch.setenv("LANGGRAPH_TIERED_SHARD_COUNT", "5")
    with TieredSaver.from_env(shard_count=6) as saver:
        assert saver.config == TieredConfig(hot_ttl=None, auto_setup=False, shard_count=6)


# --- calls -----------------------------------------------------------------------------------------------------------


class NotSerializable:
    """Something that no serializer knows."""

    def __reduce__(self) -> Any:
        raise TypeError("not even by pickle")


def changed_checkpoint(checkpoint: Checkpoint, **values: Any) -> Checkpoint:
    """Give a checkpoint with other channel values."""
    return {**checkpoint, "channel_values": {**checkpoint["channel_values"], **values}}


BAD_NAMES = {"a NUL": "a\0b", "a lone surrogate": "a\ud800b"}


def long_name() -> str:
    """A name that PostgreSQL cannot index, because it is long and cannot be compressed."""
    return random.Random(1).randbytes(2000).hex()


def bad_calls(saver: TieredSaver, chain: Chain) -> dict[str, tuple[type[TieredSaverError], str, tuple[Any, ...]]]:
    """Give calls that cannot be: the error that they raise, the method, and its arguments."""
    config, checkpoint, metadata, versions = chain.next()
    good = (config, checkpoint, metadata, versions)
    at = chain.config
    calls: dict[str, tuple[type[TieredSaverError], str, tuple[Any, ...]]] = {
        "get_tuple, no config": (InvalidInputError, "get_tuple", (None,)),
        "get_tuple, no thread": (InvalidInputError, "get_tuple", ({"configurable": {}},)),
        "get_tuple, empty thread": (InvalidInputError, "get_tuple", (address(""),)),
        "put, no thread": (InvalidInputError, "put", ({"configurable": {"checkpoint_ns": ""}}, *good[1:])),
        "put, no configurable": (InvalidInputError, "put", ({}, *good[1:])),
        "put, no id": (InvalidInputError, "put", (config, {**checkpoint, "id": ""}, metadata, versions)),
        "put_writes, no thread": (InvalidInputError, "put_writes", ({"configurable": {}}, [("log", 1)], "task")),
        "put_writes, no checkpoint": (InvalidInputError, "put_writes", (address("red"), [("log", 1)], "task")),
        "list, no thread": (InvalidInputError, "list", ({"configurable": {}},)),
        "delete_thread, empty": (InvalidInputError, "delete_thread", ("",)),
        "delete_thread, None": (InvalidInputError, "delete_thread", (None,)),
        "copy_thread, no target": (InvalidInputError, "copy_thread", ("red", "")),
        "delete_for_runs, a string": (InvalidInputError, "delete_for_runs", ("run",)),
        "prune, a string": (InvalidInputError, "prune", ("red",)),
        "prune, an empty id": (InvalidInputError, "prune", (["red", ""],)),
        "put, a value": (
            SerializationError,
            "put",
            (config, changed_checkpoint(checkpoint, log=NotSerializable()), metadata, versions),
        ),
        "put, a value inside": (
            SerializationError,
            "put",
            (config, changed_checkpoint(checkpoint, log={"deep": [NotSerializable()]}), metadata, versions),
        ),
        "put, a value that did not change": (
            SerializationError,
            "put",
            (address("new"), changed_checkpoint(checkpoint, constant=NotSerializable()), metadata, versions),
        ),
        "put, metadata": (SerializationError, "put", (config, checkpoint, {**metadata, "x": object()}, versions)),
        "put, metadata inside": (
            SerializationError,
            "put",
            (config, checkpoint, {**metadata, "x": {"y": [{1, 2}]}}, versions),
        ),
        "put_writes, a value": (
            SerializationError,
            "put_writes",
            (at, [("log", 1), ("step", NotSerializable())], "task"),
        ),
    }
    for kind, name in {**BAD_NAMES, "a long name": long_name()}.items():
        ns = address("red", checkpoint_ns=name)
        calls |= {
            f"put, {kind} in the thread": (InvalidInputError, "put", (address(name), *good[1:])),
            f"put, {kind} in the namespace": (InvalidInputError, "put", (ns, *good[1:])),
            f"put, {kind} in the id": (InvalidInputError, "put", (config, {**checkpoint, "id": name}, *good[2:])),
            f"put, {kind} in a channel": (
                InvalidInputError,
                "put",
                (
                    config,
                    {
                        **changed_checkpoint(checkpoint, **{name: [1]}),
                        "channel_versions": {**checkpoint["channel_versions"], name: "1"},
                    },
                    metadata,
                    {**versions, name: "1"},
                ),
            ),
            f"put_writes, {kind} in the thread": (
                InvalidInputError,
                "put_writes",
                (address(name, "id"), [("log", 1)], "task"),
            ),
            f"put_writes, {kind} in the checkpoint id": (
                InvalidInputError,
                "put_writes",
                (address("red", name), [("log", 1)], "task"),
            ),
            f"put_writes, {kind} in the task": (InvalidInputError, "put_writes", (at, [("log", 1)], name)),
        }
        if kind in BAD_NAMES:
            calls |= {
                f"put_writes, {kind} in a channel": (InvalidInputError, "put_writes", (at, [(name, 1)], "task")),
                f"put_writes, {kind} in the path": (InvalidInputError, "put_writes", (at, [("log", 1)], "task", name)),
                f"put, {kind} in an inlined channel": (
                    InvalidInputError,
                    "put",
                    (config, changed_checkpoint(checkpoint, **{name: 1}), metadata, {**versions, name: "1"}),
                ),
                f"get_tuple, {kind}": (InvalidInputError, "get_tuple", (address(name),)),
                f"list, {kind}": (InvalidInputError, "list", (address(name),)),
                f"delete_thread, {kind}": (InvalidInputError, "delete_thread", (name,)),
                f"copy_thread, {kind}": (InvalidInputError, "copy_thread", ("red", name)),
                f"prune, {kind}": (InvalidInputError, "prune", (["red", name],)),
                f"delete_for_runs, {kind}": (InvalidInputError, "delete_for_runs", ([name],)),
            }
    return calls


def call(saver: TieredSaver, method: str, arguments: tuple[Any, ...], *, asynchronous: bool) -> Any:
    """Call a method or its asynchronous twin."""

    async def twin() -> Any:
        if method == "list":
            return [at async for at in saver.alist(*arguments)]
        return await getattr(saver, f"a{method}")(*arguments)

    if asynchronous:
        return asyncio.run(twin())
    result = getattr(saver, method)(*arguments)
    return list(result) if method == "list" else result


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_calls_that_cannot_be(
    asynchronous: bool,
    make_saver: Callable[..., TieredSaver],
    unchanged: Callable[[], contextlib.AbstractContextManager[None]],
    subtests_of_this: Callable[[str, Callable[[], None]], None],
) -> None:
    """Each raises the typed error that says that nothing was written, and nothing was: in Redis nor in PostgreSQL."""
    saver = make_saver(sweep_interval=0, flush_timeout=2.0, close_timeout=0.5)
    chain = Chain(saver, "red")
    chain.put(), chain.write()
    saver.flush()
    calls = bad_calls(saver, chain)

    for name, (expected, method, arguments) in calls.items():

        def attempt(
            expected: type[TieredSaverError] = expected, method: str = method, arguments: tuple[Any, ...] = arguments
        ) -> None:
            with unchanged(), pytest.raises(expected, match=r"nothing was|Nothing was|Pass config|needs") as caught:
                call(saver, method, arguments, asynchronous=asynchronous)
            assert len(str(caught.value)) < 1000
            assert saver.stats().backlog_records == 0

        subtests_of_this(name, attempt)
    found = saver.get_tuple(address("red"))
    assert found is not None
    assert found.checkpoint["channel_values"] == values_of("red", 0)
    assert saver.stats().quarantined_threads == ()


@pytest.fixture
def subtests_of_this() -> Iterator[Callable[[str, Callable[[], None]], None]]:
    """A function that runs a part of a test; the test fails at its end with all parts that failed."""
    failures: list[str] = []

    def run(name: str, part: Callable[[], None]) -> None:
        try:
            part()
        except (Exception, pytest.fail.Exception) as error:
            failures.append(f"{name}: {type(error).__name__}: {error!s:.300}")

    yield run
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_record_that_is_too_large(
    asynchronous: bool,
    make_saver: Callable[..., TieredSaver],
    unchanged: Callable[[], contextlib.AbstractContextManager[None]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """More than Redis takes at once is refused before it is sent; what fits goes on."""
    saver = make_saver(sweep_interval=0)
    chain = Chain(saver, "red")
    chain.put()
    saver.flush()
    monkeypatch.setattr(tier, "LARGEST_RECORD", 5000)
    config, checkpoint, metadata, versions = chain.next()
    large = changed_checkpoint(checkpoint, log=[b"x" * 6000])

    for method, arguments in (
        ("put", (config, large, metadata, versions)),
        ("put_writes", (config, [("log", b"x" * 6000)], "task")),
    ):
        with unchanged(), pytest.raises(InvalidInputError, match=r"nothing was written.*object store"):
            call(saver, method, arguments, asynchronous=asynchronous)

    chain.config = saver.put(config, checkpoint, metadata, versions)
    found = saver.get_tuple(address("red"))
    assert found is not None
    assert found.checkpoint["channel_values"] == values_of("red", 1)


def test_a_filter_that_is_not_json(
    make_saver: Callable[..., TieredSaver], unchanged: Callable[[], contextlib.AbstractContextManager[None]]
) -> None:
    """A filter that PostgreSQL could not hold is bad input, not a failure of PostgreSQL or of psycopg."""
    saver = make_saver(sweep_interval=0)
    Chain(saver, "red").put()
    saver.flush()

    for filter in ({"source": object()}, {"source": "a\0b"}, {"source": "a\ud800b"}):
        with unchanged(), pytest.raises(TieredSaverError):
            list(saver.list(address("red"), filter=filter))
    assert len(list(saver.list(address("red"), filter={"source": "loop"}))) == 1


def test_hostile_names_are_names(
    make_saver: Callable[..., TieredSaver], redis_url: str, postgres_url: str, key_prefix: str
) -> None:
    """Names that mean something to SQL, Lua, Redis or a shell are stored and found as they are, apart from others."""
    saver = make_saver()
    names = [
        "'; DROP TABLE checkpoints; --",
        "{tag}:x",
        "}:hot:1:3:red:",
        "*",
        "red:",
        "red",
        "%s %(x)s {0}",
        "\n\r\t",
        "../../etc",
        "ünï/コード 🙂",
        " ",
        "a" * 1000,
    ]
    for name in names:
        chain = Chain(saver, name, checkpoint_ns=name)
        chain.put(), chain.write()
    saver.flush()

    with redis.Redis.from_url(redis_url) as client:
        outside = [
            key for key in client.scan_iter("*", 1000) if key_prefix.encode() in key and not key.startswith(b"{")
        ]
    assert outside == []
    for name in names:
        found = saver.get_tuple(address(name, checkpoint_ns=name))
        assert found is not None
        assert found.checkpoint["channel_values"] == values_of(name, 0)
        assert [at.config["configurable"]["thread_id"] for at in saver.list({"configurable": {"thread_id": name}})] == [
            name
        ]
    saver.delete_thread("*")
    saver.delete_thread(names[0])
    assert {thread.thread_id for thread in saver.thread_ids()} == set(names) - {"*", names[0]}
