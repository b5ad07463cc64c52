"""Names: what a thread, a checkpoint, a channel may be called, and what a config addresses."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from typing import Any, NamedTuple

from langchain_core.runnables import RunnableConfig

from langgraph_tiered_saver.errors import InvalidInputError
from langgraph_tiered_saver.values import encodable, is_json

# A third of an 8 KB page less its header, less what alignment and the columns' own headers may take.
_INDEX_ENTRY_BYTES = 2600


class ThreadPosition(NamedTuple):
    """The part of a `RunnableConfig` that addresses a checkpoint; `checkpoint_id` may be `""`."""

    thread_id: str
    checkpoint_ns: str
    checkpoint_id: str

    def config(self) -> RunnableConfig:
        """Give the position in LangGraph's form."""
        return {
            "configurable": {
                "thread_id": self.thread_id,
                "checkpoint_ns": self.checkpoint_ns,
                "checkpoint_id": self.checkpoint_id,
            }
        }


def position_of(config: RunnableConfig | None, *, what: str) -> ThreadPosition:
    """Read and check the position in a config.

    Args:
        config: LangGraph's config; `thread_id` may also be an `int` or a `UUID`.
        what: The calling method's name, for the message.

    Raises:
        InvalidInputError: there is no usable `thread_id`, or a part cannot be stored as text.
    """
    configurable = (config or {}).get("configurable") or {}
    thread_id = configurable.get("thread_id")
    if thread_id is None or thread_id == "":
        raise InvalidInputError(
            f"{what} needs a thread_id. Pass config={{'configurable': {{'thread_id': '...'}}}}; nothing was done."
        )
    return ThreadPosition(
        text_of(thread_id, "thread_id"),
        text_of(configurable.get("checkpoint_ns") or "", "checkpoint_ns"),
        text_of(configurable.get("checkpoint_id") or "", "checkpoint_id"),
    )


def text_of(value: object, what: str) -> str:
    """Check that a name can be stored as text in both tiers.

    Raises:
        InvalidInputError: it holds a NUL or a lone surrogate.
    """
    text = value if type(value) is str else str(value)
    if "\0" in text or not encodable(text):
        raise InvalidInputError(
            f"{what} {text!r:.80} holds a NUL or a lone surrogate, which PostgreSQL cannot store. "
            "Use another name; nothing was written."
        )
    return text


def check_filter(filter: Mapping[str, Any] | None) -> None:
    """Check that a metadata filter is something PostgreSQL's JSON can contain.

    Raises:
        InvalidInputError: it is not.
    """
    if filter and not (isinstance(filter, Mapping) and is_json(filter)):
        raise InvalidInputError(
            "filter must be a dict of JSON values without NUL, NaN or lone surrogates: it is matched against the "
            "checkpoints' metadata, which is JSON."
        )


def check_readable(name: str, what: str) -> str:
    """Refuse a name that PostgresSaver's reader, which casts it to `bytea`, takes for another one or cannot read.

    Raises:
        InvalidInputError: it holds a backslash.
    """
    if "\\" in name:
        raise InvalidInputError(
            f"The {what} {name!r:.80} holds a backslash, which PostgresSaver's reader takes for an escape. "
            "Use another name; nothing was written."
        )
    return name


def check_index_entry(*names: str) -> None:
    """Refuse names that together do not fit an entry of the tables' indexes (2,704 bytes), whatever they compress to.

    Raises:
        InvalidInputError: they do not fit.
    """
    if len("".join(names)) * 4 > _INDEX_ENTRY_BYTES and len("".join(names).encode()) > _INDEX_ENTRY_BYTES:
        raise InvalidInputError(
            f"The names {' + '.join(f'{name!r:.40}' for name in names)} take more than {_INDEX_ENTRY_BYTES} bytes "
            "together, which is what PostgreSQL can index. Use shorter ones (thread_id, checkpoint_ns, channel, ...); "
            "nothing was written."
        )


def version_text(version: str | float) -> str:
    """Give a channel version as PostgreSQL's `jsonb ->> key` does, which is what the blobs are joined by."""
    if type(version) is str:
        return version
    if isinstance(version, float):
        return format(Decimal(repr(version)), "f")
    return str(version)
