"""Single sequences of the kind that `test_planner_machine` searches for, each of which has lost something once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from langgraph_tiered_saver.errors import HotTierUnavailableError
from langgraph_tiered_saver.hot import tier
from tests.fault.crash_workers import resume
from tests.fault.simulation import POLL, Outcome, Process, World, new_world
from tests.fault.workers import Acked, Chain, address, values_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from langgraph_tiered_saver import TieredSaver
    from langgraph_tiered_saver.embedded import EmbeddedServers

READS: dict[str, Callable[[TieredSaver, Acked], Any]] = {
    # Each gives the newest checkpoint's id.
    "the latest": lambda saver, _: saver.get_tuple(address("red")),
    "one by its id": lambda saver, newest: saver.get_tuple(address("red", newest.checkpoint_id)),
    "a list": lambda saver, _: next(saver.list(address("red"), limit=1), None),
    "a list of everything": lambda saver, _: next(saver.list(None, limit=1), None),
    "whether it is durable": lambda saver, newest: saver.wait_durable(address("red", newest.checkpoint_id)),
}

READ_STEPS = """
SELECT (checkpoint -> 'channel_values' ->> 'step')::int AS step FROM checkpoints
WHERE thread_id = %s AND checkpoint_ns = %s ORDER BY checkpoint_id"""


@pytest.fixture(scope="module")
def module_world(servers: EmbeddedServers) -> Iterator[World]:
    """One world for all tests of this module."""
    with new_world(servers.postgres_url) as world:
        yield world


@pytest.fixture
def world(module_world: World) -> World:
    """The world, with nothing in it."""
    module_world.begin()
    return module_world


def call(process: Process, work: Callable[[], Any]) -> Any:
    """Let a client of a process make a call, which must return."""
    task = process.start("call", work)
    task.run()
    for _ in range(10):
        if not task.done:
            process.world.pass_time(POLL)
    assert task.done, f"{task} does not end"
    if task.error is not None:
        raise task.error
    return task.result


def chain(process: Process, thread_id: str = "red", checkpoint_ns: str = "") -> Chain:
    """Go on with a thread where it stands."""
    new = Chain(process.saver, thread_id, checkpoint_ns=checkpoint_ns)
    return resume(new, call(process, lambda: process.saver.get_tuple(address(thread_id, checkpoint_ns=checkpoint_ns))))


def lose_redis(*processes: Process) -> None:
    """Let processes notice that Redis cannot be reached."""
    for process in processes:
        process.reaches_redis = False
        process.start("read", lambda process=process: process.saver.get_tuple(address("other"))).run()
        assert process.runtime.hot is None


def settle(world: World) -> None:
    """Let everything work again, and flush what is left anywhere."""
    world.redis_is_up = world.postgres_is_up = True
    for process in world.processes:
        process.reaches_redis = process.reaches_postgres = True
    world.pass_time(4 * POLL)
    for process in world.processes:
        process.adopting().run()
    world.pass_time(POLL)


def check_durable(world: World, acked: list[Acked], checkpoint_ns: str = "") -> None:
    """I1, I2: PostgreSQL has each record whole."""
    reader = world.start()
    for record in acked:
        found = call(
            reader,
            lambda record=record: reader.saver.get_tuple(
                address(record.thread_id, record.checkpoint_id, checkpoint_ns)
            ),
        )
        assert found is not None
        assert found.checkpoint["channel_values"] == values_of(record.thread_id, record.step)


def test_an_orphan_survives_what_was_flushed_from_memory_after_it(world: World) -> None:
    """I1: what one process flushes without a look at the journal says nothing of the records before it."""
    dead, alive = world.start(), world.start()
    acked = [call(dead, chain(dead).put)]
    world.kill(dead)
    line = chain(alive)
    acked.append(call(alive, line.put))
    lose_redis(alive)
    alive.flushing().run()
    alive.reaches_redis = True
    alive.checking().run()
    assert alive.runtime.health._trusted == 1, "Redis is trusted again in the same generation"

    acked.append(call(alive, line.put))
    alive.flushing().run()

    settle(world)
    check_durable(world, acked)


def test_an_orphan_survives_a_flush_during_which_redis_came_back(world: World) -> None:
    """I1: the same, where Redis is trusted again between a flush and its acknowledgement."""
    dead, alive = world.start(), world.start()
    acked = [call(dead, chain(dead).put)]
    world.kill(dead)
    acked.append(call(alive, chain(alive).put))
    lose_redis(alive)
    alive.flushing().run(0)
    alive.reaches_redis = True
    alive.checking().run()
    assert alive.runtime.hot is not None
    alive.flushing().run()

    settle(world)
    check_durable(world, acked)


def test_a_prune_leaves_what_came_before_it(world: World) -> None:
    """I1: a prune that is flushed from memory, before another process's earlier record, does not make that void."""
    writer, pruner = world.start(), world.start()
    acked = [call(writer, chain(writer).put)]
    task = pruner.start("prune", lambda: pruner.saver.prune(["red"]))
    task.run()
    lose_redis(writer, pruner)

    pruner.flushing().run()
    writer.flushing().run()

    settle(world)
    assert task.done
    check_durable(world, acked)


def test_a_delete_leaves_what_came_after_it(world: World) -> None:
    """I1: a delete that could not wait for PostgreSQL, and is executed from memory, takes nothing that came later."""
    writer, deleter = world.start(), world.start()
    line = chain(writer)
    call(writer, line.put)
    world.postgres_is_up = False
    task = deleter.start("delete", lambda: deleter.saver.delete_thread("red"))
    task.run()
    world.pass_time(5 * POLL)
    assert task.error is not None
    acked = [call(writer, line.put)]
    lose_redis(writer, deleter)
    world.postgres_is_up = True

    writer.flushing().run()
    deleter.flushing().run()

    settle(world)
    check_durable(world, acked)


def hold(world: World) -> tuple[Process, Process, Chain, list[Acked]]:
    """Let one process hold what the journal has and PostgreSQL has not; what is hot of it does not answer a read.

    Returns:
        That process, another one that trusts Redis, the thread, and what was acknowledged of it.
    """
    writer, other = world.start(), world.start()
    line = chain(writer)
    acked = [call(writer, line.put)]
    writer.flushing().run()
    world.evict()
    acked.append(call(writer, line.put))
    call(other, lambda: other.saver.get_tuple(address("green")))
    return writer, other, line, acked


def check_until(world: World, is_so: Callable[[], Any], *processes: Process) -> None:
    """Let processes check and flush until something is so."""
    for _ in range(20):
        if is_so():
            return
        world.clock += POLL
        for process in world.processes:
            process.beat()
        for process in processes:
            process.checking().run()
            process.flushing().run()
    assert is_so()


@pytest.mark.parametrize("what", READS)
def test_a_read_does_not_take_a_journal_that_is_gone_for_a_flushed_one(world: World, what: str) -> None:
    """I6, I9: Redis is emptied, and keeps its run id, wherever a read or the flush that it waits for stands."""
    # Chaos seed 1105: a flush that found no journal any more told the read that PostgreSQL has everything.
    read = READS[what]
    for calls_of_read, calls_of_flush in [*((cut, None) for cut in range(8)), *((None, cut) for cut in range(8))]:
        world.begin()
        _, reader, _, acked = hold(world)
        task = reader.start("read", lambda acked=acked, reader=reader: read(reader.saver, acked[-1]))
        task.run(calls_of_read)
        if calls_of_flush is not None:
            reader.flushing().run(calls_of_flush)

        world.wipe()
        reader.flushing().run()
        reader.go_on()

        for _ in range(10):
            if not task.done:
                world.pass_time(POLL)
        assert task.done
        if task.error is not None:
            raise task.error
        if what == "whether it is durable":
            assert len(world.postgres.execute(READ_STEPS, ("red", "")).fetchall()) == len(acked)
        else:
            assert task.result is not None, "I7: it is there"
            assert task.result.config == address("red", acked[-1].checkpoint_id)


@pytest.mark.parametrize("noticed", [False, True])
def test_a_prune_does_not_take_a_journal_that_is_gone_for_a_flushed_one(world: World, noticed: bool) -> None:
    """I1: a prune whose journal Redis lost makes no record void that its writer still holds."""
    _, pruner, _, acked = hold(world)
    task = pruner.start("prune", lambda: pruner.saver.prune(["red"]))
    task.run()
    flush = pruner.flushing()
    flush.run(0)
    world.wipe()
    if noticed:
        # By another call, between the flush's plan and its look at the journal.
        pruner.start("read", lambda: pruner.saver.get_tuple(address("other"))).run()
        assert pruner.runtime.hot is None

    flush.run()

    settle(world)
    assert task.done
    check_durable(world, acked[-1:])


def test_a_delete_is_not_given_up_unnoticed(world: World) -> None:
    """I5: a delete that returns was executed, though Redis lost its journal before anybody asked for its flush."""
    process = world.start(write_mode="through")
    call(process, chain(process).put)
    process.flushing().run()
    task = process.start("delete", lambda: process.saver.delete_thread("red"))
    task.run()
    world.wipe()
    process.start("read", lambda: process.saver.get_tuple(address("other"))).run()
    while not process.runtime.backlog.uses_journal:
        process.checking().run()

    task.run()
    process.flushing().run()
    process.go_on()

    assert not (task.done and world.postgres.execute(READ_STEPS, ("red", "")).fetchall())
    settle(world)
    assert task.done
    assert world.postgres.execute(READ_STEPS, ("red", "")).fetchall() == []


def test_what_is_acknowledged_during_a_flush_waits_for_the_next_one(world: World) -> None:
    """I1: a flush that found no journal releases nothing else, though a reply with an earlier number is late."""
    for calls in range(8):
        world.begin()
        process = world.start()
        line = chain(process)
        call(process, line.put)
        process.flushing().run()
        slow = process.start("put", line.put)
        slow.run(1)
        assert slow.at == "redis put is answered"
        call(process, Chain(process.saver, "red", checkpoint_ns="sub").put)
        flush = process.flushing()
        flush.run(0)
        world.wipe()
        flush.run(calls)
        slow.run()
        flush.run()

        settle(world)
        assert slow.done
        check_durable(world, [slow.result])


@pytest.mark.parametrize("calls", range(0, 40, 2))
def test_a_generation_is_opened_once(world: World, calls: int) -> None:
    """I6: who is late to open a generation does not make a Redis pass for whole that was emptied after the opening."""
    # Chaos, --only redis_flushall --only postgres_raise, seed 11.
    writer, other, line, acked = hold(world)
    lose_redis(writer, other)
    check_until(world, lambda: writer.runtime.health.closed == other.runtime.health.closed == 2, writer, other)
    writer.reaches_redis = other.reaches_redis = True
    world.clock += POLL
    late = other.checking()
    late.run(calls)
    check_until(world, lambda: writer.runtime.hot, writer)
    acked.append(call(writer, line.put))
    reader = world.start()
    call(reader, lambda: reader.saver.get_tuple(address("green")))
    assert reader.runtime.hot is not None

    world.wipe()
    late.run()

    for process in (reader, world.start()):
        found = call(process, lambda process=process: process.saver.get_tuple(address("red")))
        assert found.config == address("red", acked[-1].checkpoint_id)


def test_who_prepared_a_generation_that_another_one_opened(world: World) -> None:
    """I6: it does not open it a second time, however late it is, nor after Redis was emptied."""
    process = world.start()
    call(process, lambda: process.saver.get_tuple(address("red")))
    client, keyspace = process.runtime._make_probe(), world.keyspace
    late, first = (tier.prepare(client, keyspace, 2, 1, name) for name in ("late", "first"))
    assert world.redis.hget(keyspace.shard(0), "g") == b"1"

    for _ in range(2):
        tier.enter(client, keyspace, first)
        assert world.redis.hget(keyspace.shard(0), "g") == b"2"
    tier.restore_run_leases(client, keyspace, first, [("red", "token", 60_000_000)])
    with pytest.raises(HotTierUnavailableError):
        tier.enter(client, keyspace, late)
    with pytest.raises(HotTierUnavailableError):
        tier.restore_run_leases(client, keyspace, late, [])
    assert world.redis.hexists(keyspace.shard(0), "f:red")
    world.wipe()
    for prepared in (late, first):
        with pytest.raises(HotTierUnavailableError):
            tier.enter(client, keyspace, prepared)
    assert not world.redis.exists(keyspace.shard(0))


def test_redis_is_emptied_while_a_generation_is_opened(world: World) -> None:
    """I8: wherever that happens, Redis is trusted again a little later."""
    for calls in range(60):
        world.begin()
        process = world.start()
        task = process.start("read", lambda process=process: process.saver.get_tuple(address("red")))
        task.run(calls)
        world.wipe()
        task.run()
        process.start("read", lambda process=process: process.saver.get_tuple(address("red"))).run()
        world.pass_time(5 * POLL)

        assert process.runtime.hot is not None


def test_a_flush_that_asked_for_an_older_generation_ends_no_later_one(world: World) -> None:
    """I8: what a flush hears of a generation that has ended, it holds against no other one."""
    writer, reader, _, acked = hold(world)
    reader.start("read", lambda: reader.saver.get_tuple(address("red"))).run()
    flush = reader.flushing()
    flush.run(0)
    lose_redis(writer, reader)
    for process in (writer, reader):
        process.checking().run()
        process.reaches_redis = True
    check_until(world, lambda: writer.runtime.hot, writer)
    reader.checking().run()
    trusted = reader.runtime.hot
    assert trusted is not None
    assert trusted.generation == 2

    later = reader.start("read", lambda: list(reader.saver.list(address("red"))))
    later.run()
    flush.run()
    assert reader.runtime.hot is trusted

    reader.flushing().run()
    world.go_on()
    assert reader.runtime.hot is trusted
    assert later.done
    assert [one.config for one in later.result] == [address("red", one.checkpoint_id) for one in reversed(acked)]


def test_a_delta_needs_no_checkpoint_of_another_process(world: World) -> None:
    """I2: a checkpoint whose parent another process holds is whole, whatever was put to another namespace meanwhile."""
    one, other = world.start(), world.start()
    call(one, chain(one).put)
    line = chain(other)
    call(other, chain(other, checkpoint_ns="sub").put)
    acked = [call(other, line.put)]
    world.kill(one)
    world.wipe()

    settle(world)

    check_durable(world, acked)


def test_a_delta_needs_no_checkpoint_that_was_given_up(world: World) -> None:
    """I2: a put that failed after Redis had it is nobody's to flush; what comes after it is whole."""
    process = world.start()
    line = chain(process)
    call(process, line.put)
    world.pass_time(POLL)
    task = process.start("put", line.put)
    task.run(0, Outcome.UNANSWERED, stay=True)
    world.redis_is_up = world.postgres_is_up = False
    process.checking().run()
    task.run()
    world.pass_time(POLL)
    assert task.error is not None
    world.redis_is_up = True
    world.pass_time(POLL)
    assert process.runtime.hot is not None

    resumed = chain(process)
    assert resumed.step == line.step, "the put that failed is what a reader sees"
    acked = [call(process, resumed.put)]
    world.wipe()
    settle(world)

    check_durable(world, acked)


def test_a_delta_without_its_parent_is_not_shown(world: World) -> None:
    """I2: where memory could not keep the parent and Redis lost it, the child is not shown with channels missing."""
    process = world.start(max_memory_bytes=700)
    line = chain(process)
    call(process, line.put)
    call(process, line.put)
    kept = [entry.payload is not None for entry in process.runtime.backlog._queues["red"].entries]
    assert kept == [True, False]
    process.runtime.backlog._config = process.runtime.backlog._config.__class__(max_memory_bytes=10_000)
    call(process, line.put)
    world.wipe()

    settle(world)

    reader = world.start()
    for found in call(reader, lambda: list(reader.saver.list(address("red")))):
        assert found.checkpoint["channel_values"] == values_of("red", found.checkpoint["channel_values"]["step"])


def test_a_delete_returns_when_it_is_done(world: World) -> None:
    """I5: a delete that Redis has, and which a mishap of Redis interrupts, returns once PostgreSQL has executed it."""
    process = world.start()
    call(process, chain(process).put)
    process.flushing().run()
    task = process.start("delete", lambda: process.saver.delete_thread("red"))
    task.run()
    assert not task.done
    lose_redis(process)
    process.reaches_redis = True
    process.checking().run()
    world.go_on()
    process.go_on()

    rows = world.postgres.execute(READ_STEPS, ("red", "")).fetchall()
    assert not (task.done and rows)
    settle(world)
    assert task.done
    assert world.postgres.execute(READ_STEPS, ("red", "")).fetchall() == []
