"""Cutting a long list into pages, so that neither memory nor a connection is held while the caller iterates."""

from __future__ import annotations

from collections.abc import Sequence

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import CheckpointTuple

PAGE = 200


class Pages:
    """What to read next.

    Only the checkpoints of one thread and namespace have ids that are all different; anything wider is read at once,
    because a page border could fall between equal ids.

    Attributes:
        before: The `before` of the next read.
        limit: The `limit` of the next read.
        done: Nothing is left to read.
    """

    def __init__(self, config: RunnableConfig | None, before: RunnableConfig | None, limit: int | None) -> None:
        configurable = (config or {}).get("configurable", {})
        self._paged = configurable.get("checkpoint_ns") is not None and not configurable.get("checkpoint_id")
        self._left = limit
        self.before = before
        self.done = False

    @property
    def limit(self) -> int | None:
        """How many to read next."""
        if not self._paged:
            return self._left
        return PAGE if self._left is None else min(PAGE, self._left)

    def took(self, page: Sequence[CheckpointTuple]) -> None:
        """Note what was read."""
        limit = self.limit
        if self._left is not None:
            self._left -= len(page)
        self.done = not self._paged or limit is None or len(page) < limit or self._left == 0
        if page:
            self.before = page[-1].config
