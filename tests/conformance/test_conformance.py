"""The official conformance suite, in each write mode, on two tiers and with the hot tier gone at every step."""

from __future__ import annotations

import asyncio
import itertools
from typing import TYPE_CHECKING, Any

import pytest
import redis
from langgraph.checkpoint.conformance import checkpointer_test, validate
from langgraph.checkpoint.conformance.capabilities import (
    BASE_CAPABILITIES,
    EXTENDED_CAPABILITIES,
    Capability,
    DetectedCapabilities,
)
from langgraph.checkpoint.conformance.report import ProgressCallbacks

from langgraph_tiered_saver import TieredSaver

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable

    from langgraph.checkpoint.conformance.report import CapabilityReport

# Tests of the suite as of 0.0.2; a later version may add some.
LEAST_TESTS = {
    Capability.PUT: 17,
    Capability.PUT_WRITES: 10,
    Capability.GET_TUPLE: 10,
    Capability.LIST: 16,
    Capability.DELETE_THREAD: 5,
    Capability.DELETE_FOR_RUNS: 7,
    Capability.COPY_THREAD: 8,
    Capability.PRUNE: 8,
}


class EvictedSaver(TieredSaver):
    """A saver whose hot hashes are evicted before each call; the journal and all else stay."""

    redis_url: str
    evicted = 0

    def evict(self) -> None:
        with redis.Redis.from_url(self.redis_url) as client:
            names = list(client.scan_iter(match=f"{{{self.config.key_prefix}:*}}:hot:*", count=1000))
            if names:
                self.evicted += int(client.delete(*names))

    async def aput(self, *arguments: Any, **keywords: Any) -> Any:
        self.evict()
        return await super().aput(*arguments, **keywords)

    async def aput_writes(self, *arguments: Any, **keywords: Any) -> None:
        self.evict()
        await super().aput_writes(*arguments, **keywords)

    async def aget_tuple(self, *arguments: Any, **keywords: Any) -> Any:
        self.evict()
        return await super().aget_tuple(*arguments, **keywords)

    async def alist(self, *arguments: Any, **keywords: Any) -> AsyncIterator[Any]:
        self.evict()
        async for found in super().alist(*arguments, **keywords):
            yield found

    async def adelete_thread(self, *arguments: Any, **keywords: Any) -> None:
        self.evict()
        await super().adelete_thread(*arguments, **keywords)

    async def adelete_for_runs(self, *arguments: Any, **keywords: Any) -> None:
        self.evict()
        await super().adelete_for_runs(*arguments, **keywords)

    async def acopy_thread(self, *arguments: Any, **keywords: Any) -> None:
        self.evict()
        await super().acopy_thread(*arguments, **keywords)

    async def aprune(self, *arguments: Any, **keywords: Any) -> None:
        self.evict()
        await super().aprune(*arguments, **keywords)


def run_suite(make: Callable[[], TieredSaver]) -> tuple[CapabilityReport, list[str]]:
    """Run the whole suite, with a saver of its own for each capability, and give its report and its failures."""
    failures: list[str] = []

    @checkpointer_test(name="TieredSaver")
    async def checkpointer() -> AsyncGenerator[TieredSaver, None]:
        async with make() as saver:
            yield saver

    def note(capability: str, test: str, passed: bool, error: str | None) -> None:
        if not passed:
            failures.append(f"{capability} {test}: {error}")

    return asyncio.run(validate(checkpointer, progress=ProgressCallbacks(on_test_result=note))), failures


def assert_full(report: CapabilityReport, failures: list[str]) -> None:
    """Every capability was found and tested, and every test passed."""
    assert failures == []
    assert report.conformance_level() == "FULL"
    assert set(report.results) == {capability.value for capability in BASE_CAPABILITIES | EXTENDED_CAPABILITIES}
    for name, result in report.results.items():
        assert (result.detected, result.passed, result.tests_failed, result.tests_skipped) == (True, True, 0, 0), name
        assert result.tests_passed >= LEAST_TESTS[Capability(name)], name


@pytest.mark.parametrize("settings", [{}, {"write_mode": "through"}, {"hot_ttl": None}], ids=str)
def test_conformance_is_full(
    redis_url: str, make_database: Callable[[], str], key_prefix: str, settings: dict[str, Any]
) -> None:
    """The saver has every capability, base and extended, and each passes all of its tests."""
    number = itertools.count()

    def make() -> TieredSaver:
        prefix = f"{key_prefix}-{next(number)}"
        return TieredSaver.from_conn_string(redis_url, make_database(), key_prefix=prefix, **settings)

    report, failures = run_suite(make)

    assert_full(report, failures)


@pytest.mark.parametrize("write_mode", ["behind", "through"])
def test_conformance_is_full_while_nothing_stays_hot(
    redis_url: str, make_database: Callable[[], str], key_prefix: str, write_mode: Any
) -> None:
    """I6, I9: the same holds if every hot hash is evicted before every call."""
    number = itertools.count()
    made: list[EvictedSaver] = []

    def make() -> TieredSaver:
        prefix = f"{key_prefix}-{next(number)}"
        saver = EvictedSaver.from_conn_string(redis_url, make_database(), key_prefix=prefix, write_mode=write_mode)
        saver.redis_url = redis_url
        made.append(saver)
        return saver

    report, failures = run_suite(make)

    assert_full(report, failures)
    assert all(saver.evicted for saver in made)


def test_every_capability_is_detected_on_the_class_itself() -> None:
    """The suite asks the class which methods it has; a base class's stub would be skipped in silence."""
    saver = TieredSaver.from_conn_string("redis://localhost", "postgresql://localhost/none")

    assert DetectedCapabilities.from_instance(saver).missing == frozenset()
