"""Fixtures over one real Valkey and one real PostgreSQL per test session."""

from __future__ import annotations

import contextlib
import shutil
import signal
import tempfile
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

import psycopg
import pytest

from langgraph_tiered_saver.embedded import EmbeddedServers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from langgraph_tiered_saver import TieredSaver


def pytest_configure() -> None:
    """Make `timeout pytest` and a cancelled CI job end like Ctrl-C, so that the servers are stopped."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@pytest.fixture(scope="session")
def servers() -> Iterator[EmbeddedServers]:
    """The session's servers. Who kills one brings it back with `EmbeddedServers.start(servers.directory)`."""
    # Not below pytest's own temporary directory, which PostgreSQL's account may not enter when we are root.
    directory = Path(tempfile.mkdtemp(prefix="tiered-tests-"))
    try:
        with EmbeddedServers.start(directory) as servers:
            yield servers
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def redis_url(servers: EmbeddedServers) -> str:
    """Valkey, shared by all tests: keep to keys below `key_prefix`."""
    return servers.redis_url


@pytest.fixture
def make_database(servers: EmbeddedServers) -> Iterator[Callable[[], str]]:
    """A function that creates an empty database and returns its URL; all are dropped after the test."""
    names: list[str] = []

    def make() -> str:
        name = f"test_{uuid.uuid4().hex}"
        with psycopg.connect(servers.postgres_url, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name} TEMPLATE template0")
        names.append(name)
        return urlunsplit(urlsplit(servers.postgres_url)._replace(path=f"/{name}"))

    yield make
    if names:
        with psycopg.connect(servers.postgres_url, autocommit=True) as connection:
            for name in names:
                connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def postgres_url(make_database: Callable[[], str]) -> str:
    """An empty database of this test's own; costs about 70 ms."""
    return make_database()


@pytest.fixture
def key_prefix() -> str:
    """A key prefix of this test's own."""
    return f"test-{uuid.uuid4().hex}"


@pytest.fixture
def saver_settings(key_prefix: str) -> dict[str, Any]:
    """Settings that keep a saver's keys apart from those of other tests."""
    return {"key_prefix": key_prefix}


@pytest.fixture
def make_saver(
    redis_url: str, postgres_url: str, saver_settings: dict[str, Any]
) -> Iterator[Callable[..., TieredSaver]]:
    """A function that makes a saver on this test's database and prefix; all are closed after the test.

    Its keyword arguments are settings of the saver, and win over `saver_settings`.
    """
    from langgraph_tiered_saver import TieredSaver

    with contextlib.ExitStack() as stack:

        def make(**settings: Any) -> TieredSaver:
            saver = TieredSaver.from_conn_string(redis_url, postgres_url, **{**saver_settings, **settings})
            stack.callback(saver.close)
            return saver

        yield make
