"""Conversations that grow: what a step sends and stores is what it added, and everybody reads the whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from langchain_core.messages import AIMessage, AnyMessage, HumanMessage
from langgraph.checkpoint.base.id import uuid6

from langgraph_tiered_saver import TieredSaver
from langgraph_tiered_saver.codec import LEAST_DELTA_BASE
from langgraph_tiered_saver.recent import ChannelKey, RecentValues, StoredValue

if TYPE_CHECKING:
    from collections.abc import Callable

    from langchain_core.runnables import RunnableConfig

_NUMBERS = iter(range(10**9))


def said(length: int = 400) -> AnyMessage:
    """A new message of some length."""
    number = next(_NUMBERS)
    kind = AIMessage if number % 2 else HumanMessage
    return kind(f"{number} " + "".join(chr(97 + number * i % 26) for i in range(length)), id=f"message-{number}")


class Talk:
    """A thread whose steps hand over all messages, as LangGraph does."""

    def __init__(self, thread_id: str) -> None:
        self.thread_id = thread_id
        self.at: RunnableConfig = {"configurable": {"thread_id": thread_id, "checkpoint_ns": ""}}
        self.versions: dict[str, Any] = {}
        self.history: list[tuple[RunnableConfig, list[AnyMessage]]] = []

    def put(self, saver: TieredSaver, messages: list[AnyMessage], *, parent: RunnableConfig | None = None) -> None:
        """Store a step."""
        version = saver.get_next_version(self.versions.get("messages"), None)
        self.versions = {"messages": version}
        checkpoint: Any = {
            "v": 4,
            "id": str(uuid6(clock_seq=len(self.history))),
            "ts": "2026-01-01T00:00:00+00:00",
            "channel_values": {"messages": messages},
            "channel_versions": self.versions,
            "versions_seen": {},
            "updated_channels": ["messages"],
        }
        self.at = saver.put(parent or self.at, checkpoint, {"source": "loop", "step": len(self.history)}, self.versions)
        self.history.append((self.at, list(messages)))

    def latest(self, saver: TieredSaver) -> list[AnyMessage]:
        """Read the latest messages."""
        found = saver.get_tuple({"configurable": {"thread_id": self.thread_id}})
        assert found is not None
        messages: list[AnyMessage] = found.checkpoint["channel_values"]["messages"]
        return messages

    def check_history(self, saver: TieredSaver) -> None:
        """Read every step by its id."""
        for at, messages in self.history:
            found = saver.get_tuple(at)
            assert found is not None
            assert found.checkpoint["channel_values"]["messages"] == messages


EDITS = ("append", "append", "append", "append", "last", "middle", "trim", "clear", "same", "fork", "other", "forget")


@pytest.mark.parametrize("storage", ["standard", "compact"])
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_edits_by_any_process_come_back(
    make_saver: Callable[..., TieredSaver], storage: str, data: st.DataObject
) -> None:
    """I2, I6: whatever happens to a long list, from two savers in turn, the latest and every earlier step are whole."""
    savers = [make_saver(storage=storage, reuse_memory_bytes=2**20 * (i % 2)) for i in range(2)]
    talk = Talk(f"thread-{next(_NUMBERS)}")
    messages = [said() for _ in range(data.draw(st.integers(8, 30)))]
    saver = savers[0]
    talk.put(saver, messages)
    for edit in data.draw(st.lists(st.sampled_from(EDITS), min_size=5, max_size=45)):
        parent = None
        if edit == "append":
            messages = [*messages, *(said() for _ in range(data.draw(st.integers(1, 3))))]
        elif edit == "last" and messages:
            messages = [*messages[:-1], said()]
        elif edit == "middle" and messages:
            place = data.draw(st.integers(0, len(messages) - 1))
            messages = [*messages[:place], said(), *messages[place + 1 :]]
        elif edit == "trim":
            messages = messages[data.draw(st.integers(0, 3)) :]
        elif edit == "clear":
            messages = [said(6000)]
        elif edit == "fork":
            parent, messages = data.draw(st.sampled_from(talk.history))
            messages = [*messages, said()]
        elif edit == "other":
            saver = savers[saver is savers[0]]
        elif edit == "forget":
            saver._source.current().recent = RecentValues(2**20)
        talk.put(saver, messages, parent=parent)
        if data.draw(st.booleans()):
            assert talk.latest(savers[data.draw(st.integers(0, 1))]) == messages
    assert [talk.latest(each) for each in savers] == [messages, messages]
    for each in savers:
        each.flush()
    talk.check_history(savers[1])


def test_a_step_sends_what_it_added(make_saver: Callable[..., TieredSaver], redis_url: str) -> None:
    """A step of a long conversation sends the new message and its own fields, also after the hot value is folded."""
    import redis

    saver = make_saver()
    talk = Talk("long")
    messages = [said() for _ in range(500)]
    talk.put(saver, messages)
    sizes = []
    with redis.Redis.from_url(redis_url) as client:
        for _ in range(40):
            messages = [*messages, said()]
            before = client.info("stats")["total_net_input_bytes"]
            talk.put(saver, messages)
            sizes.append(client.info("stats")["total_net_input_bytes"] - before)
    sizes.sort()

    # Other tests' savers may talk to the same server meanwhile.
    assert sizes[len(sizes) // 2] < 4_000
    assert talk.latest(saver) == messages


def test_the_first_step_of_another_process_is_small_too(make_saver: Callable[..., TieredSaver]) -> None:
    """A process that resumes a thread knows by its read what the next step adds."""
    first, second = make_saver(), make_saver()
    talk = Talk("resumed")
    messages = [said() for _ in range(100)]
    talk.put(first, messages)
    first.flush()
    messages = [*talk.latest(second), said()]
    before = second.stats().backlog_bytes + second.stats().flushed_bytes
    talk.put(second, messages)
    second.flush()
    after = second.stats().backlog_bytes + second.stats().flushed_bytes

    assert 0 < after - before < 3_000
    assert talk.latest(first) == messages


def test_no_deltas_when_memory_is_not_given(make_saver: Callable[..., TieredSaver]) -> None:
    """`delta_memory_bytes=0` sends whole values."""
    saver = make_saver(delta_memory_bytes=0)
    talk = Talk("whole")
    messages = [said() for _ in range(50)]
    for _ in range(3):
        messages = [*messages, said()]
        talk.put(saver, messages)
    saver.flush()

    assert saver.stats().flushed_bytes > 3 * 50 * 400
    talk.check_history(saver)


def test_recent_values_are_bounded() -> None:
    """I8: the values that are kept for deltas never take more than they may; those used last stay."""
    recent = RecentValues(100_000)
    keys = [ChannelKey("thread", "", str(i)) for i in range(40)]
    for key in keys:
        recent.put(key, StoredValue("1", "msgpack", b"x" * 10_000))
        recent.get(keys[0])
        assert recent.bytes <= 100_000
    assert recent.get(keys[0]) is not None
    assert recent.get(keys[1]) is None
    recent.put(keys[0], StoredValue("2", "msgpack", b"x" * 200_000))
    assert recent.get(keys[0]) is None
    assert LEAST_DELTA_BASE < 10_000
    recent.drop_thread("thread")
    assert recent.bytes == 0


def test_nothing_is_kept_of_a_deleted_thread(make_saver: Callable[..., TieredSaver]) -> None:
    """I8: what memory holds of a conversation goes with it, here and in the flusher."""
    saver = make_saver()
    talk = Talk("deleted")
    messages = [said() for _ in range(50)]
    for _ in range(3):
        messages = [*messages, said()]
        talk.put(saver, messages)
    saver.flush()
    runtime = saver._source.current()
    assert runtime.recent.bytes > 0
    assert runtime.flusher._recent.bytes > 0

    saver.delete_thread("deleted")

    assert runtime.recent.bytes == 0
    assert runtime.flusher._recent.bytes == 0
