"""Real graphs, begun by one process and resumed by another.

`python -m tests.integration.graphs OPTIONS`, the options as JSON, builds the same graphs on a saver of its own, resumes
their threads and prints what they gave as JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import operator
import os
import re
import sys
import traceback
import uuid
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

from langchain_core.messages import AIMessage, AnyMessage, BaseMessage, HumanMessage, ToolMessage
from langchain_core.runnables import RunnableConfig
from langgraph.channels.delta import DeltaChannel
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.config import get_stream_writer
from langgraph.func import entrypoint, task
from langgraph.graph import END, START, StateGraph
from langgraph.graph.message import add_messages
from langgraph.prebuilt import ToolNode
from langgraph.types import Command, Interrupt, Send, interrupt

from langgraph_tiered_saver import TieredSaver
from tests.support import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


FAN_OUT = 200
FREE_TASKS = 100

# --- side effects, and what is compared ------------------------------------------------------------------------------


class Effects:
    """A directory in which nodes leave a trace that no checkpointer can take back."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def add(self, name: str) -> None:
        """Note that something was done; one line, in one system call."""
        with (self.directory / "done").open("a") as file:
            file.write(f"{name}\n")

    def done(self) -> dict[str, int]:
        """Count how often each thing was done."""
        file = self.directory / "done"
        return dict(sorted(Counter(file.read_text().splitlines()).items())) if file.exists() else {}

    def allow(self) -> None:
        """Let pass what `allowed` holds back."""
        (self.directory / "allowed").touch()

    def allowed(self) -> bool:
        """Whether somebody allowed it."""
        return (self.directory / "allowed").exists()


def plain(value: Any) -> Any:
    """Reduce what LangGraph gives to what JSON can say."""
    if isinstance(value, BaseMessage):
        return {"message": type(value).__name__, **plain(value.model_dump())}
    if isinstance(value, Interrupt):
        return {"interrupt": plain(value.value), "id": value.id}
    if hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, dict):
        # LangGraph reports interrupts in the order in which tasks happen to finish.
        return {
            str(key): sorted(plain(item), key=json.dumps) if key == "__interrupt__" else plain(item)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    return repr(value)


_RANDOM = re.compile(
    r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"  # checkpoints, tasks, messages
    r"|(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])"  # interrupts
    r"|\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+\+00:00"
)


def normalised(value: Any) -> Any:
    """Number ids and times by their first appearance, so that two runs of one graph compare equal."""
    numbers: dict[str, str] = {}
    text = json.dumps(plain(value))
    return json.loads(_RANDOM.sub(lambda found: numbers.setdefault(found[0], f"#{len(numbers)}"), text))


class Runner:
    """One thread of a graph, called synchronously or asynchronously."""

    def __init__(self, graph: Any, config: RunnableConfig, *, asynchronous: bool) -> None:
        self.graph, self.config, self.asynchronous = graph, config, asynchronous

    def invoke(self, given: Any, config: RunnableConfig | None = None, **options: Any) -> Any:
        """Run until the end, or the next interrupt."""
        if self.asynchronous:
            return asyncio.run(self.graph.ainvoke(given, config or self.config, **options))
        return self.graph.invoke(given, config or self.config, **options)

    def stream(self, given: Any, **options: Any) -> list[Any]:
        """Run, and collect what is streamed."""

        async def collect() -> list[Any]:
            return [event async for event in self.graph.astream(given, self.config, **options)]

        if self.asynchronous:
            return asyncio.run(collect())
        return list(self.graph.stream(given, self.config, **options))

    def state(self, config: RunnableConfig | None = None) -> Any:
        """Read the state, subgraphs included."""
        if self.asynchronous:
            return asyncio.run(self.graph.aget_state(config or self.config, subgraphs=True))
        return self.graph.get_state(config or self.config, subgraphs=True)

    def update(self, config: RunnableConfig | None, values: Any, as_node: str | None = None) -> RunnableConfig:
        """Write into the state from outside."""
        if self.asynchronous:
            return asyncio.run(self.graph.aupdate_state(config or self.config, values, as_node))
        return self.graph.update_state(config or self.config, values, as_node)

    def history(self) -> list[Any]:
        """Read every state there was, newest first."""

        async def collect() -> list[Any]:
            return [state async for state in self.graph.aget_state_history(self.config)]

        return asyncio.run(collect()) if self.asynchronous else list(self.graph.get_state_history(self.config))


@dataclass(frozen=True)
class Case:
    """A graph, what the first process does with it, and what the second one goes on to do."""

    build: Callable[[Any, Effects], Any]
    begin: Callable[[Runner, Effects], Any]
    resume: Callable[[Runner, Effects], Any]


# --- tools -----------------------------------------------------------------------------------------------------------


class Chat(TypedDict):
    messages: Annotated[list[AnyMessage], add_messages]


def tool_loop(saver: Any, effects: Effects) -> Any:
    """A ReAct loop; a deterministic planner stands in for the model."""

    def read(path: str) -> str:
        """Read a file."""
        effects.add(f"read {path}")
        return f"contents of {path}"

    def count(text: str) -> int:
        """Count letters."""
        effects.add(f"count {text}")
        return len(text)

    def agent(state: Chat) -> Any:
        turn = sum(isinstance(message, AIMessage) for message in state["messages"])
        effects.add(f"agent {turn}")
        if turn == 3:
            results = [m.content for m in state["messages"] if isinstance(m, ToolMessage)]
            return {"messages": [AIMessage("; ".join(map(str, results)), id="answer")]}
        calls = [
            {"name": "read", "args": {"path": f"{turn}.py"}, "id": f"call-{turn}-0", "type": "tool_call"},
            {"name": "count", "args": {"text": "x" * turn}, "id": f"call-{turn}-1", "type": "tool_call"},
        ]
        return {"messages": [AIMessage("", tool_calls=calls, id=f"plan-{turn}")]}

    def route(state: Chat) -> str:
        return "tools" if state["messages"][-1].tool_calls else END  # type: ignore[union-attr]

    node = ToolNode([read, count])

    def tools(state: Chat, config: RunnableConfig) -> Any:
        # The reducer would name them while they are being stored, so that either form could be read later.
        found = node.invoke(state, config)["messages"]
        return {"messages": [message.model_copy(update={"id": message.tool_call_id}) for message in found]}

    builder = StateGraph(Chat)
    builder.add_node("agent", agent)
    builder.add_node("tools", tools)
    builder.add_edge(START, "agent")
    builder.add_conditional_edges("agent", route, ["tools", END])
    builder.add_edge("tools", "agent")
    return builder.compile(checkpointer=saver, interrupt_before=["tools"])


def begin_tool_loop(run: Runner, effects: Effects) -> Any:
    return [run.invoke({"messages": [HumanMessage("count the letters", id="question")]}), run.invoke(None), run.state()]


def resume_tool_loop(run: Runner, effects: Effects) -> Any:
    return [run.state(), run.invoke(None), run.invoke(None), run.state()]


# --- interrupts ------------------------------------------------------------------------------------------------------


class Answers(TypedDict, total=False):
    question: str
    answers: Annotated[list[Any], operator.add]


def asking(saver: Any, effects: Effects, asked: Sequence[Sequence[str]], **options: Any) -> Any:
    """A graph with one node for each sequence of questions, all in parallel, and one that closes."""

    def node(number: int, questions: Sequence[str]) -> Callable[[Answers], Any]:
        def ask(state: Answers) -> Any:
            effects.add(f"ask {number}")
            about = state["question"]
            return {"answers": [[question, interrupt({"ask": question, "of": about})] for question in questions]}

        return ask

    builder = StateGraph(Answers)
    builder.add_node("close", lambda state: {"answers": [f"{len(state['answers'])} in all"]})
    for number, questions in enumerate(asked):
        builder.add_node(f"ask{number}", node(number, questions))
        builder.add_edge(START, f"ask{number}")
        builder.add_edge(f"ask{number}", "close")
    builder.add_edge("close", END)
    return builder.compile(checkpointer=saver, **options)


def begin_asking(run: Runner, effects: Effects) -> Any:
    return [run.invoke({"question": "who?", "answers": []}), run.state()]


def resume_one(run: Runner, effects: Effects) -> Any:
    return [run.state(), run.invoke(Command(resume={"yes": [1, None]})), run.state()]


def resume_two(run: Runner, effects: Effects) -> Any:
    return [run.invoke(Command(resume="first")), run.state(), run.invoke(Command(resume="second"))]


def resume_parallel(run: Runner, effects: Effects) -> Any:
    waiting = [found for found in run.state().tasks if found.interrupts]
    one, *others = waiting
    answered = run.invoke(Command(resume={one.interrupts[0].id: f"to {one.name}"}))
    between = run.state()
    resume = {other.interrupts[0].id: f"to {other.name}" for other in others}
    return [answered, between, run.invoke(Command(resume=resume, update={"question": "updated"})), run.state()]


# --- failures --------------------------------------------------------------------------------------------------------


def failing(saver: Any, effects: Effects) -> Any:
    """Two nodes that succeed beside one that fails until it is allowed to succeed."""

    def sibling(name: str) -> Callable[[Answers], Any]:
        def work(state: Answers) -> Any:
            effects.add(name)
            return {"answers": [name]}

        return work

    def flaky(state: Answers, config: RunnableConfig) -> Any:
        effects.add("flaky")
        if effects.allowed():
            return {"answers": ["flaky"]}
        at: RunnableConfig = {"configurable": {"thread_id": config["configurable"]["thread_id"]}}

        def finished() -> bool:
            # The siblings' results must be stored before this fails, or it would be right to run them again.
            found = saver.get_tuple(at)
            return found is not None and {"left", "right"} <= {
                answer for _, channel, value in found.pending_writes if channel == "answers" for answer in value
            }

        wait_until(finished, message="the siblings' writes")
        raise RuntimeError("the tool is away")

    builder = StateGraph(Answers)
    for name in ("left", "right"):
        builder.add_node(name, sibling(name))
    builder.add_node("flaky", flaky)
    builder.add_node("close", lambda state: {"answers": [f"{len(state['answers'])} in all"]})
    for name in ("left", "right", "flaky"):
        builder.add_edge(START, name)
        builder.add_edge(name, "close")
    return builder.compile(checkpointer=saver)


def begin_failing(run: Runner, effects: Effects) -> Any:
    try:
        return run.invoke({"question": "?", "answers": []})
    except RuntimeError as error:
        return [str(error), run.state()]


def resume_failing(run: Runner, effects: Effects) -> Any:
    effects.allow()
    return [run.invoke(None), run.state()]


# --- subgraphs -------------------------------------------------------------------------------------------------------


def nested(saver: Any, effects: Effects, depth: int) -> Any:
    """Graphs in graphs, the innermost of which asks; the state of all but the root is inherited's."""
    inner: Any = None
    for level in range(depth, -1, -1):
        builder = StateGraph(Answers)
        builder.add_node("before", _noting(effects, f"before {level}"))
        builder.add_edge(START, "before")
        if inner is None:
            builder.add_node("inner", lambda state: {"answers": [interrupt({"deep": state["question"]})]})
        else:
            builder.add_node("inner", inner)
        builder.add_edge("before", "inner")
        builder.add_node("after", _noting(effects, f"after {level}"))
        builder.add_edge("inner", "after")
        inner = builder.compile(checkpointer=saver if level == 0 else None)
    return inner


def _noting(effects: Effects, name: str) -> Callable[[Answers], Any]:
    def note(state: Answers) -> Any:
        effects.add(name)
        return {"answers": [name]}

    return note


class Memory(TypedDict, total=False):
    facts: Annotated[list[str], operator.add]
    fact: str


def remembering(saver: Any, effects: Effects) -> Any:
    """A subgraph whose own state outlives its calls (`checkpointer=True`)."""

    def remember(state: Memory) -> Any:
        effects.add(f"remember {state['fact']}")
        return {"facts": [state["fact"]]}

    child = StateGraph(Memory)
    child.add_node("remember", remember)
    child.add_edge(START, "remember")
    memory = child.compile(checkpointer=True)

    def call(state: Answers) -> Any:
        known = memory.invoke({"fact": state["question"]})
        return {"answers": [known["facts"]]}

    builder = StateGraph(Answers)
    builder.add_node("call", call)
    builder.add_edge(START, "call")
    return builder.compile(checkpointer=saver)


def begin_remembering(run: Runner, effects: Effects) -> Any:
    return [run.invoke({"question": name, "answers": []}) for name in ("one", "two")]


def resume_remembering(run: Runner, effects: Effects) -> Any:
    return [run.invoke({"question": name, "answers": []}) for name in ("three", "four")]


# --- Send ------------------------------------------------------------------------------------------------------------


class Sums(TypedDict, total=False):
    count: int
    results: Annotated[list[int], operator.add]


def fan_out(saver: Any, effects: Effects, *, hold_from: int, ask_at: int | None = None) -> Any:
    """As many tasks as the input says; from some number on, a task waits until it is allowed."""

    def work(given: dict[str, int]) -> Any:
        number = given["number"]
        if number >= hold_from:
            wait_until(effects.allowed, 60, "permission", interval=0.1)
        if number == ask_at:
            answer = interrupt(f"may {number} go on?")
            effects.add(f"answer {answer}")
        effects.add(f"task {number}")
        return {"results": [number * number]}

    builder = StateGraph(Sums)
    builder.add_node("plan", lambda state: {})
    builder.add_node("work", work)
    builder.add_node("close", lambda state: {"results": [sum(state["results"])]})
    builder.add_edge(START, "plan")
    sends = lambda state: [Send("work", {"number": n}) for n in range(state["count"])]  # noqa: E731
    builder.add_conditional_edges("plan", sends, ["work"])
    builder.add_edge("work", "close")
    return builder.compile(checkpointer=saver)


def begin_fan_out(run: Runner, effects: Effects) -> Any:
    return [run.invoke({"count": 12, "results": []}), run.state()]


def resume_fan_out(run: Runner, effects: Effects) -> Any:
    return [run.state(), run.invoke(Command(resume="yes")), run.state()]


# --- delta channels --------------------------------------------------------------------------------------------------


def append_all(value: list[str], writes: Sequence[list[str]]) -> list[str]:
    """Reduce writes to a list; what a DeltaChannel is rebuilt with."""
    return [*value, *(item for write in writes for item in write)]


class Deltas(TypedDict, total=False):
    often: Annotated[list[str], DeltaChannel(append_all, snapshot_frequency=3)]
    seldom: Annotated[list[str], DeltaChannel(append_all, snapshot_frequency=1000)]
    turn: int


def delta(saver: Any, effects: Effects) -> Any:
    """Two delta channels, one that leaves a snapshot now and then, and one that leaves none."""
    builder = StateGraph(Deltas)
    builder.add_node("left", lambda state: {"often": [f"l{state['turn']}"], "seldom": [f"l{state['turn']}"]})
    builder.add_node("right", lambda state: {"often": [f"r{state['turn']}"]})
    builder.add_node("next", lambda state: {"turn": state["turn"] + 1, "seldom": [f"n{len(state['often'])}"]})
    builder.add_edge(START, "left")
    builder.add_edge(START, "right")
    builder.add_edge(["left", "right"], "next")
    return builder.compile(checkpointer=saver)


def begin_delta(run: Runner, effects: Effects) -> Any:
    return [run.invoke({"often": [f"in{turn}"], "turn": turn}) for turn in range(3)]


def resume_delta(run: Runner, effects: Effects) -> Any:
    found = [run.state(), run.invoke({"seldom": ["resumed"], "turn": 7})]
    older = run.history()[4].config
    fork = run.update(older, {"often": ["forked"], "turn": 40}, "next")
    return [*found, run.state(fork), run.invoke({"often": ["on the fork"], "turn": 41}, fork), run.state()]


# --- forks and time travel -------------------------------------------------------------------------------------------


def steps(saver: Any, effects: Effects) -> Any:
    """Three nodes in a row."""
    builder = StateGraph(Answers)
    previous = START
    for name in ("a", "b", "c"):
        builder.add_node(name, _noting(effects, name))
        builder.add_edge(previous, name)
        previous = name
    return builder.compile(checkpointer=saver)


def begin_steps(run: Runner, effects: Effects) -> Any:
    return run.invoke({"question": "?", "answers": []})


def resume_by_forks(run: Runner, effects: Effects) -> Any:
    """Replay an older checkpoint, fork another one, and go on from a fork of the fork."""
    history = run.history()
    after_a = next(state.config for state in history if state.next == ("b",))
    after_b = next(state.config for state in history if state.next == ("c",))
    replayed = run.invoke(None, after_b)
    fork = run.update(after_a, {"answers": ["forked"]}, "a")
    forked = [run.state(fork), run.invoke(None, fork)]
    as_c = run.update(None, {"question": "changed"}, "c")
    return [replayed, *forked, run.state(as_c), run.invoke({"question": "again"}), run.state(after_a)]


def resume_again(run: Runner, effects: Effects) -> Any:
    return [run.state(), run.invoke({"question": "again"}), run.state()]


# --- durability, streams, functions ----------------------------------------------------------------------------------


def durable(durability: str) -> Case:
    """A graph that asks, run with one of LangGraph's durabilities from begin to end."""
    return Case(
        lambda saver, effects: asking(saver, effects, [["one", "two"]]),
        lambda run, effects: [run.invoke({"question": "who?"}, durability=durability), run.state()],
        lambda run, effects: [
            run.invoke(Command(resume=1), durability=durability),
            run.invoke(Command(resume=2), durability=durability),
        ],
    )


STREAM_MODES = ["values", "updates", "custom", "tasks", "checkpoints"]


def streaming(saver: Any, effects: Effects) -> Any:
    """Three nodes, one of which asks and writes to the stream."""

    def ask(state: Answers) -> Any:
        get_stream_writer()({"progress": "half-way"})
        return {"answers": [interrupt("go on?")]}

    builder = StateGraph(Answers)
    builder.add_node("a", _noting(effects, "a"))
    builder.add_node("ask", ask)
    builder.add_node("c", _noting(effects, "c"))
    builder.add_edge(START, "a")
    builder.add_edge("a", "ask")
    builder.add_edge("ask", "c")
    return builder.compile(checkpointer=saver)


def functional(saver: Any, effects: Effects) -> Any:
    """The functional API: tasks that ran are not run again, and `previous` is what the last call left."""

    @task
    def square(number: int) -> int:
        effects.add(f"square {number}")
        return number * number

    @task
    def confirm(total: int) -> str:
        return f"{interrupt({'total': total})} for {total}"

    @entrypoint(checkpointer=saver)
    def workflow(numbers: list[int], *, previous: Any = None) -> Any:
        squares = [square(number) for number in numbers]
        total = sum(found.result() for found in squares) + (previous or {}).get("total", 0)
        return {"total": total, "answer": confirm(total).result()}

    return workflow


CASES = {
    "tool_loop": Case(tool_loop, begin_tool_loop, resume_tool_loop),
    "interrupt": Case(lambda s, e: asking(s, e, [["one"]]), begin_asking, resume_one),
    "interrupts_in_one_node": Case(lambda s, e: asking(s, e, [["one", "two"]]), begin_asking, resume_two),
    "interrupts_in_parallel": Case(lambda s, e: asking(s, e, [["a"], ["b"], ["c"]]), begin_asking, resume_parallel),
    "failure": Case(failing, begin_failing, resume_failing),
    "subgraph": Case(lambda s, e: nested(s, e, 1), begin_asking, resume_one),
    "nested_subgraphs": Case(lambda s, e: nested(s, e, 3), begin_asking, resume_one),
    "subgraph_memory": Case(remembering, begin_remembering, resume_remembering),
    "send": Case(lambda s, e: fan_out(s, e, hold_from=99, ask_at=7), begin_fan_out, resume_fan_out),
    "delta": Case(delta, begin_delta, resume_delta),
    "forks": Case(steps, begin_steps, resume_by_forks),
    "finished": Case(steps, begin_steps, resume_again),
    "durability_sync": durable("sync"),
    "durability_async": durable("async"),
    "durability_exit": durable("exit"),
    "stream": Case(
        streaming,
        lambda run, effects: run.stream({"question": "?"}, stream_mode=STREAM_MODES),
        lambda run, effects: run.stream(Command(resume="yes"), stream_mode=STREAM_MODES),
    ),
    "stream_subgraphs": Case(
        lambda s, e: nested(s, e, 1),
        lambda run, effects: run.stream({"question": "?"}, stream_mode="updates", subgraphs=True),
        lambda run, effects: run.stream(Command(resume="yes"), stream_mode="updates", subgraphs=True),
    ),
    "functional": Case(
        functional,
        lambda run, effects: [run.invoke([1, 2, 3]), run.state()],
        lambda run, effects: [run.invoke(Command(resume="yes")), run.invoke([4]), run.invoke(Command(resume="no"))],
    ),
}


def runner(name: str, saver: Any, directory: Path, *, asynchronous: bool) -> tuple[Runner, Effects]:
    """Build a case's graph on a saver; its thread is named like the case."""
    effects = Effects(directory / name)
    config: RunnableConfig = {"configurable": {"thread_id": name}}
    return Runner(CASES[name].build(saver, effects), config, asynchronous=asynchronous), effects


def perform(phase: str, saver: Any, directory: Path, *, asynchronous: bool) -> dict[str, Any]:
    """Begin or resume every case; a case that fails gives its traceback, and the others go on."""
    found = {}
    for name, case in CASES.items():
        run, effects = runner(name, saver, directory, asynchronous=asynchronous)
        try:
            found[name] = plain(getattr(case, phase)(run, effects))
        except Exception:
            found[name] = {"traceback": traceback.format_exc()}
    return found


# --- the second process ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_saver(options: dict[str, Any]) -> Iterator[Any]:
    """Open the saver that the options name."""
    if options["kind"] == "postgres":
        with PostgresSaver.from_conn_string(options["postgres_url"]) as saver:
            yield saver
    else:
        urls = options["redis_url"], options["postgres_url"]
        with TieredSaver.from_conn_string(*urls, **options["settings"]) as saver:
            yield saver


def main(options: dict[str, Any]) -> None:
    """Do what the options ask for, and print what it gave."""
    directory = Path(options["directory"])
    with open_saver(options) as saver:
        if options["role"] == "resume":
            found: Any = perform("resume", saver, directory, asynchronous=options["asynchronous"])
        else:
            effects = Effects(directory)
            graph = fan_out(saver, effects, hold_from=FREE_TASKS)
            run = Runner(graph, fan_out_config(), asynchronous=options["asynchronous"])
            found = run.invoke({"count": FAN_OUT, "results": []} if options["role"] == "fan_out" else None)
    os.write(1, json.dumps(found).encode())


def fan_out_config() -> RunnableConfig:
    """Give the config of the large fan-out.

    Results are stored by the threads that tasks run in, so there must be more of them than tasks that wait.
    """
    return {"configurable": {"thread_id": "fan-out"}, "max_concurrency": FAN_OUT + 50}


def random_prefix() -> str:
    """Give a key prefix that nobody else uses."""
    return f"test-{uuid.uuid4().hex}"


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
