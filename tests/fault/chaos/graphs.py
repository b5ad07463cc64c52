"""The graph that workers run, and what must hold for its state whatever happens.

Every value is computed from the state alone, so that a task that runs again writes the same again.
"""

from __future__ import annotations

import operator
from typing import Annotated, Any, TypedDict

from langgraph.graph import END, START, StateGraph
from langgraph.types import Send, interrupt

Message = dict[str, Any]


class State(TypedDict, total=False):
    """What a thread has: a list that grows, counters that must agree with it, and values that are replaced."""

    do: str
    size: int
    messages: Annotated[list[Message], operator.add]
    counter: Annotated[int, operator.add]
    planned: Annotated[int, operator.add]
    results: Annotated[list[int], operator.add]
    question: str
    approval: str


class Task(TypedDict):
    """What one task of a fan-out is sent."""

    number: int


class Approval(TypedDict, total=False):
    """The subgraph's state; it shares `question` and `approval` with the graph's."""

    question: str
    approval: str
    notes: Annotated[list[str], operator.add]


def message(state: State, role: str) -> dict[str, Any]:
    """Give the update that adds the next message: its number is its place in the list."""
    number = len(state.get("messages", []))
    # About 1 KB, so that the list is soon long enough to be stored as what each step adds.
    text = f"{role} {number} " + " ".join(str(number * each) for each in range(number * 37 % 400))
    return {"messages": [{"number": number, "role": role, "text": text}], "counter": 1}


def broken(values: dict[str, Any], *, finished: bool) -> str | None:
    """Say what does not fit together in a state.

    Args:
        values: The state.
        finished: Nothing is left to run.
    """
    messages, counter = values.get("messages", []), values.get("counter", 0)
    if counter != len(messages):
        return f"the counter says {counter}, but there are {len(messages)} messages"
    numbers = [one["number"] for one in messages]
    if numbers != list(range(len(messages))):
        return f"the messages are numbered {numbers}"
    planned, results = values.get("planned", 0), values.get("results", [])
    if finished and planned != len(results):
        return f"{planned} tasks were planned, but {len(results)} gave a result"
    return None


def _plan(state: State) -> dict[str, Any]:
    planned = state["size"] if state["do"] == "fan" else 0
    return {**message(state, "user"), "planned": planned, "question": f"question {state.get('counter', 0)}"}


def _route(state: State) -> list[Send] | str:
    if state["do"] == "fan":
        return [Send("task", {"number": number}) for number in range(state["size"])]
    return "approval" if state["do"] == "ask" else "answer"


def _task(sent: Task) -> dict[str, Any]:
    return {"results": [sent["number"] ** 2]}


def _draft(state: Approval) -> dict[str, Any]:
    return {"notes": [f"draft of {state['question']}"]}


def _confirm(state: Approval) -> dict[str, Any]:
    return {"approval": f"{interrupt(state['question'])} to {state['question']}", "notes": ["confirmed"]}


def _answer(state: State) -> dict[str, Any]:
    return message(state, f"answer to {state['do']}")


def build(saver: Any) -> Any:
    """Compile the graph: a plan, then an answer, a fan-out by Send, or a subgraph that stops for a human."""
    approval = StateGraph(Approval)
    approval.add_node("draft", _draft)
    approval.add_node("confirm", _confirm)
    approval.add_edge(START, "draft")
    approval.add_edge("draft", "confirm")
    approval.add_edge("confirm", END)

    graph = StateGraph(State)
    graph.add_node("plan", _plan)
    graph.add_node("task", _task)  # type: ignore[arg-type]
    graph.add_node("approval", approval.compile())
    graph.add_node("answer", _answer)
    graph.add_edge(START, "plan")
    graph.add_conditional_edges("plan", _route, ["task", "approval", "answer"])
    graph.add_edge("task", "answer")
    graph.add_edge("approval", "answer")
    graph.add_edge("answer", END)
    return graph.compile(checkpointer=saver)
