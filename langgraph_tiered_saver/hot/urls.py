"""Redis URLs: of one server, of a Cluster, and of a master that Sentinel watches."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import redis
from redis import connection as redis_connection

from langgraph_tiered_saver.config import TieredConfig
from langgraph_tiered_saver.errors import ConfigurationError
from langgraph_tiered_saver.hot import options
from langgraph_tiered_saver.hot.slots import Address

_SCHEMES = (
    "redis://",
    "rediss://",
    "unix://",
    "redis+cluster://",
    "rediss+cluster://",
    "redis+sentinel://",
    "rediss+sentinel://",
)
_SEVERAL = re.compile(
    r"(?P<scheme>rediss?)\+(?P<kind>cluster|sentinel)://(?P<servers>[^/?#]*)/?(?P<path>[^?#]*)(?P<query>\?[^#]*)?"
)
_PORTS = {"cluster": 6379, "sentinel": 26379}
_LARGEST_PORT = 65535
_parse_url: Any = redis_connection.parse_url
_FORMS = {
    "single": "redis://user:password@host:port/database?option=value",
    "cluster": "redis+cluster://user:password@host:port,host:port/?option=value",
    "sentinel": "redis+sentinel://user:password@host:port,host:port/service/database?option=value",
}


@dataclass(frozen=True)
class Place:
    """What a URL says.

    Attributes:
        kind: What answers there: "single", "cluster" or "sentinel".
        connection_class: Class of the connections.
        connection: Their options. A single server's host and port, or path, are among them.
        addresses: The servers of a Cluster to ask for the others, or the sentinels.
        service: Sentinel's name of the master.
        sentinel: Options of the connections to the sentinels, without host and port.
    """

    kind: str
    connection_class: type
    connection: Mapping[str, Any] = field(repr=False)
    addresses: tuple[Address, ...] = ()
    service: str = ""
    sentinel: Mapping[str, Any] = field(default_factory=dict, repr=False)


def parse(url: str, config: TieredConfig) -> Place:
    """Read a URL. What its query says wins over the configuration.

    Raises:
        ConfigurationError: it cannot be read. Its password is not repeated.
    """
    if not isinstance(url, str) or not url.startswith(_SCHEMES):
        raise ConfigurationError(f"The Redis URL cannot be used: it must start with {', '.join(_SCHEMES)}.")
    kind = next((kind for kind in _PORTS if url.partition("://")[0].endswith(f"+{kind}")), "single")
    try:
        return _single(url, config) if kind == "single" else _several(url, config)
    except (ValueError, TypeError, AttributeError, redis.RedisError):
        pass
    # Not raised while the parser's error is handled: that error shows pieces of the URL.
    raise ConfigurationError(
        "The Redis URL cannot be read: its host, port, database or one of its options is malformed or unknown. "
        f"Percent-encode special characters of the user name and password; the form is {_FORMS[kind]}."
    )


def _single(url: str, config: TieredConfig) -> Place:
    given = _parse_url(url)
    kind = given.pop("connection_class", redis.Connection)
    connection = {**options.of_connections(config), **options.of_pools(config), **given}
    _try(kind, connection)
    _check_address((str(given.get("host", "")), int(given.get("port") or 0)))
    return Place("single", kind, connection)


def _several(url: str, config: TieredConfig) -> Place:
    parts = _SEVERAL.fullmatch(url)
    # A password that was not percent-encoded is cut at one of these, and a piece of it would pass for something else.
    if parts is None or set("@:, ").intersection(parts["path"]) or parts["servers"].count("@") > 1:
        raise ValueError
    credentials, at, servers = parts["servers"].rpartition("@")
    addresses = tuple(_address(server, _PORTS[parts["kind"]]) for server in servers.split(","))
    service, _, database = parts["path"].partition("/") if parts["kind"] == "sentinel" else ("", "", parts["path"])
    if not re.fullmatch("[0-9]*", database) or (parts["kind"] == "sentinel" and not service):
        raise ValueError
    given = _parse_url(f"{parts['scheme']}://{credentials}{at}host/{database}{parts['query'] or ''}")
    kind = given.pop("connection_class", redis.Connection)
    given.pop("host")
    own = {name: given.pop(f"sentinel_{name}") for name in ("username", "password") if f"sentinel_{name}" in given}
    connection = {**options.of_connections(config), **options.of_pools(config), **given}
    _try(kind, connection)
    if parts["kind"] == "cluster":
        if own or connection.pop("db", 0):
            raise ValueError
        return Place("cluster", kind, connection, addresses)
    sentinel = {name: value for name, value in connection.items() if name not in ("username", "password", "db")}
    return Place("sentinel", kind, connection, addresses, unquote(service), sentinel | own)


def _try(kind: type, connection: Mapping[str, Any]) -> None:
    """See whether all options are known, with a connection that connects to nothing."""
    make: Any = redis.BlockingConnectionPool
    pool = make(connection_class=kind, **connection)
    pool.connection_class(**pool.connection_kwargs)


def _address(server: str, port: int) -> Address:
    """Read `host`, `host:port` or `[IPv6 address]:port`."""
    parts = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%]+)\]|([^\[\]:]+))(?::([0-9]+))?", server)
    if parts is None:
        raise ValueError
    address = unquote(parts[1] or parts[2]), int(parts[3] or port)
    _check_address(address)
    return address


def _check_address(address: Address) -> None:
    if not set("@/?# ").isdisjoint(address[0]) or not 0 <= address[1] <= _LARGEST_PORT:
        raise ValueError
