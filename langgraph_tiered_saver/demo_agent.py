"""The agent of `langgraph-tiered demo`, run as a process of its own so that it can be killed.

An ordinary LangGraph tool-calling agent that surveys a directory of files. A deterministic planner stands in for the
model; the graph, its tools and the saver are real. It tells its parent what it does in JSON lines on its standard
output, and finds the servers as any process would, with `TieredSaver.from_env()`.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from langchain_core.messages import AIMessage, AnyMessage, HumanMessage, ToolCall, ToolMessage
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import BaseTool, tool
from langgraph.checkpoint.base import (
    BaseCheckpointSaver,
    ChannelVersions,
    Checkpoint,
    CheckpointMetadata,
    CheckpointTuple,
)
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode
from langgraph.types import Send

from langgraph_tiered_saver.saver import TieredSaver

CALLS_PER_STEP = 4
FILES_READ = 10  # the largest ones
_HEAD_LINES = 12  # of a file, read for what it is about
_LARGEST_FILE = 1024 * 1024
_ABOUT_CHARACTERS = 72
_DECORATION = " #\"'*/"
_TO_DO = r"\b(?:TODO|FIXME|XXX)\b"

# CPython 3.11 counts the depth of all threads' syntax trees in one place, and fails when it is wrong (gh-106905).
_one_parser = threading.Lock()

Emit = Callable[..., None]


# --- what there is to know about files -------------------------------------------------------------------------------


def find_files(directory: Path, most: int) -> list[str]:
    """List the readable text files below a directory as relative POSIX paths, always in the same order.

    Args:
        directory: Where to look; hidden folders, caches and symbolic links are left out.
        most: At most so many files.
    """

    def walk() -> Iterator[Path]:
        for folder, folders, files in os.walk(directory):
            folders[:] = sorted(name for name in folders if not name.startswith((".", "__pycache__")))
            yield from (Path(folder, name) for name in sorted(files) if not name.startswith("."))

    return [file.relative_to(directory).as_posix() for file in islice(filter(_is_text, walk()), most)]


def _is_text(file: Path) -> bool:
    try:
        if file.is_symlink() or not file.is_file() or not 0 < file.stat().st_size <= _LARGEST_FILE:
            return False
        with file.open("rb") as stream:
            return b"\0" not in stream.read(1024)
    except OSError:
        return False


def head(file: Path) -> str:
    """Read the first lines of a file."""
    return "".join(_text(file).splitlines(keepends=True)[:_HEAD_LINES])


def count(file: Path) -> dict[str, int]:
    """Count the lines of a file, and the classes and functions if it is Python."""
    text = _text(file)
    counts = {"lines": len(text.splitlines()), "classes": 0, "functions": 0}
    if file.suffix == ".py":
        try:
            with _one_parser, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                nodes: Iterable[ast.AST] = ast.walk(ast.parse(text))
        except (SyntaxError, ValueError, RecursionError):
            nodes = ()
        for node in nodes:
            counts["classes"] += isinstance(node, ast.ClassDef)
            counts["functions"] += isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    return counts


def matches(directory: Path, names: Sequence[str], pattern: str) -> dict[str, int]:
    """Count a pattern's matches in each file that has any."""
    counts = {name: len(re.findall(pattern, _text(directory / name))) for name in names}
    return {name: number for name, number in counts.items() if number}


def largest(counts: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Choose the files worth reading: those with most lines."""
    return sorted(counts, key=lambda name: (-counts[name]["lines"], name))[:FILES_READ]


def report(counts: Mapping[str, Mapping[str, int]], heads: Mapping[str, str], to_do: Mapping[str, int]) -> str:
    """Write the report, in Markdown."""
    lines, classes, functions = (sum(of[key] for of in counts.values()) for key in ("lines", "classes", "functions"))
    total = ", ".join([counted(len(counts), "file"), counted(lines, "line"), counted(classes, "class"),
                       counted(functions, "function"), counted(sum(to_do.values()), "mark")])  # fmt: skip
    rows = [
        f"{total} to do.",
        "",
        "| file | lines | classes | functions | to do | about |",
        "|---|---|---|---|---|---|",
    ]
    for name, of in counts.items():
        numbers = f"{of['lines']} | {of['classes']} | {of['functions']} | {to_do.get(name, 0)}"
        rows.append(f"| {name} | {numbers} | {_about(heads.get(name, ''))} |")
    return "\n".join(rows)


def counted(number: float, noun: str) -> str:
    """Put a number before its noun: "1 file", "2 files", "2 classes"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}{'es' if noun.endswith('s') else 's'}"


def report_directly(directory: Path, most: int) -> str:
    """Write the same report without an agent, to compare with."""
    names = find_files(directory, most)
    counts = {name: count(directory / name) for name in names}
    heads = {name: head(directory / name) for name in largest(counts)}
    return report(counts, heads, matches(directory, names, _TO_DO))


def _text(file: Path) -> str:
    return file.read_text("utf-8", errors="replace")


def _about(text: str) -> str:
    """Give what the first line says, if it is a docstring, a comment or a heading."""
    first = next((line for line in text.splitlines() if line.strip(_DECORATION)), "")
    return first.strip(_DECORATION).replace("|", "/")[:_ABOUT_CHARACTERS] if first[:1] in _DECORATION else ""


# --- the agent -------------------------------------------------------------------------------------------------------


def make_tools(directory: Path, most: int) -> list[BaseTool]:
    """Make the agent's tools, which read files of one directory and of no other."""

    def inside(path: str) -> Path:
        file = (directory / path).resolve()
        if not file.is_relative_to(directory.resolve()):
            raise ValueError(f"{path} is outside the directory")
        return file

    @tool
    def list_files() -> str:
        """List the files of the directory, as JSON."""
        return json.dumps(find_files(directory, most))

    @tool
    def read_file(path: str) -> str:
        """Read the first lines of a file."""
        return head(inside(path))

    @tool
    def count_definitions(path: str) -> str:
        """Count the lines, classes and functions of a file, as JSON."""
        return json.dumps(count(inside(path)))

    @tool
    def grep(pattern: str) -> str:
        """Count the matches of a regular expression in each file, as JSON."""
        return json.dumps(matches(directory, find_files(directory, most), pattern))

    return [list_files, read_file, count_definitions, grep]


def call_name(number: int) -> str:
    """Name a tool call by its number in the conversation, from 1."""
    return f"call-{number}"


def calls_for(files: int) -> int:
    """Give the number of tool calls that a report on so many files takes."""
    return 1 + files + min(files, FILES_READ) + 1


def middle_call(files: int) -> str:
    """Name a tool call in the middle of the run that, if there are enough files, has others before and beside it."""
    step = files // 2 // CALLS_PER_STEP * CALLS_PER_STEP
    return call_name(2 + step + min(CALLS_PER_STEP // 2, files - step - 1))


def plan(messages: Sequence[AnyMessage]) -> AIMessage:
    """Decide what to do next from the conversation alone, as a model would: it stands in for one."""
    calls = [call for message in messages if isinstance(message, AIMessage) for call in message.tool_calls]
    results = {m.tool_call_id: str(m.content) for m in messages if isinstance(m, ToolMessage)}

    def of(name: str) -> dict[str, str]:
        return {c["args"].get("path", ""): results[str(c["id"])] for c in calls if c["name"] == name}

    if not calls:
        return _ask(calls, "Which files are there?", "list_files", [{}])
    counts = {path: json.loads(result) for path, result in of("count_definitions").items()}
    if left := json.loads(of("list_files")[""])[len(counts) :]:
        return _ask(calls, f"{len(left)} files to count.", "count_definitions", [{"path": path} for path in left])
    heads = of("read_file")
    if left := largest(counts)[len(heads) :]:
        return _ask(calls, "What are the largest files about?", "read_file", [{"path": path} for path in left])
    if calls[-1]["name"] != "grep":
        return _ask(calls, "What is left to do in them?", "grep", [{"pattern": _TO_DO}])
    return AIMessage(report(counts, heads, json.loads(of("grep")[""])))


def _ask(calls: Sequence[ToolCall], text: str, name: str, wanted: Sequence[dict[str, str]]) -> AIMessage:
    """Call a tool, side by side for the first few of what is wanted."""
    return AIMessage(
        text,
        tool_calls=[
            ToolCall(name=name, args=arguments, id=call_name(number), type="tool_call")
            for number, arguments in enumerate(wanted[:CALLS_PER_STEP], len(calls) + 1)
        ],
    )


def build_agent(tools: Sequence[BaseTool], saver: BaseCheckpointSaver[Any], emit: Emit, tool_hook: Any = None) -> Any:
    """Build the graph: the planner, and its tool calls side by side, each a task that is saved on its own.

    Args:
        tools: The tools.
        saver: The checkpointer.
        emit: Is told what the planner decides.
        tool_hook: Wraps each tool call, as `ToolNode`'s `wrap_tool_call`.
    """

    def agent(state: MessagesState, config: RunnableConfig) -> dict[str, Any]:
        answer = plan(state["messages"])
        emit("planned", step=config["metadata"]["langgraph_step"], calls=[call["id"] for call in answer.tool_calls])
        return {"messages": [answer]}

    def to_tools(state: MessagesState) -> list[Send] | str:
        answer = state["messages"][-1]
        calls = answer.tool_calls if isinstance(answer, AIMessage) else []
        return [Send("tools", [call]) for call in calls] or END

    builder = StateGraph(MessagesState)
    builder.add_node("agent", agent)
    builder.add_node("tools", ToolNode(tools, wrap_tool_call=tool_hook, handle_tool_errors=False))
    builder.add_edge(START, "agent")
    builder.add_conditional_edges("agent", to_tools, ["tools", END])
    builder.add_edge("tools", "agent")
    return builder.compile(checkpointer=saver)


# --- the process -----------------------------------------------------------------------------------------------------


class WatchedSaver(TieredSaver):
    """The saver, telling when a call has returned: from then on what it stored is acknowledged."""

    emit: Emit

    def put(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        """Store a checkpoint, and tell how long it took and how far PostgreSQL is behind."""
        began = time.perf_counter()
        address = super().put(config, checkpoint, metadata, new_versions)
        seconds = time.perf_counter() - began
        lag = self.stats().flush_lag_seconds
        self.emit("checkpoint", id=checkpoint["id"], step=metadata["step"], seconds=seconds, lag=lag)
        return address

    def put_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        """Store what a task wrote, and tell whose results they are."""
        super().put_writes(config, writes, task_id, task_path)
        self.emit("results", calls=result_calls(writes))


def result_calls(writes: Sequence[tuple[str, Any]]) -> list[str]:
    """Name the tool calls whose results are among channels' values."""
    values = [value for channel, value in writes if channel == "messages" and isinstance(value, list)]
    return [m.tool_call_id for value in values for m in value if isinstance(m, ToolMessage)]


@dataclass(frozen=True)
class Seen:
    """What another process sees of the thread.

    Attributes:
        checkpoint_id: The latest checkpoint.
        step: Its step.
        results: Tool calls whose results it can read.
        on_top: How many of them are not in the checkpoint yet, but count on top of it.
    """

    checkpoint_id: str
    step: int
    results: frozenset[str]
    on_top: int

    @classmethod
    def of(cls, found: CheckpointTuple | None) -> Seen:
        """Look at a checkpoint and its pending writes."""
        if found is None:
            return cls("", -2, frozenset(), 0)
        inside = result_calls(list(found.checkpoint["channel_values"].items()))
        on_top = result_calls([(channel, value) for _, channel, value in found.pending_writes or []])
        return cls(found.checkpoint["id"], found.metadata["step"], frozenset(inside + on_top), len(on_top))


def main() -> None:
    """Run the agent on a thread, or go on with the thread if it is known."""
    options = _options()
    writing = threading.Lock()
    events, sys.stdout = sys.stdout, sys.stderr  # nobody else may write between the events

    def emit(event: str, **details: Any) -> None:
        with writing:
            events.write(json.dumps({"event": event, **details}) + "\n")
            events.flush()

    def hook(request: Any, execute: Callable[[Any], Any]) -> Any:
        call = request.tool_call
        result = execute(request)
        line = {"call": call["id"], "tool": call["name"], "args": call["args"], "pid": os.getpid()}
        _append(options.ledger, json.dumps(line))
        step = request.runtime.config["metadata"]["langgraph_step"]
        emit("executed", step=step, call=call["id"])
        if call["id"] == options.hold:
            # The worst moment: the effect is in the world, the result is not acknowledged.
            emit("holding", step=step, call=call["id"], what=" ".join([call["name"], *map(str, call["args"].values())]))
            sys.stdin.read()  # ends only if the parent is gone
            os._exit(1)
        return result

    config: RunnableConfig = {"configurable": {"thread_id": options.thread}, "recursion_limit": 100_000}
    with WatchedSaver.from_env() as saver:
        saver.emit = emit
        graph = build_agent(make_tools(options.directory, options.most), saver, emit, hook)
        known = graph.get_state(config)
        emit("began", resumed=bool(known.next))
        message = HumanMessage(f"Report on the files in {options.directory}.")
        graph.invoke(None if known.next else {"messages": [message]}, config)
        saver.flush()
        stats = saver.stats()
        emit("finished", adopted_records=stats.adopted_records, lost_records=stats.lost_records)


def _append(ledger: Path, line: str) -> None:
    """Append a line and wait until the disk has it; lines of several threads do not mix."""
    descriptor = os.open(ledger, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(descriptor, line.encode() + b"\n")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m langgraph_tiered_saver.demo_agent", description=__doc__)
    parser.add_argument("--directory", type=Path, required=True, help="the files to report on")
    parser.add_argument("--most", type=int, required=True, help="read at most so many files")
    parser.add_argument("--thread", required=True, help="thread_id")
    parser.add_argument("--ledger", type=Path, required=True, help="file that gets a line for each tool execution")
    parser.add_argument("--hold", help="the tool call in which to wait for SIGKILL")
    return parser.parse_args()


if __name__ == "__main__":
    main()
