"""What the answers of Redis mean, as redis-py hands them over."""

from __future__ import annotations

import pytest
import redis
from redis._parsers.base import BaseParser

from langgraph_tiered_saver import HotTierRejectedError, HotTierUnavailableError, TieredSaverError
from langgraph_tiered_saver.hot.tier import translate

PASSING = [
    "LOADING Redis is loading the dataset in memory",
    "READONLY You can't write against a read only replica.",
    "OOM command not allowed when used memory > 'maxmemory'.",
    "MISCONF Redis is configured to save RDB snapshots, but it's currently unable to persist to disk.",
    "MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.",
    "CLUSTERDOWN The cluster is down",
    "TRYAGAIN Multiple keys request during rehashing of slot",
    "NOREPLICAS Not enough good replicas to write.",
    "BUSY Redis is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE.",
    "NOAUTH Authentication required.",
    "WRONGPASS invalid username-password pair or user is disabled.",
    "OOM command not allowed when used memory > 'maxmemory'. script: 0f3a, on @user_script:7.",
    "ERR Error running script (call to f_0f3a): @user_script:7: -READONLY You can't write against a read only replica.",
]
LASTING = [
    "ERR unknown command 'EVALSHA'",
    "NOPERM User default has no permissions to run the 'evalsha' command",
    "WRONGTYPE Operation against a key holding the wrong kind of value",
]


def answered(text: str) -> Exception:
    """Give the error that redis-py makes of an answer; it has a class for some, and cuts their first word off."""
    error = BaseParser.parse_error(text)
    assert isinstance(error, Exception)
    return error


@pytest.mark.parametrize("text", PASSING)
def test_a_refusal_that_passes_means_that_redis_is_away(text: str) -> None:
    """I7: the saver goes on without a Redis that cannot take writes now, instead of failing."""
    assert type(translate(answered(text))) is HotTierUnavailableError


@pytest.mark.parametrize("text", LASTING)
def test_a_refusal_that_lasts_is_an_error(text: str) -> None:
    """I7: what no waiting mends is not taken for an outage."""
    assert type(translate(answered(text))) is HotTierRejectedError


def test_loading_is_named() -> None:
    """A server that loads its data counts as away, and the message says why though redis-py drops the word."""
    error = answered(PASSING[0])

    translated: TieredSaverError = translate(error)

    assert isinstance(error, redis.BusyLoadingError)
    assert "BusyLoadingError: Redis is loading the dataset" in str(translated)
    assert "not acknowledged" in str(translated)
