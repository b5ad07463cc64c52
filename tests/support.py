"""What tests of every kind share."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

Result = TypeVar("Result")


def wait_until(
    condition: Callable[[], Result],
    timeout: float = 10.0,
    message: str = "the condition",
    *,
    interval: float = 0.01,
) -> Result:
    """Call the condition until its result is true, and return that result.

    Args:
        condition: What is waited for; an exception it raises ends the wait.
        timeout: Seconds after which the wait fails.
        message: What did not happen, for the failure's text.
        interval: Seconds between two calls.

    Raises:
        AssertionError: The deadline passed; the text shows the last result.
    """
    deadline = time.monotonic() + timeout
    while not (result := condition()):
        if time.monotonic() >= deadline:
            raise AssertionError(f"{message}: not within {timeout:g} s (last result: {result!r})")
        time.sleep(interval)
    return result
