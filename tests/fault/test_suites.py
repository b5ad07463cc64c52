"""The conformance suite and real graphs, while Redis is down and while PostgreSQL restarts every few seconds."""

from __future__ import annotations

import contextlib
import itertools
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from langgraph.checkpoint.memory import InMemorySaver

from langgraph_tiered_saver import TieredSaver
from tests.conformance.test_conformance import assert_full, run_suite
from tests.fault.stack import Stack
from tests.integration import graphs
from tests.support import wait_until

SETTINGS: dict[str, Any] = {"redis_timeout": 1.0, "poll_interval": 0.2, "close_timeout": 5.0}
RESTART_EVERY = 2.0  # seconds


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with Stack() as stack:
        yield stack


@pytest.fixture
def opened(stack: Stack, request: pytest.FixtureRequest) -> Iterator[Callable[[], TieredSaver]]:
    """A function that opens savers, each in a key prefix and a schema of its own, set up while all was well."""
    place = f"s{uuid.uuid4().hex}"
    made = []
    for number in range(8 if "conformance" in request.node.name else 1):
        name = f"{place}-{number}"
        urls = stack.redis.url, stack.postgres.url
        saver = TieredSaver.from_conn_string(*urls, key_prefix=name, postgres_schema=name, **SETTINGS)
        saver.setup()
        made.append(saver)
    numbers = itertools.count()
    yield lambda: made[next(numbers)]
    for saver in made:
        saver.close()


@contextlib.contextmanager
def redis_down(stack: Stack) -> Iterator[None]:
    stack.redis.kill()
    try:
        yield
    finally:
        stack.redis.start()


@contextlib.contextmanager
def postgres_restarting(stack: Stack) -> Iterator[None]:
    """Restart PostgreSQL at once, and again and again until the end; at least three times."""
    done = threading.Event()
    restarts = itertools.count()
    counted = 0

    def restart() -> None:
        nonlocal counted
        while not done.wait(RESTART_EVERY if counted else 0.1):
            stack.postgres.restart("immediate" if next(restarts) % 2 else "fast")
            counted += 1

    thread = threading.Thread(target=restart)
    thread.start()
    try:
        yield
        wait_until(lambda: counted >= 1)
    finally:
        done.set()
        thread.join()


FAULTS = {"Redis is down": redis_down, "PostgreSQL restarts": postgres_restarting}


@pytest.mark.parametrize("fault", FAULTS)
def test_conformance_is_full_all_the_while(fault: str, stack: Stack, opened: Callable[[], TieredSaver]) -> None:
    """No call of the official suite fails or answers otherwise."""
    with FAULTS[fault](stack):
        report, failures = run_suite(opened)

    assert_full(report, failures)


@pytest.mark.parametrize(("fault", "asynchronous"), [("Redis is down", False), ("PostgreSQL restarts", True)])
def test_graphs_do_what_they_would_in_memory(
    fault: str, asynchronous: bool, stack: Stack, opened: Callable[[], TieredSaver], tmp_path: Path
) -> None:
    """I6, I9: every graph of the suite begins and resumes with the results and side effects of an undisturbed run."""
    model = InMemorySaver()
    directories = tmp_path / "model", tmp_path / "found"
    for directory in directories:
        directory.mkdir()
    phases = ("begin", "resume")
    expected = [graphs.perform(phase, model, directories[0], asynchronous=asynchronous) for phase in phases]
    saver = opened()

    with FAULTS[fault](stack):
        found = [
            graphs.perform(phase, saver, directories[1], asynchronous=asynchronous) for phase in ("begin", "resume")
        ]

    assert [[name for name, one in phase.items() if "traceback" in one] for phase in found] == [[], []]
    assert graphs.normalised(found) == graphs.normalised(expected)
    saver.flush()
    assert saver.stats().lost_records == 0
