"""What every contestant stores: realistic messages, the steps of an agent that adds one at a time, and a real graph."""

from __future__ import annotations

import json
import random
import string
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypedDict

from langchain_core.messages import AIMessage, AnyMessage, HumanMessage, ToolMessage
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import ChannelVersions, Checkpoint, CheckpointMetadata
from langgraph.checkpoint.base.id import uuid6
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.graph import END, START, StateGraph
from langgraph.graph.message import add_messages

MESSAGE_BYTES = 410  # serialized; twenty make the 8 KB that the targets speak of
USUAL_MESSAGES = 20
NODES = ("agent", "tools")

_VOCABULARY = """
about above account across after again agent all also amount an and another answer any arrived as ask at back bank
because been before below between billing both box but by call came cancel card carrier case change charge check
choose city claim clear close code colour come company complete confirm contact copy correct cost could country
courier credit customer damaged date day days deliver delivery desk detail did different difficult direct discount do
document done door down during each early else email empty end enough error even every exactly exchange expected
express fact failed far few final find first follow for form found free friday from full further gave get give goes
good goods got had half hand happened has have he held hello help here high him his hold home hour house how however
if immediately important in inside instead invoice is issue item its just keep kept kind know label large last late
later least left less let letter like limit line list little local long look made mail make manager many may me mean
meet message might missing monday money month more morning most move much must my name near need never new next night
no not note nothing now number of off offer office often old on once one only open option or order other our out
outside over own package paid parcel part past pay payment people per person phone pick place please point policy
possible post present price problem process product promise put quarter question quick quite rather read ready reason
receipt received record refund region remaining repair replace reply report request return right said same saw say
scheduled second see seems sender sent service seven several shall she ship shipment shop short should show side sign
similar since single size small so some soon sorry stated status still stock stop store street such sunday support
sure system take tell ten than thank that the their them then there these they thing think third this those three
through thursday till time to today together told tomorrow too took total toward tracking transfer tried truck tuesday
turn two type under understand unit until up update upon us use usual value very view voucher wait want warehouse
warranty was way we wednesday week well went were what when where which while who whole why will window wish with
within without wrong year yes yesterday yet you your
"""
_WORDS = _VOCABULARY.split()

_SERDE = JsonPlusSerializer()


class Writer:
    """Writes messages: word salad with the numbers and codes of real ones, which does not compress away.

    The same seed writes the same messages.
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def messages(self, count: int, size: int = MESSAGE_BYTES) -> list[AnyMessage]:
        """Write a conversation of a human, an agent that calls tools, and the tools."""
        return [self._message(number, size) for number in range(count)]

    def text(self, length: int) -> str:
        """Write so many characters."""
        parts: list[str] = []
        written = 0
        while written < length:
            part = self._random.choice(_WORDS)
            if self._random.random() < 0.06:
                part = "".join(self._random.choices(string.ascii_uppercase + string.digits, k=9))
            if self._random.random() < 0.08:
                part += self._random.choice(",.?!")
            parts.append(part)
            written += len(part) + 1
        return " ".join(parts)[:length]

    def _message(self, number: int, size: int) -> AnyMessage:
        kind = ("human", "call", "tool", "answer")[number % 4]
        empty = self._with_text(kind, number, "")
        missing = size - len(_SERDE.dumps_typed([empty])[1])
        return self._with_text(kind, number, self.text(max(10, missing)))

    def _with_text(self, kind: str, number: int, text: str) -> AnyMessage:
        name, call = f"message-{number:05}", f"call-{number // 4:05}"
        if kind == "human":
            return HumanMessage(text, id=name)
        if kind == "tool":
            return ToolMessage(text, id=name, tool_call_id=call, name="look_up_order")
        arguments = {"order": f"A-{number:05}"}
        calls = [{"name": "look_up_order", "args": arguments, "id": call}] if kind == "call" else []
        return AIMessage(text, id=name, tool_calls=calls)


@dataclass(frozen=True)
class Step:
    """What LangGraph hands over after one superstep, and what the step's task wrote.

    Attributes:
        checkpoint: Holds the whole list of messages.
        metadata: Its metadata.
        new_versions: The channels that changed.
        writes: What the next superstep's task writes on this checkpoint.
    """

    checkpoint: Checkpoint
    metadata: CheckpointMetadata
    new_versions: ChannelVersions
    writes: Sequence[tuple[str, Any]]

    @property
    def messages(self) -> list[AnyMessage]:
        """The state."""
        found: list[AnyMessage] = self.checkpoint["channel_values"]["messages"]
        return found

    def rest(self) -> bytes:
        """The checkpoint without its messages, and the metadata, as JSON: what every saver stores beside them."""
        values = {**self.checkpoint["channel_values"]}
        del values["messages"]
        return json.dumps([{**self.checkpoint, "channel_values": values}, self.metadata]).encode()


class Conversation:
    """Steps of one agent, as LangGraph makes them: each appends one message and hands over the whole list."""

    def __init__(self, messages: Sequence[AnyMessage], first: int, *, window: int | None = None) -> None:
        """Begin.

        Args:
            messages: All that will ever be said.
            first: How many of them the first step has.
            window: Most messages in the state; older ones are dropped. None: it only grows.
        """
        self._messages = messages
        self._said = first - 1
        self._window = window
        self._step = 0
        self._versions: ChannelVersions = {"__start__": _version(1, 0)}
        self._seen: dict[str, ChannelVersions] = {"__input__": {}, "__start__": {"__start__": _version(1, 0)}}

    def step(self) -> Step:
        """Make the next step."""
        self._step += 1
        self._said += 1
        ran, runs = NODES[self._step % 2], NODES[(self._step + 1) % 2]
        if f"branch:to:{ran}" in self._versions:
            self._seen = {**self._seen, ran: {f"branch:to:{ran}": self._versions[f"branch:to:{ran}"]}}
        version = _version(self._step + 1, self._said)
        changed: ChannelVersions = dict.fromkeys(("messages", *(f"branch:to:{node}" for node in NODES)), version)
        self._versions = {**self._versions, **changed}
        first = 0 if self._window is None else max(0, self._said - self._window)
        checkpoint = Checkpoint(
            v=4,
            id=str(uuid6(clock_seq=self._step)),
            ts="2026-01-01T00:00:00.000000+00:00",
            channel_values={"messages": list(self._messages[first : self._said]), f"branch:to:{runs}": None},
            channel_versions=self._versions,
            versions_seen=self._seen,
            updated_channels=[f"branch:to:{runs}", "messages"],
        )
        metadata = CheckpointMetadata(source="loop", step=self._step, parents={})
        writes = [("messages", [self._messages[self._said % len(self._messages)]]), (f"branch:to:{ran}", None)]
        return Step(checkpoint, metadata, changed, writes)

    def steps(self, count: int) -> list[Step]:
        """Make the next so many."""
        return [self.step() for _ in range(count)]


def _version(number: int, salt: int) -> str:
    return f"{number:032}.0.{salt * 7919 % 10**16:016}"


def new_thread() -> RunnableConfig:
    """Address a thread that nobody has used."""
    return {"configurable": {"thread_id": str(uuid.uuid4()), "checkpoint_ns": ""}}


def task_ids() -> Iterator[str]:
    """Name tasks as LangGraph does."""
    while True:
        yield str(uuid.uuid4())


class State(TypedDict):
    """The state of the graph: messages that grow."""

    messages: Annotated[list[AnyMessage], add_messages]


def agent_graph(messages: Sequence[AnyMessage], steps: int) -> StateGraph[State]:
    """Make an agent that calls a tool, reads the answer, and so on; each step appends the next message.

    Args:
        messages: What is said: those that the run begins with, then one for each step.
        steps: After so many it ends.
    """
    last = len(messages)

    def say(state: State) -> dict[str, Any]:
        return {"messages": [messages[len(state["messages"])]]}

    def onward(here: int) -> Any:
        return lambda state: END if len(state["messages"]) >= last else NODES[1 - here]

    if steps >= last:
        raise ValueError("there must be more messages than steps: a run begins with at least one")
    graph: StateGraph[State] = StateGraph(State)
    graph.add_edge(START, NODES[0])
    for index, node in enumerate(NODES):
        graph.add_node(node, say)
        graph.add_conditional_edges(node, onward(index), [NODES[1 - index], END])
    return graph
