"""Clients of a master that Sentinel watches: with bounded pools, and connections that no late reply can spoil."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any

import redis
import redis.asyncio as aioredis
from redis import sentinel
from redis.asyncio import sentinel as async_sentinel

from langgraph_tiered_saver.config import TieredConfig
from langgraph_tiered_saver.hot import options
from langgraph_tiered_saver.hot.guard import ConnectFunction
from langgraph_tiered_saver.hot.urls import Place


class _Pool(sentinel.SentinelConnectionPool, redis.BlockingConnectionPool):
    """Waits for a free connection instead of failing, and closes those to the sentinels, too, when it is closed."""

    def disconnect(self, inuse_connections: bool = True) -> None:
        if not inuse_connections:
            options.close_idle(self)
            return
        super().disconnect()
        for each in self.sentinel_manager.sentinels:
            each.close()


class _AsyncPool(async_sentinel.SentinelConnectionPool, aioredis.BlockingConnectionPool):
    """What `_Pool` is, for an event loop."""

    async def disconnect(self, inuse_connections: bool = True) -> None:
        await super().disconnect(inuse_connections)
        if inuse_connections:
            for each in self.sentinel_manager.sentinels:
                await each.aclose()


class _ClosesWhenReadingFails:
    """A synchronous connection that is closed when reading a reply fails.

    redis-py leaves that to its retry policy here, and ours does not take a time-out for a reason to try again: the
    connection would go back to the pool, and the next command would be given this one's late reply.
    """

    def read_response(self, *arguments: Any, **given: Any) -> Any:
        given.setdefault("disconnect_on_error", True)
        read: Any = super().read_response  # type: ignore[misc]
        return read(*arguments, **given)


class _Managed(_ClosesWhenReadingFails, sentinel.SentinelManagedConnection):
    pass


class _ManagedSSL(_ClosesWhenReadingFails, sentinel.SentinelManagedSSLConnection):
    pass


def _closing(kind: type) -> type:
    known: dict[type, type] = {
        sentinel.SentinelManagedConnection: _Managed,
        sentinel.SentinelManagedSSLConnection: _ManagedSSL,
    }
    return known.get(kind) or type(kind.__name__, (_ClosesWhenReadingFails, kind), {})


def master(place: Place, connect: ConnectFunction | None, config: TieredConfig) -> Any:
    """Make a client of the master that a URL names."""
    make: Any = sentinel.Sentinel
    manager = make([])
    manager.sentinels = [
        _sentinel(place.connection_class, {**place.sentinel, "host": host, "port": port}, config)
        for host, port in place.addresses
    ]
    secure = issubclass(place.connection_class, redis.SSLConnection)
    kind = sentinel.SentinelManagedSSLConnection if secure else sentinel.SentinelManagedConnection
    return _master(manager, place.service, kind, place.connection, connect, config)


def twin(
    pool: sentinel.SentinelConnectionPool,
    connection: Mapping[str, Any],
    connect: ConnectFunction | None,
    config: TieredConfig,
) -> Any:
    """Make a client like the one that owns a pool, with connections of its own to the sentinels and to the master.

    Args:
        pool: The user's pool.
        connection: Options of connections to the master.
        connect: What they call before they take commands.
        config: Bounds and retries.
    """
    manager = copy.copy(pool.sentinel_manager)
    manager.sentinels = [
        _sentinel(
            each.connection_pool.connection_class,
            options.taken_over(each.connection_pool.connection_kwargs, config),
            config,
        )
        for each in manager.sentinels
    ]
    given = {**connection, "check_connection": pool.check_connection}
    return _master(manager, pool.service_name, pool.connection_class, given, connect, config)


def _master(
    manager: Any,
    service: str,
    kind: type,
    connection: Mapping[str, Any],
    connect: ConnectFunction | None,
    config: TieredConfig,
) -> Any:
    manager.discover_master = functools.partial(_discover, manager)
    make: Any = _Pool
    retry = options.retries(config)
    ours = {"retry": retry, "redis_connect_func": connect, "connection_class": _closing(kind)}
    return options.client_of(make(service, manager, **{**options.of_pools(config), **connection, **ours}))


def _discover(manager: Any, service: str) -> Any:
    # redis-py moves the sentinel that answered to the front of the list; two threads at once would lose one of them.
    asked = copy.copy(manager)
    asked.sentinels = list(manager.sentinels)
    address = type(manager).discover_master(asked, service)
    manager.sentinels = asked.sentinels
    return address


def _sentinel(kind: type, connection: Mapping[str, Any], config: TieredConfig) -> Any:
    make: Any = redis.BlockingConnectionPool
    ours = {"retry": options.retries(config), "connection_class": kind}
    return options.client_of(make(**{**options.of_pools(config), **connection, **ours}))


def async_master(place: Place, connect: ConnectFunction | None, config: TieredConfig) -> Any:
    """Do what `master` does, for an asynchronous client."""
    make: Any = async_sentinel.Sentinel
    manager, kind = make([]), options.COUNTERPARTS[place.connection_class]
    given = options.accepted_by(kind, place.sentinel, *options.of_pools(config))
    manager.sentinels = [
        _async_sentinel(kind, {**given, "host": host, "port": port}, config) for host, port in place.addresses
    ]
    kind = options.COUNTERPARTS[
        sentinel.SentinelManagedSSLConnection
        if issubclass(kind, aioredis.SSLConnection)
        else sentinel.SentinelManagedConnection
    ]
    connection = options.accepted_by(kind, place.connection, *options.of_pools(config))
    return _async_master(manager, place.service, kind, connection, connect, config)


def async_twin(
    pool: async_sentinel.SentinelConnectionPool,
    connection: Mapping[str, Any],
    connect: ConnectFunction | None,
    config: TieredConfig,
) -> Any:
    """Do what `twin` does, for an asynchronous client."""
    manager = copy.copy(pool.sentinel_manager)
    manager.sentinels = [
        _async_sentinel(
            each.connection_pool.connection_class,
            options.taken_over(each.connection_pool.connection_kwargs, config),
            config,
        )
        for each in manager.sentinels
    ]
    given = {**connection, "check_connection": pool.check_connection}
    return _async_master(manager, pool.service_name, pool.connection_class, given, connect, config)


def derived(
    pool: sentinel.SentinelConnectionPool,
    connection: Mapping[str, Any],
    connect: ConnectFunction | None,
    config: TieredConfig,
) -> Any:
    """Make an asynchronous client that asks the same sentinels for the same master as a synchronous one."""
    given: Any = pool.sentinel_manager
    make: Any = async_sentinel.Sentinel
    forced = given._force_master_ip  # noqa: SLF001 - there is no public name
    manager = make([], min_other_sentinels=given.min_other_sentinels, force_master_ip=forced)
    for each in given.sentinels:
        kind = options.COUNTERPARTS[each.connection_pool.connection_class]
        taken = options.taken_over(each.connection_pool.connection_kwargs, config)
        manager.sentinels.append(_async_sentinel(kind, options.accepted_by(kind, taken), config))
    checked = {**connection, "check_connection": pool.check_connection}
    kind = options.COUNTERPARTS[pool.connection_class]
    return _async_master(manager, pool.service_name, kind, checked, connect, config)


def _async_master(
    manager: Any,
    service: str,
    kind: type,
    connection: Mapping[str, Any],
    connect: ConnectFunction | None,
    config: TieredConfig,
) -> Any:
    manager.discover_master = functools.partial(_adiscover, manager)
    make: Any = _AsyncPool
    retry = options.async_retries(config)
    ours = {"retry": retry, "redis_connect_func": connect, "connection_class": kind}
    return options.async_client_of(make(service, manager, **{**options.of_pools(config), **connection, **ours}))


async def _adiscover(manager: Any, service: str) -> Any:
    asked = copy.copy(manager)
    asked.sentinels = list(manager.sentinels)
    address = await type(manager).discover_master(asked, service)
    manager.sentinels = asked.sentinels
    return address


def _async_sentinel(kind: type, connection: Mapping[str, Any], config: TieredConfig) -> Any:
    make: Any = aioredis.BlockingConnectionPool
    ours = {"retry": options.async_retries(config), "connection_class": kind}
    return options.async_client_of(make(**{**options.of_pools(config), **connection, **ours}))
