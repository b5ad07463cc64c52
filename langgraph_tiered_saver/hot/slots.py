"""Which master of a Redis Cluster has which slot, and what to do with an answer; no input or output.

After the Redis Cluster specification (redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec).

redis-py's own cluster clients are not used: they connect when they are made, hide what the guard says while they look
for the slots, repeat time-outs, fail instead of waiting for a free connection, refuse scripts in pipelines, and the
asynchronous one may send ASKING and its command on different connections.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import redis
from redis.crc import key_slot

SLOTS = 16384

_FIRST_PAUSE = 0.002
_LONGEST_PAUSE = 0.1
_QUICK_REDIRECTS = 3
# A script that met a key which had just moved away; the declared ones were all there when it began.
_MOVED_AWAY = "non local key"

_REFUSALS = (redis.exceptions.AskError, redis.exceptions.TryAgainError, redis.exceptions.ClusterDownError)

Address = tuple[str, int]
Remap = Callable[[Address], Address]


def _unchanged(address: Address) -> Address:
    return address


class SlotMap:
    """The masters by slot, as last heard. Shared by the clients of all threads and event loops.

    Attributes:
        version: Grows with every map that was loaded, so that one of many who want a new one asks for it.
    """

    def __init__(self, seeds: Sequence[Address], remap: Remap | None = None) -> None:
        """Remember where to ask.

        Args:
            seeds: Servers of the Cluster, asked while no other ones are known.
            remap: Turns addresses that servers name into those that can be reached from here.
        """
        self.version = 0
        self._seeds = tuple(seeds)
        self._remap = remap or _unchanged
        self._owners: list[Address | None] = [None] * SLOTS
        self._suspects: frozenset[Address] = frozenset()
        self._lock = threading.Lock()

    def owner(self, slot: int) -> Address | None:
        """Give the master of a slot; None if it is not known."""
        return self._owners[slot]

    def masters(self) -> tuple[Address, ...]:
        """Give the masters that have slots."""
        return tuple(dict.fromkeys(owner for owner in self._owners if owner is not None))

    def candidates(self, failed: Address | None = None) -> list[Address]:
        """Give the servers to ask for the slots, in turn; one that has just failed comes last."""
        masters = list(self.masters())
        # So that not all clients turn to the same one.
        random.shuffle(masters)
        known = dict.fromkeys([*masters, *self._seeds])
        return sorted(known, key=lambda address: address == failed)

    def redirected(self, error: redis.exceptions.AskError, asked: Address) -> Address:
        """Read the address out of a MOVED or ASK answer."""
        # An empty host is the server's that answered.
        return self._remap((error.host or asked[0], error.port))

    def moved(self, slot: int, address: Address) -> None:
        """Note the new master of one slot."""
        self._owners[slot] = address

    def load(self, reply: Sequence[Sequence[Any]], asked: Address) -> None:
        """Take over an answer to CLUSTER SLOTS."""
        owners: list[Address | None] = [None] * SLOTS
        for first, last, master, *_ in reply:
            host = master[0].decode() if isinstance(master[0], bytes) else master[0]
            # "?" and nil: the server does not know its own name.
            address = self._remap((host if host and host != "?" else asked[0], int(master[1])))
            owners[int(first) : int(last) + 1] = [address] * (int(last) + 1 - int(first))
        with self._lock:
            self._owners, self._suspects = owners, frozenset()
            self.version += 1

    def suspect(self, address: Address) -> None:
        """Note that a server may no longer be the master of its slots."""
        with self._lock:
            self._suspects |= {address}

    def is_unsure(self, slot: int) -> bool:
        """Whether to ask for the slots before anything is sent to the master of this one."""
        owner = self._owners[slot]
        return owner is None or owner in self._suspects


@dataclass(frozen=True)
class Unit:
    """Commands that must reach one server on one connection: the first has keys, the others none (WAIT).

    Attributes:
        slot: The keys' slot.
        commands: Arguments and redis-py's options of each.
        plain: The replies are wanted as the server gives them.
    """

    slot: int
    commands: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]
    plain: bool = False


@dataclass(frozen=True)
class Exchange:
    """Request: send units to servers. The reply maps each server to its replies, or to the error that hit them all.

    Attributes:
        parts: For each server, its units, and whether each is to be announced by ASKING.
    """

    parts: Mapping[Address, Sequence[tuple[Unit, bool]]]


@dataclass(frozen=True)
class Refresh:
    """Request: load the slots anew, unless somebody did since `version`.

    Attributes:
        version: The map that did not help.
        failed: The server that did not answer.
        seconds: How long it may take.
    """

    version: int
    failed: Address | None
    seconds: float


@dataclass(frozen=True)
class Pause:
    """Request: wait for `seconds`."""

    seconds: float


Step = Exchange | Refresh | Pause
Replies = Mapping[Address, Sequence[Sequence[Any]] | Exception]


def slot_of(arguments: Sequence[Any]) -> int | None:
    """Give the slot of a command; None if it names no key."""
    name = str(arguments[0]).upper()
    if name in ("EVAL", "EVALSHA"):
        return key_slot(_bytes(arguments[3])) if int(arguments[2]) else None
    if name in _KEYLESS or len(arguments) < 2:
        return None
    return key_slot(_bytes(arguments[1]))


# Of the commands without keys, those that are of use to a checkpointer.
_KEYLESS = frozenset({"PING", "TIME", "INFO", "WAIT", "WAITAOF", "CONFIG GET", "SCRIPT LOAD", "SCRIPT EXISTS"})


def _bytes(key: Any) -> bytes:
    return key if isinstance(key, bytes) else str(key).encode()


@dataclass(eq=False)
class _Delivery:
    """How it stands with one unit."""

    unit: Unit
    result: Any = None
    done: bool = False
    asking: Address | None = None
    lost_at: Address | None = None
    redirects: int = 0

    def end(self, result: Any) -> None:
        self.result, self.done = result, True


def deliver(
    slots: SlotMap, units: Sequence[Unit], seconds: float, *, clock: Callable[[], float] = time.monotonic
) -> Generator[Step, Any, list[Any]]:
    """Send units to where their keys are, and send those again that a server sent elsewhere or put off.

    Args:
        slots: The masters; it learns from the answers.
        units: What to send. Those of one slot keep their order unless a server sends some of them elsewhere.
        seconds: How long to go on after answers that pass by themselves (TRYAGAIN, CLUSTERDOWN).
        clock: Tells the time in seconds.

    Returns:
        For each unit its list of replies, errors of the server among them; or the error that kept it from being sent.
    """
    deadline = clock() + seconds
    deliveries = waiting = [_Delivery(unit) for unit in units]
    version, pause = slots.version, _FIRST_PAUSE
    while waiting:
        unsure = [each for each in waiting if each.asking is None and slots.is_unsure(each.unit.slot)]
        if unsure or any(each.lost_at for each in waiting):
            failed = next((each.lost_at for each in waiting if each.lost_at), None)
            error = yield Refresh(version, failed or slots.owner(unsure[0].unit.slot), max(0.0, deadline - clock()))
            for each in waiting:
                if error is not None and (each in unsure or each.lost_at):
                    each.end(each.result or error)
                elif each.lost_at and slots.owner(each.unit.slot) in (each.lost_at, None):
                    each.end(each.result)
                each.lost_at = None
        version, put_off = slots.version, False
        parts: dict[Address, list[_Delivery]] = {}
        for each in waiting:
            if each.done:
                continue
            if (address := each.asking or slots.owner(each.unit.slot)) is None:
                each.result = redis.exceptions.ClusterDownError(f"slot {each.unit.slot} has no master")
                put_off = True
            else:
                parts.setdefault(address, []).append(each)
        if parts:
            replies: Replies = yield Exchange(
                {address: [(each.unit, each.asking is not None) for each in part] for address, part in parts.items()}
            )
            for address, part in parts.items():
                answer = replies[address]
                for index, each in enumerate(part):
                    result = answer if isinstance(answer, Exception) else answer[index]
                    put_off = _judge(slots, each, address, result) or put_off
        waiting = [each for each in waiting if not each.done]
        if (left := deadline - clock()) <= 0:
            break
        if waiting and put_off:
            yield Pause(min(pause * random.uniform(0.5, 1.0), left))  # noqa: S311 - jitter
            pause = min(2 * pause, _LONGEST_PAUSE)
    for each in waiting:
        refusal = _refusal(each.result)
        if refusal is not None and not isinstance(refusal, redis.exceptions.ClusterDownError):
            each.result = redis.exceptions.TryAgainError(f"slot {each.unit.slot} moves, for more than {seconds:g} s")
    return [each.result for each in deliveries]


def _judge(slots: SlotMap, each: _Delivery, address: Address, result: Any) -> bool:
    """Decide what comes of an answer: the end, or another round, and whether that is to wait a moment."""
    asked, each.asking = each.asking, None
    each.result = result
    if isinstance(result, (redis.ConnectionError, OSError)):
        slots.suspect(address)
        each.lost_at, each.done = address, asked is not None
        return False
    if isinstance(result, Exception):
        if isinstance(result, redis.TimeoutError):
            # It has waited as long as one may; whoever comes next looks for another master first.
            slots.suspect(address)
        each.done = True
        return False
    refusal = _refusal(result)
    if refusal is None:
        each.done = True
        return False
    if isinstance(refusal, redis.exceptions.AskError):
        each.redirects += 1
        target = slots.redirected(refusal, address)
        if isinstance(refusal, redis.exceptions.MovedError):
            slots.moved(each.unit.slot, target)
        else:
            each.asking = target
        return each.redirects > _QUICK_REDIRECTS
    if isinstance(refusal, redis.exceptions.ClusterDownError):
        slots.suspect(address)
    return True


def _refusal(result: Any) -> Exception | None:
    """Find the answer that a command must go elsewhere, or come again."""
    for reply in result if isinstance(result, list) else ():
        if isinstance(reply, _REFUSALS) or (isinstance(reply, redis.ResponseError) and _MOVED_AWAY in str(reply)):
            return reply
    return None
