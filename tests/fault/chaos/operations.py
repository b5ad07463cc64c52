"""The log of operations: what was asked and what was answered, by whom and when, outside the servers.

One file for each thread, one JSON object in each line. An operation begins with a line before the call and ends with
one after it; one that has no end, or ended with an error, may or may not have happened. A line is written with one
system call, before anything else is done, so that a killed process leaves no call that the log does not have.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import threading
import time
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from langgraph.checkpoint.base import WRITES_IDX_MAP, get_serializable_checkpoint_metadata
from langgraph.types import Interrupt, Send

from langgraph_tiered_saver import TieredSaver

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

    from langchain_core.runnables import RunnableConfig
    from langgraph.checkpoint.base import ChannelVersions, Checkpoint, CheckpointMetadata, CheckpointTuple

# --- digests -------------------------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """Reduce a value of the state to what JSON can say, alike before it is stored and after it was read."""
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Send):
        return {"send": value.node, "arg": plain(value.arg)}
    if isinstance(value, Interrupt):
        return {"interrupt": value.id, "value": plain(value.value)}
    return repr(value)


def digest(value: Any) -> str:
    """Give a short digest of a value."""
    text = json.dumps(plain(value), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def content_of(checkpoint: Checkpoint, metadata: Any) -> dict[str, str]:
    """Give a digest of each channel's value, and under `""` of all the rest of a checkpoint."""
    rest = {name: value for name, value in checkpoint.items() if name not in ("channel_values", "pending_sends")}
    return {"": digest([rest, metadata])} | {
        channel: digest(value) for channel, value in checkpoint["channel_values"].items()
    }


def writes_of(found: CheckpointTuple) -> list[tuple[str, str, str]]:
    """Give the task, channel and value's digest of each pending write."""
    return [(task, channel, digest(value)) for task, channel, value in found.pending_writes or ()]


# --- the log ---------------------------------------------------------------------------------------------------------


class OperationLog:
    """One process's end of the log; may be used from any thread."""

    def __init__(self, directory: Path, process: str) -> None:
        """Write to the files of a directory.

        Args:
            directory: Where the files are.
            process: A name that no other process has.
        """
        self._directory = directory
        self._process = process
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._answered = 0

    @property
    def answered(self) -> int:
        """How many operations ended without an error."""
        return self._answered

    @contextmanager
    def operation(self, kind: str, thread_id: str, **asked: Any) -> Iterator[dict[str, Any]]:
        """Log an operation around its call; what is put into the dict is logged as its answer."""
        number = f"{self._process}.{next(self._numbers)}"
        answer: dict[str, Any] = {}
        self._write(thread_id, {"op": number, "kind": kind, "began": time.monotonic_ns(), **asked})
        try:
            yield answer
        except BaseException as error:
            answer = {"error": type(error).__name__, "message": str(error)[:300]}
            raise
        finally:
            self._write(thread_id, {"op": number, "ended": time.monotonic_ns(), **answer})
            with self._lock:
                self._answered += "error" not in answer

    def _write(self, thread_id: str, line: dict[str, Any]) -> None:
        # The line break in front ends a line in whose middle another process was killed.
        data = b"\n%b\n" % json.dumps(line).encode()
        descriptor = os.open(self._directory / f"{thread_id}.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, data)
        finally:
            os.close(descriptor)


def read_log(file: Path) -> list[dict[str, Any]]:
    """Read one thread's operations, each with its answer if there is one, in the order in which they began."""
    operations: dict[str, dict[str, Any]] = {}
    with file.open("rb") as lines:
        for line in lines:
            try:
                entry = json.loads(line)
            except ValueError:  # empty, or its writer was killed in it
                continue
            operations.setdefault(entry["op"], {}).update(entry)
    # An end whose beginning was torn cannot be: the beginning was written whole before the call was made.
    return sorted(operations.values(), key=lambda entry: entry["began"])


# --- the saver that writes it ----------------------------------------------------------------------------------------


class LoggedSaver(TieredSaver):
    """A TieredSaver that logs each call before it is made and after it has returned.

    Attributes:
        log: Where to.
    """

    log: OperationLog

    def put(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        with self._putting(config, checkpoint, metadata):
            return super().put(config, checkpoint, metadata, new_versions)

    async def aput(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        with self._putting(config, checkpoint, metadata):
            return await super().aput(config, checkpoint, metadata, new_versions)

    def put_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        with self._writing(config, writes, task_id):
            super().put_writes(config, writes, task_id, task_path)

    async def aput_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        with self._writing(config, writes, task_id):
            await super().aput_writes(config, writes, task_id, task_path)

    def get_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        with self._reading(config) as answer:
            found = super().get_tuple(config)
            answer["found"] = found_as_logged(found)
            return found

    async def aget_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        with self._reading(config) as answer:
            found = await super().aget_tuple(config)
            answer["found"] = found_as_logged(found)
            return found

    def list(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> Iterator[CheckpointTuple]:
        with self._listing(config, filter, before, limit) as answer:
            found = [*super().list(config, filter=filter, before=before, limit=limit)]
            answer["found"] = [found_as_logged(one) for one in found]
        yield from found

    async def alist(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> AsyncIterator[CheckpointTuple]:
        with self._listing(config, filter, before, limit) as answer:
            found = [one async for one in super().alist(config, filter=filter, before=before, limit=limit)]
            answer["found"] = [found_as_logged(one) for one in found]
        for one in found:
            yield one

    def delete_thread(self, thread_id: str) -> None:
        with self.log.operation("delete", thread_id):
            super().delete_thread(thread_id)

    async def adelete_thread(self, thread_id: str) -> None:
        with self.log.operation("delete", thread_id):
            await super().adelete_thread(thread_id)

    # --- what is logged before the call ------------------------------------------------------------------------------

    def _putting(
        self, config: RunnableConfig, checkpoint: Checkpoint, metadata: CheckpointMetadata
    ) -> AbstractContextManager[dict[str, Any]]:
        thread_id, ns, parent = _position(config)
        return self.log.operation(
            "put",
            thread_id,
            ns=ns,
            id=checkpoint["id"],
            parent=parent,
            content=content_of(checkpoint, get_serializable_checkpoint_metadata(config, metadata)),
        )

    def _writing(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str
    ) -> AbstractContextManager[dict[str, Any]]:
        thread_id, ns, checkpoint_id = _position(config)
        return self.log.operation(
            "writes",
            thread_id,
            ns=ns,
            id=checkpoint_id,
            task=task_id,
            last=all(channel in WRITES_IDX_MAP for channel, _ in writes),
            writes=[
                (WRITES_IDX_MAP.get(channel, index), channel, digest(value))
                for index, (channel, value) in enumerate(writes)
            ],
        )

    def _reading(self, config: RunnableConfig) -> AbstractContextManager[dict[str, Any]]:
        thread_id, ns, checkpoint_id = _position(config)
        return self.log.operation("get", thread_id, ns=ns, id=checkpoint_id)

    def _listing(
        self,
        config: RunnableConfig | None,
        filter: dict[str, Any] | None,
        before: RunnableConfig | None,
        limit: int | None,
    ) -> AbstractContextManager[dict[str, Any]]:
        assert config is not None
        assert not filter
        return self.log.operation(
            "list",
            config["configurable"]["thread_id"],
            ns=config["configurable"].get("checkpoint_ns"),
            id=config["configurable"].get("checkpoint_id") or "",
            before=before["configurable"]["checkpoint_id"] if before else "",
            limit=limit,
        )


def _position(config: RunnableConfig) -> tuple[str, str, str]:
    configurable = config["configurable"]
    return configurable["thread_id"], configurable.get("checkpoint_ns") or "", configurable.get("checkpoint_id") or ""


def found_as_logged(found: CheckpointTuple | None) -> dict[str, Any] | None:
    """Give what is logged of a checkpoint that was read."""
    if found is None:
        return None
    _, ns, checkpoint_id = _position(found.config)
    return {
        "ns": ns,
        "id": checkpoint_id,
        "parent": _position(found.parent_config)[2] if found.parent_config else "",
        "content": content_of(found.checkpoint, found.metadata),
        "writes": writes_of(found),
    }
