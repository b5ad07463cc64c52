"""Named places at which a test can end the process as a crash would, to show that nothing is lost there.

`LANGGRAPH_TIERED_CRASH_POINT=after_commit` kills the process when it gets there for the first time,
`after_commit:3` the third time. Without the variable a point costs one look at a global.
"""

from __future__ import annotations

import os
import signal

POINTS = (
    "before_journal",  # a write is encoded, and not sent
    "after_journal",  # Redis has it, and its caller does not know
    "after_begin",  # a flush has begun its transaction
    "after_commit",  # PostgreSQL has the records, and the journal still holds them
    "after_acknowledgement",  # the journal is trimmed, and those who wait do not know
    "in_adoption",  # orphans are picked, and not flushed
    "before_delete",  # a maintenance record is journaled, and not executed
    "after_delete",  # it is executed, and still journaled
    "generation_started",  # a new generation is recorded, and nobody has reported
    "generation_prepared",  # Redis is prepared for it, and it is still closed
    "generation_opened",  # it is open, and this process does not know
)

_name, _, _count = os.environ.get("LANGGRAPH_TIERED_CRASH_POINT", "").partition(":")
_armed = _name or None
_left = int(_count or 1)

if _armed is not None and _armed not in POINTS:
    raise ValueError(f"LANGGRAPH_TIERED_CRASH_POINT={_armed!r} is none of {', '.join(POINTS)}")


def reach(point: str) -> None:
    """End the process with SIGKILL if a test asks for it here."""
    global _left
    if _armed is not None and point == _armed:
        _left -= 1
        if _left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
