"""Processes that die at each named crash point, twice in a row: whoever comes next finds all that was acknowledged."""

from __future__ import annotations

import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Protocol

import psycopg
import pytest

from langgraph_tiered_saver import TieredSaver, crash_points
from tests.fault.crash_workers import Child, resume
from tests.fault.stack import RedisServer
from tests.fault.workers import (
    Acked,
    Chain,
    Place,
    address,
    assert_durable,
    read_rows,
    unflushed,
    values_of,
    writes_of,
)
from tests.support import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

# What makes a saver notice at once whatever there is to notice.
QUICK = {"poll_interval": 0.1, "shard_count": 4}
ADOPTING = {**QUICK, "sweep_interval": 0.2, "orphan_grace": 0.3}
# What makes a process keep its records in memory until somebody calls `flush`, and never look at anybody else's.
HOLDING = {**QUICK, "flush_linger": 3600.0, "sweep_interval": 0.0}
THREADS = ["red", "grün: {a}/b"]
GONE = "gone"
HELD = "held"

# Where the first child dies, and how it is set; and the second one, which meets what the first one left.
# A number says the how-manieth time: late enough that there is something to lose.
DEATHS: list[tuple[str, dict[str, Any], str, dict[str, Any]]] = [
    ("before_journal:20", HOLDING, "after_begin", ADOPTING),
    ("after_journal:20", HOLDING, "in_adoption", ADOPTING),
    ("after_begin:4", ADOPTING, "after_commit:2", ADOPTING),
    ("after_commit:4", ADOPTING, "after_acknowledgement", ADOPTING),
    ("after_acknowledgement:4", ADOPTING, "before_journal:9", HOLDING),
    ("in_adoption", ADOPTING, "after_journal:9", HOLDING),
    ("before_delete", HOLDING, "after_delete", ADOPTING),
    ("after_delete", HOLDING, "before_delete", ADOPTING),
]
# The same for those who empty Redis. Where nobody else lives, it is they who prepare and open the generation.
LONELY_DEATHS = [
    ("generation_prepared", True, "generation_opened", False),
    ("generation_opened", True, "generation_prepared", True),
]


def names(points: Sequence[str]) -> set[str]:
    """Strip the counts off."""
    return {point.partition(":")[0] for point in points}


def test_every_point_is_covered() -> None:
    """Each point that the code names kills a first and a second process in this module."""
    pairs = [(first, second) for first, _, second, _ in [*DEATHS, *LONELY_DEATHS]]
    for points in zip(*pairs, strict=True):
        assert {*names(points), "generation_started"} == set(crash_points.POINTS)


# --- where everybody meets ------------------------------------------------------------------------------------------


class Scene:
    """A place with nothing in it, what was acknowledged there, and who has died there."""

    def __init__(self, place: Place, stack: ExitStack, *, asynchronous: bool) -> None:
        self.place = place
        self.stack = stack
        self.asynchronous = asynchronous
        self.acked: list[Acked] = []
        self.deleted = False
        self._children = 0
        place.directory.mkdir()

    def open(self, **settings: Any) -> TieredSaver:
        """Make a saver that is closed after the test."""
        place = self.place
        saver = TieredSaver.from_conn_string(
            place.redis_url, place.postgres_url, **{"key_prefix": place.key_prefix, **settings}
        )
        self.stack.callback(saver.close)
        return saver

    def write(self, saver: TieredSaver, *threads: str, steps: int = 2) -> None:
        """Write some steps to some threads."""
        for thread_id in threads:
            chain = resume(Chain(saver, thread_id), saver.get_tuple(address(thread_id)))
            for _ in range(steps):
                self.acked += [chain.put(), chain.write()]

    def leave_orphans(self) -> None:
        """Write to every thread, and be gone before anything is flushed."""
        saver = self.open(**HOLDING, close_timeout=0.0)
        self.write(saver, *THREADS, GONE)
        saver.close()

    def kill(self, point: str, settings: dict[str, Any], **options: Any) -> None:
        """Start a child that goes on with the threads and deletes one, and wait until it has died."""
        self._children += 1
        options = {"threads": THREADS, "asynchronous": self.asynchronous, "settings": settings, **options}
        child = Child(self.place, f"child-{self._children}", point, **options)
        self.stack.callback(child.end)
        child.die()
        self.acked += child.acked()
        self.deleted |= ["deleted", GONE] in child.reports() or bool({point} & {"before_delete", "after_delete"})

    # --- what must be there afterwards -------------------------------------------------------------------------------

    def check(self, holder: TieredSaver | None = None) -> None:
        """Take over: everything that was acknowledged is there, and the threads go on.

        Args:
            holder: A saver that has lived all the time.
        """
        saver = self.open(**ADOPTING)
        self.check_latest(saver)
        self.write(saver, *{record.thread_id for record in self.acked} - {GONE})
        if holder is not None:
            holder.flush()
        wait_until(lambda: not unflushed(self.place.redis_url, self.place.key_prefix), 20, "every journal is flushed")
        saver.flush()

        kept = [record for record in self.acked if record.thread_id != GONE or not self.deleted]
        assert_durable(self.place.postgres_url, kept)
        self.check_latest(saver)
        self.check_order(saver)
        self.check_references()
        if self.deleted:
            rows = read_rows(self.place.postgres_url)
            assert [row for table in rows.values() for row in table if row[0] == GONE] == []
        assert saver.stats().lost_records == 0

    def check_latest(self, saver: TieredSaver) -> None:
        """I1, I6, I9: each thread's latest is the last acknowledged checkpoint, or the one of the call that died."""
        written = {record[1:] for record in self.acked if record.kind == "writes"}
        last = {record.thread_id: record for record in self.acked if record.kind == "put"}
        for thread_id, record in last.items():
            found = saver.get_tuple(address(thread_id))
            if thread_id == GONE and self.deleted:
                assert found is None
                continue
            assert found is not None
            step = found.checkpoint["channel_values"]["step"]
            assert step in (record.step, record.step + 1)
            assert found.checkpoint["channel_values"] == values_of(thread_id, step)
            if step == record.step and record[1:] in written:
                assert found.pending_writes == [(f"task-{step}", *write) for write in writes_of(thread_id, step)]

    def check_order(self, saver: TieredSaver) -> None:
        """I3, I4: each thread is one line of steps without a gap or a fork, and each row is there once."""
        rows = read_rows(self.place.postgres_url)
        for thread_id in {record.thread_id for record in self.acked} - ({GONE} if self.deleted else set()):
            line = list(saver.list(address(thread_id)))
            steps = [at.checkpoint["channel_values"]["step"] for at in line]
            assert steps == list(range(len(line) - 1, -1, -1))
            parents = [at.parent_config and at.parent_config["configurable"]["checkpoint_id"] for at in line]
            assert parents == [*(at.checkpoint["id"] for at in line[1:]), None]
            count = {table: sum(row[0] == thread_id for row in found) for table, found in rows.items()}
            # One blob of "log" at every step, and one of "constant".
            assert (count["checkpoints"], count["checkpoint_blobs"]) == (len(line), len(line) + 1)

    def check_references(self) -> None:
        """I2: every blob that a checkpoint was put with is there."""
        with psycopg.connect(self.place.postgres_url) as connection:
            assert connection.execute(MISSING_BLOBS).fetchall() == []


# Checkpoints with fewer blobs than they were put with.
MISSING_BLOBS = """
SELECT thread_id, checkpoint_id, tiered_blobs FROM checkpoints AS c WHERE tiered_blobs > (
    SELECT count(*) FROM jsonb_each_text(checkpoint -> 'channel_versions') AS named
    JOIN checkpoint_blobs AS b ON (b.thread_id, b.checkpoint_ns, b.channel, b.version)
        = (c.thread_id, c.checkpoint_ns, named.key, named.value))"""


class Play(Protocol):
    """Plays one story with sync and with async children, at the same time and in separate places."""

    def __call__(self, story: Callable[[Scene], None], *, own_redis: bool = False) -> None: ...


@pytest.fixture
def both_ways(redis_url: str, make_database: Callable[[], str], tmp_path: Path) -> Play:
    """A function that plays stories."""

    def play(story: Callable[[Scene], None], *, own_redis: bool = False) -> None:
        def run(asynchronous: bool, postgres_url: str) -> None:
            with ExitStack() as stack:
                url = stack.enter_context(RedisServer()).url if own_redis else redis_url
                directory = tmp_path / ("async" if asynchronous else "sync")
                place = Place(url, postgres_url, f"test-{uuid.uuid4().hex}", directory)
                story(Scene(place, stack, asynchronous=asynchronous))

        with ThreadPoolExecutor(2) as executor:
            stories = [executor.submit(run, asynchronous, make_database()) for asynchronous in (False, True)]
        for one in stories:
            one.result()

    return play


# --- the stories ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "settings", "second", "then"), DEATHS, ids=[f"{first}-{second}" for first, _, second, _ in DEATHS]
)
def test_killed_twice_in_a_row(
    first: str, settings: dict[str, Any], second: str, then: dict[str, Any], both_ways: Play
) -> None:
    """I1-I6, I9: a process dies among orphans, and so does the one that takes over; nothing is lost or comes back."""

    def story(scene: Scene) -> None:
        holder = scene.open(**HOLDING)
        scene.write(holder, HELD, GONE)
        scene.leave_orphans()
        scene.kill(first, settings, deletes=GONE)
        scene.kill(second, then, steps=0, deletes=None if scene.deleted else GONE)
        assert scene.deleted
        scene.check(holder)

    both_ways(story)


def test_killed_when_a_generation_was_started(both_ways: Play) -> None:
    """I1, I6: the one who found Redis empty dies at once, twice; who lives brings what he holds, and goes on."""

    def story(scene: Scene) -> None:
        holder = scene.open(**HOLDING)
        holder.setup()
        for number in (1, 2):
            wait_until(lambda number=number: holder.stats().generation == number, message="Redis is trusted again")
            scene.write(holder, HELD)
            # Once Redis is empty, these are in this process's memory alone.
            assert holder.stats().backlog_records == 4
            scene.kill("generation_started", QUICK, wipes=True)
        scene.check(holder)

    both_ways(story, own_redis=True)


@pytest.mark.parametrize(
    ("first", "wipes", "second", "wipes_again"),
    LONELY_DEATHS,
    ids=[f"{death[0]}-{death[2]}" for death in LONELY_DEATHS],
)
def test_killed_while_a_generation_is_opened(
    first: str, wipes: bool, second: str, wipes_again: bool, both_ways: Play
) -> None:
    """I1, I2, I6: whatever is done of a generation's opening, the next process finishes it, and trusts no less."""

    def story(scene: Scene) -> None:
        scene.leave_orphans()
        with scene.open(**QUICK) as saver:
            saver.delete_thread(GONE)
        scene.deleted = True
        scene.kill(first, QUICK, wipes=wipes)
        scene.kill(second, QUICK, wipes=wipes_again)
        scene.check()

    both_ways(story, own_redis=True)


def test_killed_while_it_is_set_up(both_ways: Play) -> None:
    """I1: the first processes of an installation die while they open its first generation."""

    def story(scene: Scene) -> None:
        scene.kill("generation_prepared", QUICK)
        scene.kill("generation_opened", QUICK)
        scene.kill("after_commit:2", QUICK)
        scene.check()

    both_ways(story)
