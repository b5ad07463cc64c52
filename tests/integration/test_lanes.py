"""Connections that are kept between calls, and shared by the calls of an event loop: each caller gets its own reply."""

from __future__ import annotations

import asyncio
import gc
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest
import redis

from langgraph_tiered_saver import TieredConfig
from langgraph_tiered_saver.hot import clients
from tests.fault.proxy import Proxy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from langgraph_tiered_saver.hot.lanes import AsyncLaneClient, LaneClient

ECHO = "return ARGV[1]"
SHORT = TieredConfig(redis_timeout=0.5)


def echo(text: object) -> tuple[Any, ...]:
    """A command whose reply is its argument."""
    return ("EVAL", ECHO, 0, str(text))


@contextmanager
def proxied(url: str) -> Iterator[tuple[Proxy, str]]:
    """A proxy in front of Valkey, and the URL through it."""
    port = urlsplit(url).port
    assert port is not None
    with Proxy(port) as proxy:
        yield proxy, url.replace(f":{port}", f":{proxy.port}")


def connected(url: str, config: TieredConfig = SHORT) -> tuple[LaneClient, Callable[[], AsyncLaneClient]]:
    """A synchronous client, and a maker of asynchronous ones."""
    return clients.from_url(url, config)


def kill_clients(url: str) -> None:
    """Let the server close every connection but the one that asks."""
    with redis.Redis.from_url(url) as client:
        client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")


def test_threads_get_their_own_replies(redis_url: str) -> None:
    """Sixteen threads exchange at once: nobody gets another one's reply."""
    client, _ = connected(redis_url)

    def work(number: int) -> bool:
        return all(client.exchange([echo(f"{number}-{i}")]) == [f"{number}-{i}".encode()] for i in range(100))

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(work, range(16)))
    client.close()


def test_coroutines_share_a_connection_and_get_their_own_replies(redis_url: str) -> None:
    """Two hundred calls in flight, short and long, use one connection; a refusal is its caller's alone."""

    async def go() -> tuple[list[Any], int]:
        client = connected(redis_url)[1]()
        calls = [client.exchange([echo("x" * (i * 997 % 90_000) + str(i))]) for i in range(200)]
        wrong = client.exchange([("HGETALL",), echo("after the refusal")])
        *found, mixed = await asyncio.gather(*calls, wrong)
        assert isinstance(mixed[0], redis.ResponseError)
        assert mixed[1] == b"after the refusal"
        (listed,) = await client.exchange([("CLIENT", "INFO")])
        assert b"cmd=client" in listed
        in_use = len(client.connection_pool._in_use_connections)
        await client.aclose()
        return found, in_use

    found, in_use = asyncio.run(go())

    assert found == [[("x" * (i * 997 % 90_000) + str(i)).encode()] for i in range(200)]
    assert in_use == 1


def test_a_cancelled_call_leaves_the_others_alone(redis_url: str) -> None:
    """The reply of a caller that has gone is dropped, and everybody else's is where it belongs."""

    async def go() -> list[Any]:
        client = connected(redis_url)[1]()
        await client.exchange([echo("open")])
        calls = [asyncio.ensure_future(client.exchange([echo(i)])) for i in range(50)]
        await asyncio.sleep(0)
        for call in calls[::3]:
            call.cancel()
        results = await asyncio.gather(*calls, return_exceptions=True)
        results.append(await client.exchange([echo("last")]))
        await client.aclose()
        return results

    *results, last = asyncio.run(go())

    for i, result in enumerate(results):
        assert isinstance(result, asyncio.CancelledError) if i % 3 == 0 else result == [str(i).encode()]
    assert last == [b"last"]


def test_a_server_that_does_not_answer_costs_one_timeout(redis_url: str) -> None:
    """I8: everybody who waits is told within `redis_timeout`, and a server that answers again is used again."""

    async def go(proxy: Proxy, client: AsyncLaneClient) -> None:
        await client.exchange([echo(1)])
        proxy.deaf()
        loop = asyncio.get_running_loop()
        started = loop.time()
        results = await asyncio.gather(*(client.exchange([echo(i)]) for i in range(20)), return_exceptions=True)
        assert all(isinstance(result, redis.TimeoutError) for result in results)
        assert loop.time() - started < 2 * SHORT.redis_timeout
        proxy.heal()
        assert await client.exchange([echo("again")]) == [b"again"]
        await client.aclose()

    with proxied(redis_url) as (proxy, url):
        client, make_async = connected(url)
        assert client.exchange([echo(1)]) == [b"1"]
        asyncio.run(go(proxy, make_async()))
        proxy.deaf()
        with pytest.raises(redis.TimeoutError):
            client.exchange([echo(2)])
        proxy.heal()
        # The late reply of the one before must not be taken for this one's.
        assert client.exchange([echo(3)]) == [b"3"]
        client.close()


def test_connections_that_the_server_has_closed_are_made_anew(redis_url: str) -> None:
    """Idle connections that have all died cost a repeated call, not an outage, whatever the number of them."""
    client, make_async = connected(redis_url, TieredConfig(redis_retries=1))
    barrier = threading.Barrier(8)

    def at_once(number: int) -> list[Any]:
        barrier.wait()
        return [
            client.exchange([("EVAL", "for i = 1, 200000 do end return ARGV[1]", 0, str(number))]) for _ in range(3)
        ]

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(at_once, range(8)))
    assert len(client._idle) > 1
    kill_clients(redis_url)
    assert client.exchange([echo(1)]) == [b"1"]

    async def go() -> None:
        client = make_async()
        await client.exchange([echo(1)])
        kill_clients(redis_url)
        assert await client.exchange([echo(2)]) == [b"2"]
        kill_clients(redis_url)
        await asyncio.sleep(0.05)  # the loop has noticed
        assert await client.exchange([echo(3)]) == [b"3"]
        await client.aclose()

    asyncio.run(go())
    client.close()


def test_a_lost_connection_is_an_error_when_nothing_may_be_repeated(redis_url: str) -> None:
    """With `redis_retries=0`, whoever waits when the connection breaks is told so."""

    async def go(proxy: Proxy, client: AsyncLaneClient) -> None:
        await client.exchange([echo(1)])
        proxy.deaf()
        call = asyncio.ensure_future(client.exchange([echo(2)]))
        await asyncio.sleep(0.05)
        proxy.cut()
        with pytest.raises(redis.ConnectionError):
            await call
        proxy.heal()
        assert await client.exchange([echo(3)]) == [b"3"]
        await client.aclose()

    with proxied(redis_url) as (proxy, url):
        client, make_async = connected(url, TieredConfig(redis_retries=0, redis_timeout=5))
        asyncio.run(go(proxy, make_async()))
        client.exchange([echo(1)])
        proxy.cut()
        with pytest.raises(redis.ConnectionError):
            client.exchange([echo(2)])
        assert client.exchange([echo(3)]) == [b"3"]
        client.close()


def test_a_retired_connection_ends_when_its_last_reply_has_come(redis_url: str) -> None:
    """Reconnecting leaves what is under way alone; later calls use another connection, so the guard is asked."""

    async def go() -> None:
        client = connected(redis_url, TieredConfig())[1]()
        (before,) = await client.exchange([("CLIENT", "ID")])
        slow = [asyncio.ensure_future(client.exchange([echo(f"{i}" * 50_000)])) for i in range(20)]
        await asyncio.sleep(0)
        await client.retire()
        (after,) = await client.exchange([("CLIENT", "ID")])
        assert after != before
        assert await asyncio.gather(*slow) == [[f"{i}".encode() * 50_000] for i in range(20)]
        await client.aclose()

    asyncio.run(go())


def test_loops_that_end_without_closing_leave_nothing_behind(redis_url: str) -> None:
    """A loop that is closed with its client open, and a client that is used after `aclose`, make no noise."""
    make_async = connected(redis_url, TieredConfig())[1]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loop = asyncio.new_event_loop()
        client = make_async()
        assert loop.run_until_complete(client.exchange([echo(1)])) == [b"1"]
        loop.run_until_complete(client.aclose())
        assert loop.run_until_complete(client.exchange([echo(2)])) == [b"2"]
        loop.run_until_complete(client.aclose())
        loop.close()
        del client
        gc.collect()
    assert [str(warning.message) for warning in caught if "Redis" in str(warning.message)] == []
