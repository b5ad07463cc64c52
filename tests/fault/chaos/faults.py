"""How each fault of the schedule is made."""

from __future__ import annotations

import signal
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tests.fault.proxy import Proxy
from tests.fault.stack import RedisServer
from tests.support import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from tests.fault.chaos.schedule import Fault
    from tests.fault.chaos.system import System


@contextmanager
def inject(system: System, fault: Fault) -> Iterator[None]:
    """Begin a fault, and end it with the block; what happens once is over when the block begins."""
    method: Callable[[System, Fault], AbstractContextManager[None]] = globals()[fault.kind]
    with method(system, fault):
        yield


# --- workers ---------------------------------------------------------------------------------------------------------


@contextmanager
def worker_kill(system: System, fault: Fault) -> Iterator[None]:
    assert fault.worker is not None
    system.workers[fault.worker].replace()
    yield


@contextmanager
def worker_stop(system: System, fault: Fault) -> Iterator[None]:
    assert fault.worker is not None
    worker = system.workers[fault.worker]
    worker.send(signal.SIGSTOP)
    try:
        yield
    finally:
        worker.send(signal.SIGCONT)


@contextmanager
def worker_restart(system: System, fault: Fault) -> Iterator[None]:
    """As an operator does it: it finishes its turns, closes, and a new one takes its place."""
    assert fault.worker is not None
    system.workers[fault.worker].restart()
    yield


# --- Redis -----------------------------------------------------------------------------------------------------------


@contextmanager
def redis_stop(system: System, fault: Fault) -> Iterator[None]:
    system.redis.pause()
    try:
        yield
    finally:
        system.redis.go_on()


@contextmanager
def redis_restart(system: System, fault: Fault) -> Iterator[None]:
    """With all it had."""
    system.redis.sync_from_now()
    system.redis.restart()
    yield


@contextmanager
def redis_crash(system: System, fault: Fault) -> Iterator[None]:
    """With what had reached its file, by `appendfsync everysec`."""
    system.redis.restart()
    yield


@contextmanager
def redis_wipe(system: System, fault: Fault) -> Iterator[None]:
    system.redis.restart_wiped()
    yield


@contextmanager
def redis_truncate(system: System, fault: Fault) -> Iterator[None]:
    system.redis.restart_truncated(fault.share)
    yield


@contextmanager
def redis_flushall(system: System, fault: Fault) -> Iterator[None]:
    """The process stays, and its run id."""
    system.redis.flushall()
    yield


@contextmanager
def redis_failover(system: System, fault: Fault) -> Iterator[None]:
    """To a replica that missed the master's last moments."""
    replica = RedisServer(system.directory / "servers" / f"valkey-{time.monotonic_ns()}")
    system.own(replica)
    replica.start()
    with Proxy(system.redis.port) as link:
        replica.replicate(link.port)
        link.deaf()
        time.sleep(fault.share)
        system.redis.close()
        replica.promote()
    system.redis = replica
    for worker in system.workers:
        worker.redis.retarget(replica.port)
    yield


@contextmanager
def redis_down(system: System, fault: Fault) -> Iterator[None]:
    """It comes back with all it had."""
    system.redis.sync_from_now()
    system.redis.kill()
    try:
        yield
    finally:
        system.redis.start()


@contextmanager
def redis_out_of_memory(system: System, fault: Fault) -> Iterator[None]:
    system.redis.run_out_of_memory()
    try:
        yield
    finally:
        system.redis.config_set(maxmemory=0)


@contextmanager
def redis_cut(system: System, fault: Fault) -> Iterator[None]:
    for proxy in system.proxies("redis", fault.worker):
        proxy.cut()
    yield


@contextmanager
def redis_deaf(system: System, fault: Fault) -> Iterator[None]:
    with system.misbehaving("redis", fault.worker, Proxy.deaf):
        yield


@contextmanager
def redis_drop_reply(system: System, fault: Fault) -> Iterator[None]:
    count = 1 + int(fault.share * 20)
    with system.misbehaving("redis", fault.worker, lambda proxy: proxy.drop_reply(count, b"EVALSHA")):
        yield


@contextmanager
def redis_delay(system: System, fault: Fault) -> Iterator[None]:
    with system.misbehaving("redis", fault.worker, lambda proxy: proxy.delay(fault.share / 2)):
        yield


# --- PostgreSQL ------------------------------------------------------------------------------------------------------


@contextmanager
def postgres_kill(system: System, fault: Fault) -> Iterator[None]:
    system.postgres.crash()
    yield


@contextmanager
def postgres_stop(system: System, fault: Fault) -> Iterator[None]:
    system.postgres.pause()
    try:
        yield
    finally:
        system.postgres.go_on()


@contextmanager
def postgres_immediate(system: System, fault: Fault) -> Iterator[None]:
    system.postgres.restart("immediate")
    yield


@contextmanager
def postgres_down(system: System, fault: Fault) -> Iterator[None]:
    system.postgres.kill()
    try:
        yield
    finally:
        system.postgres.start()


@contextmanager
def postgres_read_only(system: System, fault: Fault) -> Iterator[None]:
    system.postgres.set_read_only(True)
    try:
        yield
    finally:
        system.postgres.set_read_only(False)


@contextmanager
def postgres_raise(system: System, fault: Fault) -> Iterator[None]:
    system.postgres.raise_in_writes(fault.sqlstate, 1 + int(fault.share * 30))
    try:
        yield
    finally:
        system.postgres.raise_in_writes("", 0)


@contextmanager
def postgres_full(system: System, fault: Fault) -> Iterator[None]:
    """No connection is left, neither in the pools nor to be made."""
    proxies = system.proxies("postgres", None)
    for proxy in proxies:
        proxy.down()
    wait_until(lambda: system.count_sessions() == 0, message="the sessions end")
    with system.postgres.hold_connections():
        for proxy in proxies:
            proxy.heal()
        yield


@contextmanager
def postgres_cut(system: System, fault: Fault) -> Iterator[None]:
    for proxy in system.proxies("postgres", fault.worker):
        proxy.cut()
    yield


@contextmanager
def postgres_deaf(system: System, fault: Fault) -> Iterator[None]:
    with system.misbehaving("postgres", fault.worker, Proxy.deaf):
        yield


@contextmanager
def postgres_drop_reply(system: System, fault: Fault) -> Iterator[None]:
    """Transactions are committed, and who committed them does not hear of it."""
    with system.misbehaving("postgres", fault.worker, lambda proxy: proxy.drop_reply(matching=b"COMMIT")):
        yield


@contextmanager
def postgres_delay(system: System, fault: Fault) -> Iterator[None]:
    with system.misbehaving("postgres", fault.worker, lambda proxy: proxy.delay(fault.share / 2)):
        yield
