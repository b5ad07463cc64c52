"""Tiered checkpointing for LangGraph: Redis answers, PostgreSQL keeps every version.

from langgraph_tiered_saver import TieredSaver

with TieredSaver.from_conn_string(redis_url, postgres_url) as saver:
    graph = builder.compile(checkpointer=saver)
"""

from langgraph_tiered_saver.cold.quarantine import QuarantinedRecord, QuarantinedThread
from langgraph_tiered_saver.cold.threads import ThreadSummary
from langgraph_tiered_saver.config import TieredConfig
from langgraph_tiered_saver.errors import (
    AcknowledgementShortfallError,
    BacklogFullError,
    BothTiersUnavailableError,
    ColdTierRejectedError,
    ColdTierUnavailableError,
    ConfigurationError,
    DamagedValueError,
    EmbeddedServerError,
    FlushTimeoutError,
    HotTierRejectedError,
    HotTierUnavailableError,
    InvalidInputError,
    SaverClosedError,
    SerializationError,
    StaleWriterError,
    ThreadQuarantinedError,
    TieredSaverError,
    TierUnavailableError,
)
from langgraph_tiered_saver.run_lease import RunLease
from langgraph_tiered_saver.saver import TieredSaver
from langgraph_tiered_saver.stats import TieredStats

__all__ = [
    "AcknowledgementShortfallError",
    "BacklogFullError",
    "BothTiersUnavailableError",
    "ColdTierRejectedError",
    "ColdTierUnavailableError",
    "ConfigurationError",
    "DamagedValueError",
    "EmbeddedServerError",
    "FlushTimeoutError",
    "HotTierRejectedError",
    "HotTierUnavailableError",
    "InvalidInputError",
    "QuarantinedRecord",
    "QuarantinedThread",
    "RunLease",
    "SaverClosedError",
    "SerializationError",
    "StaleWriterError",
    "ThreadQuarantinedError",
    "ThreadSummary",
    "TierUnavailableError",
    "TieredConfig",
    "TieredSaver",
    "TieredSaverError",
    "TieredStats",
]
