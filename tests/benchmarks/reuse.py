"""What serializing a conversation costs with `ElementReuse` and without, side by side in one run; no servers.

    python -m tests.benchmarks.reuse [--rounds 60] [--bytes 400] [--json]

The variants take turns in every round, each in every place, so that a slow moment of the machine hits all. Columns:

- serializer: `JsonPlusSerializer.dumps_typed` of the whole list.
- one appended: `ElementReuse.dumps` of the list after a step that appended one new message.
- check: packing each message's fields and comparing them with what is kept; no bytes of the result are made.
- all new: `ElementReuse.dumps` of a list none of whose messages was seen (a process that takes over).
- all refused: `ElementReuse.dumps` of messages that hold what it refuses (a datetime), against serializing those.

Times are the thread's processor time; the garbage collector is off.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from datetime import datetime, timezone
from itertools import count
from typing import TYPE_CHECKING, Any

import ormsgpack
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from langgraph_tiered_saver import reuse
from langgraph_tiered_saver.reuse import ElementReuse

if TYPE_CHECKING:
    from collections.abc import Callable

SERDE = JsonPlusSerializer()
LENGTHS = (8, 20, 200, 2000)
ENOUGH = 1 << 30


def message(number: int, size: int, run: str = "run") -> Any:
    """One of the messages of an agent that uses a tool; a text of `size` characters."""
    text = (f"{number} The customer asked for a refund of an order. " * (size // 40 + 1))[:size]
    id = f"{run}-{number:032}"
    usage = {"input_tokens": number, "output_tokens": 50, "total_tokens": number + 50}
    meta = {"model_name": "model", "finish_reason": "stop"}
    call = {"name": "look_up", "args": {"order": number}, "id": f"call-{number}"}
    kinds: tuple[Callable[[], Any], ...] = (
        lambda: HumanMessage(text, id=id),
        lambda: AIMessage(text, id=id, tool_calls=[call], usage_metadata=usage, response_metadata=meta),
        lambda: ToolMessage(text, id=id, tool_call_id=f"call-{number}", name="look_up"),
        lambda: AIMessage(text, id=id, usage_metadata=usage, response_metadata=meta),
    )
    return kinds[number % 4]()


def check(reused: ElementReuse, messages: list[Any]) -> bool:
    """The part of `ElementReuse.dumps` that tells whether each message is unchanged."""
    find, pack, strict, heads = reused._young.get, ormsgpack.packb, reuse._STRICT, reuse._HEADS
    unchanged = True
    for element in messages:
        kind = type(element)
        if kind in heads and not element.__pydantic_extra__:
            content = element.__dict__
            fields = pack(content, None, strict)
            entry = find(content.get("id"))
            unchanged &= entry is not None and entry[0] is kind and entry[1].startswith(fields, entry[2])
    return unchanged


def measure(length: int, size: int, rounds: int) -> dict[str, float]:
    """Median seconds of each variant."""
    messages = [message(number, size) for number in range(length)]
    refused = [message(number, size) for number in range(length)]
    for element in refused:
        element.response_metadata["created_at"] = datetime.now(timezone.utc)
    reused = ElementReuse(ENOUGH)
    reused.dumps(SERDE, messages[:-1] + messages[:1])
    variants: dict[str, Callable[[ElementReuse], Any]] = {
        "serializer": lambda _: SERDE.dumps_typed(messages),
        "one appended": lambda _: reused.dumps(SERDE, messages),
        "check": lambda _: check(reused, messages[:-1]),
        "all new": lambda empty: empty.dumps(SERDE, messages),
        "serializer, refused": lambda _: SERDE.dumps_typed(refused),
        "all refused": lambda empty: empty.dumps(SERDE, refused),
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    order = list(variants)
    numbers = count(length * 2, 4)
    gc.collect()
    gc.disable()
    for _ in range(rounds):
        for name in order:
            for timed in (False, True):  # the first call warms the processor's caches, for everyone alike
                messages[-1] = message(next(numbers), size)
                empty = ElementReuse(ENOUGH)
                started = time.thread_time()
                result = variants[name](empty)
                took = time.thread_time() - started
                assert result
                if timed:
                    times[name].append(took)
        order.append(order.pop(0))
    gc.enable()
    assert reused.dumps(SERDE, messages) == SERDE.dumps_typed(messages)
    return {name: statistics.median(found) for name, found in times.items()}


def show(results: dict[int, dict[str, float]], size: int) -> None:
    """Print a table of medians and of their ratios to the serializer."""
    table = Table(title=f"Median time to serialize a conversation, messages with a text of {size} characters")
    for heading in ("messages", "serializer", "one appended", "check", "all new", "all refused"):
        table.add_column(heading, justify="right")
    for length, medians in results.items():
        whole = medians["serializer"]
        cells = [f"{whole * 1e6:,.0f} µs"]
        cells += (f"{medians[name] * 1e6:,.0f} µs  {medians[name] / whole:.2f} x" for name in list(medians)[1:4])
        cells += [
            f"{medians['all refused'] * 1e6:,.0f} µs  {medians['all refused'] / medians['serializer, refused']:.2f} x"
        ]
        table.add_row(f"{length:,}", *cells)
    Console().print(table)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40, help="rounds at 2,000 messages; ten times as many at fewer")
    parser.add_argument("--bytes", type=int, default=400, help="characters of a message's text")
    parser.add_argument("--json", action="store_true", help="print medians in seconds as JSON")
    arguments = parser.parse_args()
    results = {
        length: measure(length, arguments.bytes, arguments.rounds * min(10, 2000 // length))
        for length in track(LENGTHS, "Measuring", console=Console(stderr=True), transient=True)
    }
    if arguments.json:
        print(json.dumps({"text_bytes": arguments.bytes, "median_seconds": results}))
    else:
        show(results, arguments.bytes)


if __name__ == "__main__":
    main()
