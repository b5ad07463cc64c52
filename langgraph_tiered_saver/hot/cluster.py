"""Synchronous clients of a Redis Cluster."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import redis
from redis.commands import CoreCommands

from langgraph_tiered_saver.config import TieredConfig
from langgraph_tiered_saver.errors import ConfigurationError
from langgraph_tiered_saver.hot import options
from langgraph_tiered_saver.hot.guard import ConnectFunction
from langgraph_tiered_saver.hot.slots import Address, Exchange, Refresh, SlotMap, Unit, deliver, slot_of

_Commands: Any = CoreCommands  # their types are those of clients with one server

# What a server may answer with, or a connection may fail with; UnicodeError for a host name that cannot be encoded.
ERRORS = (redis.RedisError, OSError, UnicodeError)
_SHORTEST_TIMEOUT = 0.05


@dataclass(frozen=True)
class Site:
    """How to reach a Cluster.

    Attributes:
        slots: The masters.
        kind: Class of the connections.
        connection: Options of the connections, without host and port.
        connect: What a new connection calls before it takes commands; see `guard.connect_function`.
        config: Time-outs, retries and pool sizes; the pools are as large for each master.
    """

    slots: SlotMap
    kind: type
    connection: Mapping[str, Any] = field(repr=False)  # it holds the password
    connect: ConnectFunction | None
    config: TieredConfig

    def of_node(self, address: Address) -> dict[str, Any]:
        """Give the options of a pool of connections to one server."""
        host, port = address
        return {
            **options.of_pools(self.config),
            **self.connection,
            "connection_class": self.kind,
            "host": host,
            "port": port,
            "redis_connect_func": self.connect,
        }

    def of_question(self, address: Address, seconds: float) -> dict[str, Any]:
        """Give the options of a pool for one question about the slots, to a server that may be a replica."""
        # The guard is not asked: it knows masters only, and no data comes this way.
        host, port = address
        timeouts = dict.fromkeys(("socket_timeout", "socket_connect_timeout"), max(_SHORTEST_TIMEOUT, seconds))
        connection = {name: value for name, value in self.connection.items() if name != "timeout"}  # of a blocking pool
        return {**connection, **timeouts, "connection_class": self.kind, "host": host, "port": port}


def learn(site: Site, asked: Address, reply: Any) -> None:
    """Take over an answer to CLUSTER SLOTS.

    Raises:
        ConfigurationError: the server is no part of a Cluster.
    """
    if isinstance(reply, redis.ResponseError) and "cluster support disabled" in str(reply):
        raise ConfigurationError(
            f"The Redis server at {asked[0]}:{asked[1]} is not part of a Cluster; nothing was written. "
            "Use a redis:// URL, or redis.Redis, for a single server."
        )
    if isinstance(reply, Exception):
        raise reply
    site.slots.load(reply, asked)


class ClusterClient(_Commands):  # type: ignore[misc]
    """Commands with keys, sent to the masters that have them; and the few without that `info` and pipelines know.

    Safe to use from many threads. Makes a pool of connections for each master, and connects when it is first used.

    Attributes:
        site: How it reaches the Cluster.
    """

    def __init__(self, site: Site) -> None:
        """Remember how to connect."""
        self.site = site
        self._nodes: dict[Address, Any] = {}
        self._lock = threading.Lock()
        self._refreshing = threading.Lock()
        self._attempts = 0
        self._problem: Exception | None = None

    def execute_command(self, *arguments: Any, **given: Any) -> Any:
        """Run a command that names a key.

        Raises:
            redis.RedisError, OSError: as `redis.Redis` does; `TryAgainError` or `ClusterDownError` when a slot moved or
                had no master for longer than `redis_timeout`.
            ConfigurationError: the servers are no Cluster.
        """
        return first(self.deliver([unit_of(arguments, given)])[0])

    def exchange(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Send commands with keys of one slot in one round trip; see `lanes.LaneClient.exchange`."""
        return replies_of(self.deliver([unit_of_many(commands)])[0])

    def pipeline(self, transaction: bool = False) -> ClusterPipeline:
        """Collect commands that are sent in one round trip for each master."""
        if transaction:
            raise redis.exceptions.RedisClusterException("A transaction cannot span the servers of a Cluster.")
        return ClusterPipeline(self)

    def info(self, section: str | None = None, *sections: str, **given: Any) -> dict[str, Any]:
        """Ask every master; the result maps `host:port` to what `redis.Redis.info` returns."""
        return self.on_masters("INFO", *([section] if section else []), *sections, **given)

    def on_masters(self, *arguments: Any, **given: Any) -> dict[str, Any]:
        """Run a command without keys on every master that has slots now, one after the other."""
        slots = self.site.slots
        if (error := self._refresh(Refresh(slots.version, None, self.site.config.redis_timeout))) is not None:
            raise error
        return {f"{at[0]}:{at[1]}": self._node(at).execute_command(*arguments, **given) for at in slots.masters()}

    def reconnect(self) -> None:
        """Close the idle connections."""
        for node in list(self._nodes.values()):
            node.give_back()
            options.close_idle(node.connection_pool)

    def close(self) -> None:
        """Close every connection. A later command opens new ones."""
        with self._lock:
            nodes, self._nodes = self._nodes, {}
        for node in nodes.values():
            node.close()

    def deliver(self, units: Sequence[Unit]) -> list[Any]:
        """Send units; see `slots.deliver` for what comes back."""
        steps = deliver(self.site.slots, units, self.site.config.redis_timeout)
        answer: Any = None
        try:
            while True:
                step = steps.send(answer)
                if isinstance(step, Exchange):
                    answer = {address: self._send(address, part) for address, part in step.parts.items()}
                elif isinstance(step, Refresh):
                    answer = self._refresh(step)
                else:
                    time.sleep(step.seconds)
        except StopIteration as stop:
            results: list[Any] = stop.value
            return results

    def _send(self, address: Address, part: Sequence[tuple[Unit, bool]]) -> list[list[Any]] | Exception:
        node = self._node(address)
        try:
            if (plain := plain_commands(part)) is not None:
                return [node.exchange(plain)[len(plain) - len(part[0][0].commands) :]]
            if (command := alone(part)) is not None:
                try:
                    return [[node.execute_command(*command[0], **command[1])]]
                except redis.ResponseError as error:
                    return [[error]]
            pipeline = node.pipeline(transaction=False)
            fill(pipeline, part)
            return split(part, pipeline.execute(raise_on_error=False))
        except ERRORS as error:
            return error

    def _node(self, address: Address) -> Any:
        node = self._nodes.get(address)
        if node is None:
            with self._lock:
                node = self._nodes.get(address)
                if node is None:
                    config = self.site.config
                    make: Any = redis.BlockingConnectionPool
                    node = options.client_of(make(**self.site.of_node(address), retry=options.retries(config)))
                    self._nodes[address] = node
        return node

    def _refresh(self, request: Refresh) -> Exception | None:
        """Load the slots anew; None, or what went wrong with the last server that was asked."""
        slots, deadline, attempts = self.site.slots, time.monotonic() + request.seconds, self._attempts
        if not self._refreshing.acquire(timeout=request.seconds):
            return redis.TimeoutError("Nobody told in time which Redis server has which slot")
        try:
            if slots.version != request.version:
                return None
            if self._attempts == attempts:
                # Else somebody tried in vain while this call waited; its turn would only take as long again.
                self._problem = self._ask_in_turn(slots.candidates(request.failed), deadline)
                self._attempts += 1
            return self._problem
        finally:
            self._refreshing.release()

    def _ask_in_turn(self, candidates: Sequence[Address], deadline: float) -> Exception | None:
        problem: Exception | None = None
        for index, address in enumerate(candidates):
            seconds = (deadline - time.monotonic()) / (len(candidates) - index)
            if problem is not None and seconds <= 0:
                break
            if (problem := self._ask(address, seconds)) is None:
                self._forget(self.site.slots.masters())
                break
        return problem

    def _ask(self, address: Address, seconds: float) -> Exception | None:
        make: Any = redis.ConnectionPool
        client: Any = redis.Redis.from_pool(make(**self.site.of_question(address, seconds), retry=options.none()))
        try:
            try:
                reply = client.execute_command("CLUSTER", "SLOTS")
            except redis.ResponseError as refusal:
                reply = refusal
            learn(self.site, address, reply)
        except (*ERRORS, ConfigurationError) as error:
            return error
        finally:
            client.close()
        return None

    def _forget(self, masters: Sequence[Address]) -> None:
        """Let go of servers that are no longer masters; their connections close when nobody uses them any more."""
        with self._lock:
            self._nodes = {address: node for address, node in self._nodes.items() if address in masters}


class ClusterPipeline(_Commands):  # type: ignore[misc]
    """Commands that are sent in one round trip for each master. One without keys (WAIT) goes with the one before it."""

    def __init__(self, client: ClusterClient) -> None:
        """Begin empty."""
        self._client = client
        self._units: list[Unit] = []

    def execute_command(self, *arguments: Any, **given: Any) -> ClusterPipeline:
        """Add a command."""
        add(self._units, arguments, given)
        return self

    def execute(self, raise_on_error: bool = True) -> list[Any]:
        """Send the commands, and empty the pipeline.

        Args:
            raise_on_error: Raise the first error. If not, errors stand among the replies.
        """
        units, self._units = self._units, []
        return flatten(units, self._client.deliver(units) if units else [], raise_on_error=raise_on_error)


def is_cluster(client: Any) -> bool:
    """Whether `info` of a synchronous client tells of several servers."""
    return isinstance(client, (ClusterClient, redis.RedisCluster))


# --- shared with the asynchronous client -----------------------------------------------------------------------------


def unit_of(arguments: tuple[Any, ...], given: dict[str, Any]) -> Unit:
    """Make a unit of one command with keys."""
    if (slot := slot_of(arguments)) is None:
        raise redis.exceptions.RedisClusterException(f"{arguments[0]} names no key, so no server of the Cluster has it")
    return Unit(slot, [(arguments, given)])


def unit_of_many(commands: Sequence[tuple[Any, ...]]) -> Unit:
    """Make a unit of commands with keys of one slot; the replies come as the server gives them."""
    return Unit(unit_of(commands[0], {}).slot, [(command, {}) for command in commands], plain=True)


def plain_commands(part: Sequence[tuple[Unit, bool]]) -> list[tuple[Any, ...]] | None:
    """Give the commands of a unit whose replies are wanted as they are, if it is the only one."""
    unit, asking = part[0]
    if len(part) > 1 or not unit.plain:
        return None
    commands = [arguments for arguments, _ in unit.commands]
    return [("ASKING",), *commands] if asking else commands


def replies_of(result: Any) -> list[Any]:
    """Give the replies of a unit, errors of single commands among them, or raise what kept it from the server."""
    if isinstance(result, Exception):
        raise result
    replies: list[Any] = result
    return replies


def add(units: list[Unit], arguments: tuple[Any, ...], given: dict[str, Any]) -> None:
    """Add a command to a pipeline's units; without keys it joins the last one."""
    if units and slot_of(arguments) is None:
        units[-1] = Unit(units[-1].slot, [*units[-1].commands, (arguments, given)])
    else:
        units.append(unit_of(arguments, given))


def alone(part: Sequence[tuple[Unit, bool]]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Give the command if it is the only one, which is cheaper without a pipeline."""
    if len(part) > 1 or part[0][1] or len(part[0][0].commands) > 1:
        return None
    return part[0][0].commands[0]


def fill(pipeline: Any, part: Sequence[tuple[Unit, bool]]) -> None:
    """Put one server's units into a pipeline of redis-py's."""
    for unit, asking in part:
        if asking:
            pipeline.execute_command("ASKING")
        for arguments, given in unit.commands:
            pipeline.execute_command(*arguments, **given)


def split(part: Sequence[tuple[Unit, bool]], replies: Sequence[Any]) -> list[list[Any]]:
    """Give each unit its replies."""
    results, at = [], 0
    for unit, asking in part:
        at += asking
        results.append(list(replies[at : at + len(unit.commands)]))
        at += len(unit.commands)
    return results


def first(result: Any) -> Any:
    """Give the reply of a unit of one command, or raise its error."""
    reply = result if isinstance(result, Exception) else result[0]
    if isinstance(reply, Exception):
        raise reply
    return reply


def flatten(units: Sequence[Unit], results: Sequence[Any], *, raise_on_error: bool) -> list[Any]:
    """Give a pipeline's replies in the order of its commands."""
    replies: list[Any] = []
    for unit, result in zip(units, results, strict=True):
        replies += [result] * len(unit.commands) if isinstance(result, Exception) else result
    if raise_on_error:
        for reply in replies:
            if isinstance(reply, Exception):
                raise reply
    return replies
