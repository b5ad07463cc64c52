"""What is stored at the end: read by a PostgresSaver and by a new TieredSaver, in a process of its own.

`python -m tests.fault.chaos.audit OPTIONS`, the options as JSON, writes one JSON line for each thread.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer

from langgraph_tiered_saver import TieredSaver
from tests.fault.chaos.operations import digest, found_as_logged, read_log
from tests.fault.chaos.oracle import Found

if TYPE_CHECKING:
    from collections.abc import Iterator

_WRITES = """
SELECT checkpoint_ns, checkpoint_id, task_id, idx, channel, type, blob FROM checkpoint_writes WHERE thread_id = %s"""

# `tiered_blobs` says how many of a checkpoint's channels have a blob; a checkpoint that PostgresSaver wrote has NULL.
_MISSING_BLOBS = """
SELECT * FROM (
    SELECT checkpoint_ns, checkpoint_id, tiered_blobs AS wanted, (
        SELECT count(*) FROM jsonb_each_text(c.checkpoint -> 'channel_versions') AS v
        JOIN checkpoint_blobs AS b
            ON (b.thread_id, b.checkpoint_ns, b.channel, b.version) = (c.thread_id, c.checkpoint_ns, v.key, v.value)
    ) AS there
    FROM public.checkpoints AS c WHERE thread_id = %s AND tiered_blobs IS NOT NULL
) AS counted WHERE there < wanted"""


@dataclass
class Auditor:
    """Reads threads from both savers and by SQL."""

    connection: psycopg.Connection[tuple[Any, ...]]
    cold: PostgresSaver
    tiered: TieredSaver
    counts_blobs: bool

    def look(self, thread_id: str, namespaces: set[str]) -> Found:
        """Read everything that is stored of a thread.

        Args:
            thread_id: The thread.
            namespaces: Those that were ever written.
        """
        found = Found()
        config: Any = {"configurable": {"thread_id": thread_id}}
        cold = {}
        for one in map(found_as_logged, self.cold.list(config)):
            assert one is not None
            key = one["ns"], one["id"]
            cold[key] = one
            found.checkpoints[key] = one["parent"], one["content"]
        serde = JsonPlusSerializer()
        for ns, checkpoint_id, task, index, channel, type_, blob in self.connection.execute(_WRITES, (thread_id,)):
            value = serde.loads_typed((type_, blob))
            found.writes[ns, checkpoint_id, task, index] = channel, digest(value)
        if self.counts_blobs:
            for ns, checkpoint_id, wanted, there in self.connection.execute(_MISSING_BLOBS, (thread_id,)):
                found.missing_blobs.append(f"{ns or 'root'}/{checkpoint_id} has {there} of {wanted} blobs")
        found.differences += self._differences(thread_id, namespaces, cold)
        return found

    def _differences(
        self, thread_id: str, namespaces: set[str], cold: dict[tuple[str, str], dict[str, Any]]
    ) -> Iterator[str]:
        """Compare with what a new TieredSaver gives: the list, and the latest of each namespace."""
        config: Any = {"configurable": {"thread_id": thread_id}}
        listed = {(one["ns"], one["id"]): one for one in map(found_as_logged, self.tiered.list(config)) if one}
        for key in sorted(cold.keys() | listed.keys()):
            if cold.get(key) != listed.get(key):
                yield f"{key[0] or 'root'}/{key[1]} is listed differently: {listed.get(key)} instead of {cold.get(key)}"
        for ns in sorted(namespaces | {ns for ns, _ in cold}):
            newest = max((checkpoint_id for of, checkpoint_id in cold if of == ns), default=None)
            latest = found_as_logged(
                self.tiered.get_tuple({"configurable": {"thread_id": thread_id, "checkpoint_ns": ns}})
            )
            wanted = cold[ns, newest] if newest else None
            if latest != wanted:
                yield f"the latest of {ns or 'root'} is {latest} instead of {wanted}"


def audit(redis_url: str, postgres_url: str, settings: dict[str, Any], operations: Path, output: Path) -> None:
    """Look at every thread that the log knows."""
    # Through the views, which show values whole however they are stored.
    views_url = f"{postgres_url}?options=-csearch_path%3Dpublic_whole,public"
    with (
        psycopg.connect(views_url, autocommit=True) as connection,
        PostgresSaver.from_conn_string(views_url) as cold,
        TieredSaver.from_conn_string(redis_url, postgres_url, **settings) as tiered,
        output.open("w") as lines,
    ):
        row = connection.execute(
            "SELECT count(*) FROM information_schema.columns WHERE column_name = 'tiered_blobs'"
        ).fetchone()
        auditor = Auditor(connection, cold, tiered, bool(row and row[0]))
        for file in sorted(operations.glob("*.jsonl")):
            thread_id = file.stem
            namespaces = {entry["ns"] for entry in read_log(file) if entry["kind"] == "put"}
            lines.write(json.dumps([thread_id, as_json(auditor.look(thread_id, namespaces))]) + "\n")


def as_json(found: Found) -> dict[str, Any]:
    """Give everything as JSON can hold it."""
    return {
        "checkpoints": [[*key, *value] for key, value in found.checkpoints.items()],
        "writes": [[*key, *value] for key, value in found.writes.items()],
        "differences": found.differences,
        "missing_blobs": found.missing_blobs,
    }


def read_audit(file: Path) -> Iterator[tuple[str, Found]]:
    """Read what `audit` wrote: each thread, and what is stored of it."""
    with file.open() as lines:
        for line in lines:
            thread_id, found = json.loads(line)
            yield (
                thread_id,
                Found(
                    {(ns, one): (parent, content) for ns, one, parent, content in found["checkpoints"]},
                    {
                        (ns, one, task, index): (channel, value)
                        for ns, one, task, index, channel, value in found["writes"]
                    },
                    found["differences"],
                    found["missing_blobs"],
                ),
            )


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    audit(
        given["redis_url"],
        given["postgres_url"],
        given["settings"],
        Path(given["operations"]),
        Path(given["output"]),
    )
