"""Every error this library raises, one class for each thing a caller would treat differently.

All derive from `TieredSaverError`. A message says what happened, what is safe, and what to do next; it never
contains a password. Where Python has a built-in class for the same situation (`ValueError`, `TimeoutError`,
`ConnectionError`), the error derives from that too, so that generic handlers keep working.
"""

from __future__ import annotations


class TieredSaverError(Exception):
    """Root of all errors raised by `langgraph_tiered_saver`."""


class ConfigurationError(TieredSaverError, ValueError):
    """A setting, a URL or a server's own configuration cannot be used; nothing was written.

    Raised when a saver is made or first used. Change the named setting; trying again will not help.
    """


class InvalidInputError(TieredSaverError, ValueError):
    """A call's arguments cannot be used (no `thread_id`, a NUL in a name, ...); nothing was written."""


class SerializationError(TieredSaverError, TypeError):
    """The serializer cannot take a value of the state; nothing was written.

    The message names the channel. Change the value's type, or give the saver a serializer that knows it.
    """


class SaverClosedError(TieredSaverError, RuntimeError):
    """The saver was closed; make a new one. Acknowledged records are in the journal or in PostgreSQL."""


class TierUnavailableError(TieredSaverError, ConnectionError):
    """A tier could not be reached or did not answer in time. Try again later."""


class HotTierUnavailableError(TierUnavailableError):
    """Redis could not be reached, refused the command or did not answer in time.

    A write that raised this was not acknowledged: it may or may not have happened, and repeating it is safe.
    """


class HotTierRejectedError(TieredSaverError):
    """Redis refused a command for a reason that trying again will not change (rights, size, a foreign key)."""


class ColdTierUnavailableError(TierUnavailableError):
    """PostgreSQL could not be reached or did not answer in time.

    Acknowledged records are safe in the journal; only what PostgreSQL alone can answer is affected.
    """


class ColdTierRejectedError(TieredSaverError):
    """PostgreSQL refused a statement for a reason that trying again will not change (rights, disk, data)."""


class DamagedValueError(TieredSaverError):
    """A value in PostgreSQL cannot be rebuilt: rows that it is stored in are missing, or hold other bytes.

    Only compact storage has such values. `langgraph-tiered verify` lists them; restore their rows from a backup.
    """


class BothTiersUnavailableError(HotTierUnavailableError, ColdTierUnavailableError):
    """Neither Redis nor PostgreSQL could be used.

    A write that raised this was not acknowledged; what was acknowledged before is safe in one of them, or in the memory
    of the process that wrote it. Repeat the call when one of the servers is back.
    """


class BacklogFullError(TieredSaverError, TimeoutError):
    """PostgreSQL is so far behind that the backlog bound was reached, and stayed so until the deadline.

    The write was not made. Repair or relieve PostgreSQL, or raise `max_backlog_records` / `max_backlog_bytes`.
    """


class FlushTimeoutError(TieredSaverError, TimeoutError):
    """Records are acknowledged and safe in the journal, but were not all in PostgreSQL by the deadline.

    Attributes:
        records: How many records were still missing.
    """

    def __init__(self, message: str, *, records: int = 0) -> None:
        super().__init__(message)
        self.records = records


class ThreadQuarantinedError(TieredSaverError):
    """PostgreSQL refused a record of this thread for good; that and the later ones are kept in quarantine there.

    Remove the reason and call `retry_quarantined`, or give the records up with `drop_quarantined` (the command is
    `langgraph-tiered quarantine`). A write that raised this was kept with the others.

    Attributes:
        thread_id: The thread that is set aside.
    """

    def __init__(self, message: str, *, thread_id: str) -> None:
        super().__init__(message)
        self.thread_id = thread_id


class StaleWriterError(TieredSaverError):
    """Another run holds the thread's lease, so this write was refused; nothing was written.

    Whoever gets it must stop working on the thread: the other run goes on from the thread's latest checkpoint.

    Attributes:
        thread_id: The thread.
    """

    def __init__(self, message: str, *, thread_id: str = "") -> None:
        super().__init__(message)
        self.thread_id = thread_id


class AcknowledgementShortfallError(TieredSaverError):
    """A write is acknowledged, but fewer replicas (or append-only files) than `hot_ack` asks for have it in time.

    It is in the hot tier and in this process's memory, and will be flushed; repeating it is safe.
    """


class EmbeddedServerError(TieredSaverError):
    """An embedded server could not be started, found or stopped; the message names its log file."""


def stale_writer(thread_id: str) -> StaleWriterError:
    """Make the error of a writer whose thread is leased to another run."""
    return StaleWriterError(
        f"Another run holds the lease of thread {thread_id!r:.80}, or this run's lease was lost; nothing was written. "
        "Stop working on the thread here, or wait for its lease with saver.lease(thread_id).",
        thread_id=thread_id,
    )
