"""Which faults happen, one step after another: a function of the seed alone.

The promise survives the loss of one of {a writing process, Redis}. So a step never takes both, and `run` lets no step
take the second before what the first one may have left in a single place is in PostgreSQL. Faults of PostgreSQL may
overlap with either; and a process that was only stopped, or ended as it should, may come together with any fault of
Redis.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from typing import Any

_AROUND = (
    # How many of the steps have a fault of the first sort around one of the second.
    (0.35, "postgres", ("worker", "stopped worker", "ended worker", "redis")),
    (0.1, "redis", ("ended worker",)),
    (0.15, "stopped worker", ("redis",)),
)


@dataclass(frozen=True)
class Kind:
    """A kind of fault.

    Attributes:
        name: Its name.
        takes: `"worker"`, `"stopped worker"`, `"ended worker"`, `"redis"` or `"postgres"`.
        seconds: How long it lasts at least and at most; nothing for what happens once.
        one_of_many: It may hit a single worker's connections instead of all.
        often: How many times it comes while others come once.
    """

    name: str
    takes: str
    seconds: tuple[float, float] = (0.0, 0.0)
    one_of_many: bool = False
    often: int = 1


KINDS = {
    kind.name: kind
    for kind in (
        Kind("worker_kill", "worker", often=4),
        Kind("worker_stop", "stopped worker", (1, 8), often=2),
        Kind("worker_restart", "ended worker"),
        Kind("redis_stop", "redis", (1, 6)),
        Kind("redis_restart", "redis"),
        Kind("redis_crash", "redis"),
        Kind("redis_wipe", "redis"),
        Kind("redis_truncate", "redis"),
        Kind("redis_flushall", "redis"),
        Kind("redis_failover", "redis"),
        Kind("redis_down", "redis", (3, 10)),
        Kind("redis_out_of_memory", "redis", (1, 4)),
        Kind("redis_cut", "redis", one_of_many=True),
        Kind("redis_deaf", "redis", (1, 6), one_of_many=True),
        Kind("redis_drop_reply", "redis", (0.5, 3), one_of_many=True),
        Kind("redis_delay", "redis", (1, 4), one_of_many=True),
        Kind("postgres_kill", "postgres"),
        Kind("postgres_stop", "postgres", (1, 6)),
        Kind("postgres_immediate", "postgres"),
        Kind("postgres_down", "postgres", (3, 10)),
        Kind("postgres_read_only", "postgres", (1, 5)),
        Kind("postgres_raise", "postgres", (0.5, 2)),
        Kind("postgres_full", "postgres", (1, 5)),
        Kind("postgres_cut", "postgres", one_of_many=True),
        Kind("postgres_deaf", "postgres", (1, 6), one_of_many=True),
        Kind("postgres_drop_reply", "postgres", (0.5, 3), one_of_many=True),
        Kind("postgres_delay", "postgres", (1, 4), one_of_many=True),
    )
}


@dataclass(frozen=True)
class Fault:
    """A fault to inject.

    Attributes:
        kind: What.
        seconds: How long.
        worker: Which worker, or whose connections; None for all.
        share: How much, from 0 to 1, whatever that means for the kind.
        sqlstate: Which error.
    """

    kind: str
    seconds: float
    worker: int | None
    share: float
    sqlstate: str

    @property
    def takes(self) -> str:
        """Whom it hits."""
        return KINDS[self.kind].takes

    def as_json(self) -> dict[str, Any]:
        """Give everything as JSON can hold it."""
        return asdict(self)


@dataclass(frozen=True)
class Step:
    """Faults that happen together, the first around the second, and the seconds of peace that follow."""

    faults: tuple[Fault, ...]
    peace: float


def matching(patterns: Sequence[str]) -> list[str]:
    """Give the kinds that match any of some shell patterns; all if there is none."""
    return [name for name in KINDS if not patterns or any(fnmatch(name, pattern) for pattern in patterns)]


def schedule(seed: int, workers: int, *, scale: float = 1.0, kinds: Sequence[str] = tuple(KINDS)) -> Iterator[Step]:
    """Give the steps of a seed, for ever; every kind comes as often as it may before any comes again.

    Args:
        seed: Anything else that is the same gives the same steps.
        workers: How many workers there are.
        scale: What all times are multiplied by.
        kinds: The kinds of faults to choose from; at least one.
    """
    source = random.Random(f"chaos {seed} {workers} {' '.join(kinds)}")
    bag = _Bag(source, kinds)
    while True:
        names: list[str | None] = []
        chance = source.random()
        for share, outer, inner in _AROUND:
            if 0 <= chance < share:
                names = [bag.draw(outer), bag.draw(*inner)]
            chance -= share
        if not (names and all(names)):
            names = [bag.draw()]
        faults = tuple(_fault(source, KINDS[name], workers, scale) for name in names if name)
        yield Step(faults, source.uniform(0.5, 2.5) * scale)


class _Bag:
    """Kinds in random order, each as often as it may before any comes again."""

    def __init__(self, source: random.Random, names: Sequence[str]) -> None:
        self._source = source
        self._all = [name for name in names for _ in range(KINDS[name].often)]
        self._left: list[str] = []

    def draw(self, *takes: str) -> str | None:
        """Draw a kind that hits one of these; any kind if none is named; None if there is none of the sort."""
        for _ in range(2):
            for name in self._left:
                if not takes or KINDS[name].takes in takes:
                    self._left.remove(name)
                    return name
            self._left += self._source.sample(self._all, len(self._all))
        return None


def _fault(source: random.Random, kind: Kind, workers: int, scale: float) -> Fault:
    # Every fault draws as often as any other, so that none changes what the next ones are.
    seconds = source.uniform(*kind.seconds) * scale
    worker = source.randrange(workers)
    alone = source.random() < 0.5
    share, sqlstate = source.uniform(0.05, 0.6), source.choice(["40001", "40P01", "53100"])
    hits_one = "worker" in kind.takes or (kind.one_of_many and alone)
    return Fault(kind.name, round(seconds, 3), worker if hits_one else None, round(share, 3), sqlstate)
