"""What the users of an embedded directory share, and how to tell which of them live."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from langgraph_tiered_saver.errors import EmbeddedServerError

if TYPE_CHECKING:
    import psutil


class State:
    """What the users of a directory share, in `state.json`; read and written under the directory's lock."""

    def __init__(self, home: Path) -> None:
        self.file = home / "state.json"
        self.password, self.port = secrets.token_urlsafe(32), 0
        self.users: list[dict[str, Any]] = []
        if not self.file.exists():
            return
        try:
            values = json.loads(self.file.read_bytes())
            self.password, self.port = values["password"], values["port"]
            self.users = [user for user in values["users"] if _is_user(user)]
        except (ValueError, KeyError, TypeError):
            advice = "It holds no data: end its directory's users, delete the file and start again."
            raise EmbeddedServerError(f"{self.file} is damaged. {advice}") from None

    def save(self) -> None:
        """Write the state, readable by its owner only."""
        values = {"password": self.password, "port": self.port, "users": self.users}
        write_private(self.file, json.dumps(values))

    def add_user(self) -> str:
        """Count this process as a user once more; the token names this use."""
        token = uuid.uuid4().hex
        self.users.append({"token": token, "pid": os.getpid(), "started": _started(os.getpid())})
        return token


def is_alive(process: psutil.Process | None) -> bool:
    """Whether a process runs; a zombie does not."""
    import psutil

    with contextlib.suppress(psutil.Error):
        return process is not None and process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _started(pid: int) -> float:
    """When a process started, in seconds after the boot: its time of day moves when the clock is set."""
    import psutil

    booted: float = psutil.boot_time()
    return float(psutil.Process(pid).create_time()) - booted


def _is_user(user: dict[str, Any]) -> bool:
    import psutil

    with contextlib.suppress(psutil.Error):
        return is_alive(psutil.Process(user["pid"])) and abs(_started(user["pid"]) - user["started"]) < 2.0
    return False


def write_private(file: Path, text: str) -> None:
    """Replace a file atomically by one that only its owner can read."""
    new = file.with_suffix(".new")
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    new.replace(file)
