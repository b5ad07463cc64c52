"""The Lua scripts, one file each, and what is needed to call them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files

_USING_COMMON = frozenset({"put", "put_writes", "maintain", "warm", "lease", "run_lease", "run_leases", "warm_history"})
_USING_HISTORY = frozenset({"put", "put_writes", "warm_history"})


@dataclass(frozen=True)
class Script:
    """A Lua script and the digest that `EVALSHA` knows it by."""

    name: str
    text: str
    digest: str


def _load(name: str) -> Script:
    folder = files(__name__)
    text = folder.joinpath(f"{name}.lua").read_text(encoding="utf-8")
    if name in _USING_HISTORY:
        text = folder.joinpath("_history.lua").read_text(encoding="utf-8") + text
    if name in _USING_COMMON:
        text = folder.joinpath("_common.lua").read_text(encoding="utf-8") + text
    return Script(name, text, hashlib.sha1(text.encode()).hexdigest())  # noqa: S324 - EVALSHA's own digest


PUT = _load("put")
PUT_WRITES = _load("put_writes")
GET = _load("get")
LEASE = _load("lease")
WARM = _load("warm")
WARM_HISTORY = _load("warm_history")
MAINTAIN = _load("maintain")
ACK = _load("ack")
JOURNAL = _load("journal")
DIRTY = _load("dirty")
SWEEP = _load("sweep")
PREPARE = _load("prepare")
OPEN = _load("open")
RECORD_OPENED = _load("record_opened")
PROBE = _load("probe")
FILL = _load("fill")
RUN_LEASE = _load("run_lease")
RUN_LEASES = _load("run_leases")
