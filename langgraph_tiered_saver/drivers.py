"""The two ways to run an operation: with the synchronous clients, and with the running loop's asynchronous ones."""

from __future__ import annotations

import asyncio
import concurrent.futures
import time
from typing import Any, TypeVar

from langgraph_tiered_saver.errors import HotTierRejectedError, HotTierUnavailableError, TieredSaverError
from langgraph_tiered_saver.hot import tier
from langgraph_tiered_saver.hot.tier import HotCall, HotRead
from langgraph_tiered_saver.operations import Blocking, Compute, Operation, Wait
from langgraph_tiered_saver.runtime import Runtime

T = TypeVar("T")


def run(runtime: Runtime, operation: Operation[T]) -> T:
    """Run an operation to its end; every error of the operation or of a tier comes through."""
    try:
        request = next(operation)
        while True:
            try:
                reply = _perform(runtime, request)
            except TieredSaverError as error:
                _count(runtime, error)
                request = operation.throw(error)
            else:
                request = operation.send(reply)
    except StopIteration as stop:
        result: T = stop.value
        return result


async def arun(runtime: Runtime, operation: Operation[T]) -> T:
    """Run an operation to its end without blocking the event loop."""
    try:
        request = next(operation)
        while True:
            try:
                reply = await _aperform(runtime, request)
            except TieredSaverError as error:
                _count(runtime, error)
                request = operation.throw(error)
            else:
                request = operation.send(reply)
    except StopIteration as stop:
        result: T = stop.value
        return result


def _count(runtime: Runtime, error: TieredSaverError) -> None:
    if isinstance(error, (HotTierUnavailableError, HotTierRejectedError)):
        runtime.counters.add("hot_errors")


def _perform(runtime: Runtime, request: Any) -> Any:
    kind = type(request)
    if kind is HotCall:
        return tier.run(runtime.client, request)
    if kind is HotRead:
        return tier.read(runtime.client, request)
    if kind is Blocking or kind is Compute:
        return request.work()
    if kind is Wait:
        return _wait(request)
    raise TypeError(f"not a request: {request!r}")


async def _aperform(runtime: Runtime, request: Any) -> Any:
    kind = type(request)
    if kind is HotCall:
        return await tier.arun(runtime.loops.current() or await runtime.loops.open(), request)
    if kind is HotRead:
        return await tier.aread(runtime.loops.current() or await runtime.loops.open(), request)
    if kind is Blocking:
        return await asyncio.wrap_future(runtime.executor.submit(request.work))
    if kind is Compute:
        # Not behind calls that wait for PostgreSQL.
        return await asyncio.wrap_future(runtime.computing.submit(request.work))
    if kind is Wait:
        return await _await(request)
    raise TypeError(f"not a request: {request!r}")


def _wait(request: Wait) -> int:
    deadline = None if request.timeout is None else time.monotonic() + request.timeout
    failure: TieredSaverError | None = None
    left = 0
    for index, ticket in enumerate(request.tickets):
        try:
            ticket.result(None if deadline is None else max(0.0, deadline - time.monotonic()))
        except TieredSaverError as error:  # some of them are a TimeoutError too
            failure = failure or error
        except concurrent.futures.TimeoutError:
            left = sum(not waiting.done() for waiting in request.tickets[index:])
            break
    if failure is not None:
        raise failure
    return left


async def _await(request: Wait) -> int:
    if not request.tickets:
        return 0
    waiting = [asyncio.wrap_future(ticket) for ticket in request.tickets]
    try:
        done, pending = await asyncio.wait(waiting, timeout=request.timeout)
    finally:
        # Each result is looked at or no longer waited for, or asyncio would complain about errors nobody saw.
        for ticket in waiting:
            ticket.cancel()
    errors = [error for ticket in done if (error := ticket.exception()) is not None]
    if errors:
        raise errors[0]
    return len(pending)
