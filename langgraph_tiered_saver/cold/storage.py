"""Compact storage seen from outside: SQL that makes deltas whole, and views that look like PostgresSaver's tables.

`checkpoint_blobs` holds whole values, `tiered_deltas` what was stored as a delta. The views, in a schema of their own,
show both as whole values, so that PostgresSaver's reader with its `search_path` set there, and SQL, see no difference.

Our own reads go through the library's methods on the same views. They ask for deltas instead of values (`RAW`), because
Python puts values together faster, and checks their digests, which SQL cannot.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import psycopg
from langgraph.checkpoint.serde.base import SerializerProtocol
from psycopg import sql

from langgraph_tiered_saver import deltas
from langgraph_tiered_saver.cold.pool import Connection
from langgraph_tiered_saver.deltas import BrokenDeltaError
from langgraph_tiered_saver.errors import ColdTierRejectedError, DamagedValueError
from langgraph_tiered_saver.records import TypedValue, unframe

logger = logging.getLogger(__name__)

T = TypeVar("T")

VIEWS_SUFFIX = "_whole"
_IDENTIFIER_BYTES = 63
_LEAST_SERVER = 140000  # SQL functions whose names are resolved when they are made

# In place of a value's type: the value is a chain, framed as in `records`, a whole value first.
_CHAIN = "tiered-chain:"

READ_RECORDED = """
SELECT (SELECT value FROM tiered_state WHERE name = 'storage') AS storage,
    (SELECT value FROM tiered_state WHERE name = 'views') AS views"""

# In the transaction that stores the first delta, so that nobody sees one without it.
MARK_COMPACT = """
INSERT INTO tiered_state (name, value) VALUES ('storage', 'compact')
ON CONFLICT (name) DO UPDATE SET value = 'compact' WHERE tiered_state.value <> 'compact'"""

# Only for the current transaction, so that a pooled connection never keeps it.
_ENTER = "SELECT set_config('search_path', %s, true), set_config('tiered.raw', 'on', true)"

# Applies deltas one after another to the first piece, which is whole. The layout is that of `deltas.HEADER`; the
# digest, in the bytes from 25 to 32, cannot be checked here. A delta that appends, as nearly all do, adds to the tails
# only, so that a chain of them copies the value once instead of once for each: 1 ms instead of 70 for 60 deltas of
# 300 KB.
_FOLD = """
CREATE OR REPLACE FUNCTION {schema}.tiered_fold(pieces bytea[]) RETURNS bytea
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE AS $$
DECLARE
    head bytea := '';
    body bytea := pieces[1];
    tails bytea[] := '{{}}';
    size int := octet_length(body);
    delta bytea;
    header bit(192);
    heads int;
    first_at int;
    first int;
    second_at int;
    second int;
BEGIN
    FOR number IN 2 .. cardinality(pieces) LOOP
        delta := pieces[number];
        header := ('x' || encode(substr(delta, 1, 24), 'hex'))::bit(192);
        heads := substring(header, 1, 32)::int;
        first_at := substring(header, 33, 32)::int;
        first := substring(header, 65, 32)::int;
        second_at := substring(header, 97, 32)::int;
        second := substring(header, 129, 32)::int;
        IF second = 0 AND first_at + first = size AND first_at = octet_length(head) THEN
            tails := array_append(tails, substr(delta, 33 + heads));
        ELSIF second = 0 AND first_at + first = size AND number = 2 THEN
            body := substr(body, first_at + 1);
            tails := array_append(tails, substr(delta, 33 + heads));
        ELSE
            body := head || body || (
                SELECT coalesce(string_agg(t.piece, '' ORDER BY t.number), '')
                FROM unnest(tails) WITH ORDINALITY AS t (piece, number));
            body := substr(body, first_at + 1, first) || substr(delta, 33 + heads)
                || substr(body, second_at + 1, second);
            tails := '{{}}';
        END IF;
        head := substr(delta, 33, heads);
        size := substring(header, 161, 32)::int;
    END LOOP;
    RETURN head || body || (
        SELECT coalesce(string_agg(t.piece, '' ORDER BY t.number), '')
        FROM unnest(tails) WITH ORDINALITY AS t (piece, number));
END $$"""

# A chain from a version down to a whole value. Its names are resolved when a function is made, whatever the
# search_path is when it runs.
_CHAIN_OF = """WITH RECURSIVE chain (step, base, delta) AS (
        SELECT 1, d.base, d.delta FROM {schema}.tiered_deltas d
        WHERE d.thread_id = $1 AND d.checkpoint_ns = $2 AND d.channel = $3 AND d.version = $4
        UNION ALL
        SELECT c.step + 1, next.base, next.delta FROM chain c CROSS JOIN LATERAL (
            SELECT d.base, d.delta FROM {schema}.tiered_deltas d
            WHERE d.thread_id = $1 AND d.checkpoint_ns = $2 AND d.channel = $3 AND d.version = c.base LIMIT 1
        ) AS next WHERE c.step < 4096
    ), pieces (step, is_whole, data) AS (
        SELECT c.step, false, c.delta FROM chain c
        UNION ALL
        SELECT c.step + 1, true, b.blob FROM chain c JOIN {schema}.checkpoint_blobs b
            ON b.thread_id = $1 AND b.checkpoint_ns = $2 AND b.channel = $3 AND b.version = c.base
    )"""

# Null, which no reader takes for a value, if the chain does not reach a whole value.
_WHOLE = """
CREATE OR REPLACE FUNCTION {schema}.tiered_whole(thread_id text, checkpoint_ns text, channel text, version text)
RETURNS bytea LANGUAGE sql STABLE STRICT PARALLEL SAFE
BEGIN ATOMIC
    {chain}
    SELECT CASE WHEN bool_or(is_whole) THEN {schema}.tiered_fold(array_agg(data ORDER BY step DESC)) END FROM pieces;
END""".replace("{chain}", _CHAIN_OF)

# The same pieces, each with its length in front, for Python.
_PIECES = """
CREATE OR REPLACE FUNCTION {schema}.tiered_pieces(thread_id text, checkpoint_ns text, channel text, version text)
RETURNS bytea LANGUAGE sql STABLE STRICT PARALLEL SAFE
BEGIN ATOMIC
    {chain}
    SELECT CASE WHEN bool_or(is_whole)
        THEN string_agg(int4send(octet_length(data)) || data, ''::bytea ORDER BY step DESC) END FROM pieces;
END""".replace("{chain}", _CHAIN_OF)

# The values are made above the union: below it, they would be made of every version that a join looks at.
_VIEWS = (
    """
CREATE OR REPLACE VIEW {views}.checkpoint_blobs AS
SELECT thread_id, checkpoint_ns, channel, version,
    CASE WHEN is_delta AND current_setting('tiered.raw', true) = 'on' THEN 'tiered-chain:' || type ELSE type END
        AS type,
    CASE WHEN NOT is_delta THEN blob
        WHEN current_setting('tiered.raw', true) = 'on'
            THEN {schema}.tiered_pieces(thread_id, checkpoint_ns, channel, version)
        ELSE {schema}.tiered_whole(thread_id, checkpoint_ns, channel, version) END AS blob
FROM (
    SELECT thread_id, checkpoint_ns, channel, version, type, blob, false AS is_delta FROM {schema}.checkpoint_blobs
    UNION ALL
    SELECT thread_id, checkpoint_ns, channel, version, type, NULL::bytea, true FROM {schema}.tiered_deltas
) AS stored""",
    """
CREATE OR REPLACE VIEW {views}.checkpoints AS
SELECT thread_id, checkpoint_ns, checkpoint_id, parent_checkpoint_id, type, checkpoint, metadata
FROM {schema}.checkpoints""",
    """
CREATE OR REPLACE VIEW {views}.checkpoint_writes AS
SELECT thread_id, checkpoint_ns, checkpoint_id, task_id, idx, channel, type, blob, task_path
FROM {schema}.checkpoint_writes""",
    "CREATE OR REPLACE VIEW {views}.checkpoint_migrations AS SELECT v FROM {schema}.checkpoint_migrations",
)

# PostgreSQL would pass on what is written to a view of a single table.
_READ_ONLY = (
    """
CREATE OR REPLACE FUNCTION {schema}.tiered_read_only() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'the views of whole values are read-only'
        USING ERRCODE = 'read_only_sql_transaction', HINT = 'Write through TieredSaver.';
END $$""",
    *(
        "CREATE OR REPLACE TRIGGER tiered_read_only INSTEAD OF INSERT OR UPDATE OR DELETE ON {views}."
        f"{name} FOR EACH ROW EXECUTE FUNCTION {{schema}}.tiered_read_only()"
        for name in ("checkpoint_blobs", "checkpoints", "checkpoint_writes", "checkpoint_migrations")
    ),
)

_TABLES_SCHEMA = """
SELECT nspname AS name FROM pg_class JOIN pg_namespace n ON n.oid = relnamespace
WHERE pg_class.oid = 'tiered_deltas'::regclass"""

_RECORD_VIEWS = """
INSERT INTO tiered_state (name, value) VALUES ('views', %s) ON CONFLICT (name) DO UPDATE SET value = EXCLUDED.value"""


def views_name(schema: str) -> str:
    """Name the schema of the views: the tables' with `_whole` behind it.

    A name that would be too long is cut, and six digits of its MD5 digest come before the suffix.
    """
    if len((schema + VIEWS_SUFFIX).encode()) <= _IDENTIFIER_BYTES:
        return schema + VIEWS_SUFFIX
    digest = "_" + hashlib.md5(schema.encode(), usedforsecurity=False).hexdigest()[:6]
    room = _IDENTIFIER_BYTES - len(VIEWS_SUFFIX) - len(digest)
    return schema.encode()[:room].decode(errors="ignore") + digest + VIEWS_SUFFIX


def recorded(connection: Connection) -> str | None:
    """Give the recorded storage: `"standard"` says that there is no delta, `"compact"` that there may be."""
    row = connection.execute(READ_RECORDED).fetchone()
    return row["storage"] if row else None


def create_views(connection: Connection) -> str:
    """Create or replace the functions and the views that compact storage is read through.

    Needs the right to create a schema in the database, or that the schema is there and ours.

    Args:
        connection: In autocommit mode, the tables made.

    Returns:
        The views' schema.

    Raises:
        ColdTierRejectedError: the server is too old.
        psycopg.Error: PostgreSQL refused; nothing was changed.
    """
    if connection.info.server_version < _LEAST_SERVER:
        raise ColdTierRejectedError(
            "storage='compact' needs PostgreSQL 14 or later. Nothing was changed; use storage='standard', or upgrade "
            "the server."
        )
    row = connection.execute(_TABLES_SCHEMA).fetchone()
    assert row is not None  # noqa: S101 - the name was resolved
    name = views_name(row["name"])
    names = {"schema": sql.Identifier(row["name"]), "views": sql.Identifier(name)}
    with connection.transaction():
        if not connection.execute("SELECT 1 AS one FROM pg_namespace WHERE nspname = %s", (name,)).fetchone():
            connection.execute(sql.SQL("CREATE SCHEMA {views}").format(**names))
        for statement in (_FOLD, _WHOLE, _PIECES, *_VIEWS, *_READ_ONLY):
            connection.execute(sql.SQL(statement).format(**names))
        connection.execute(_RECORD_VIEWS, (name,))
    return name


# --- reading ---------------------------------------------------------------------------------------------------------

# The connections on which deltas may be met, with the views' schema. Whether that was right is found out after each
# read: a delta and the mark that there are some become visible together. A user's pool may serve several schemas.
_views: WeakKeyDictionary[Connection, str] = WeakKeyDictionary()


def read(
    connection: Connection, work: Callable[[Connection], T], look: Callable[[Connection], Mapping[str, Any] | None]
) -> T:
    """Read with the library's methods, from the tables or, if there may be deltas, through the views.

    Args:
        connection: In autocommit mode.
        work: Reads; the serializer must be a `ChainSerializer`.
        look: Is called after it; gives at least the columns of `READ_RECORDED`, so that this costs no round trip of
            its own.

    Raises:
        DamagedValueError: a value cannot be rebuilt from its deltas.
    """
    while True:
        views = _views.get(connection)
        if views is None:
            found = work(connection)
        else:
            with _through_views(connection, views):
                found = work(connection)
        row = look(connection)
        right = row["views"] if row and row["storage"] == "compact" else None
        if right == views:
            return found
        if right is None:
            del _views[connection]
        else:
            _views[connection] = right


@contextmanager
def _through_views(connection: Connection, views: str) -> Iterator[None]:
    """Let unqualified names mean the views, and nothing else, for one transaction."""
    path = sql.Identifier(views).as_string(connection)
    pipeline = connection.pipeline() if psycopg.capabilities.has_pipeline() else nullcontext()
    with pipeline, connection.transaction():
        connection.execute(_ENTER, (path,))
        yield


class ChainSerializer:
    """Puts values together that the views hand out in pieces, before another serializer reads them."""

    def __init__(self, serde: SerializerProtocol) -> None:
        self._serde = serde

    def loads_typed(self, data: TypedValue) -> Any:
        """Read a value.

        Raises:
            DamagedValueError: its pieces do not make the value that was stored.
        """
        return self._serde.loads_typed(whole(data))

    def dumps_typed(self, obj: Any) -> TypedValue:
        """Serialize a value."""
        return self._serde.dumps_typed(obj)


def whole(typed: TypedValue) -> TypedValue:
    """Put a value together that the views hand out in pieces; any other one is given back as it is.

    Raises:
        DamagedValueError: its pieces do not make the value that was stored.
    """
    type_, data = typed
    if not type_.startswith(_CHAIN):
        return typed
    if data is None:
        raise _damaged("the version that it is based on is missing")
    try:
        first, *rest = unframe(data)
        return type_[len(_CHAIN) :], deltas.fold(first, rest)
    except BrokenDeltaError as error:
        raise _damaged(str(error)) from error


def _damaged(reason: str) -> DamagedValueError:
    return DamagedValueError(
        f"A value in PostgreSQL cannot be rebuilt: {reason}. Nothing was changed. `langgraph-tiered verify` names the "
        "versions; restore tiered_deltas and checkpoint_blobs from a backup."
    )
