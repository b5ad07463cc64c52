"""Redis clients without a server: URLs, twins of a user's client, and where a Cluster's commands go."""

from __future__ import annotations

import random
import ssl
import traceback
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import redis
import redis.asyncio as aioredis
from hypothesis import given, settings
from hypothesis import strategies as st
from redis.asyncio.sentinel import Sentinel as AsyncSentinel
from redis.crc import key_slot
from redis.sentinel import Sentinel

from langgraph_tiered_saver import ConfigurationError, TieredConfig
from langgraph_tiered_saver.hot import clients, slots, urls
from langgraph_tiered_saver.hot.slots import Exchange, Pause, Refresh, SlotMap, Unit

if TYPE_CHECKING:
    from collections.abc import Callable

CONFIG = TieredConfig(redis_timeout=2.5, redis_retries=3, redis_pool_size=7)
SECRET, QUOTED = "p@s,s:w/rd?#[", "p%40s%2Cs%3Aw%2Frd%3F%23%5B"


class Guard:
    """Lets everybody in."""

    def connected(self, run_id: str) -> None:
        """Say nothing."""


# --- URLs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "kind", "addresses", "expected"),
    [
        ("redis://h/3", "single", (), {"host": "h", "db": 3, "socket_timeout": 2.5}),
        ("redis://h?socket_timeout=9&max_connections=2", "single", (), {"socket_timeout": 9.0, "max_connections": 2}),
        ("unix:///run/redis.sock?db=2", "single", (), {"path": "/run/redis.sock", "db": 2}),
        (f"redis+cluster://:{QUOTED}@a:1,b", "cluster", (("a", 1), ("b", 6379)), {"password": SECRET, "timeout": 2.5}),
        ("redis+cluster://a:1/0?health_check_interval=5", "cluster", (("a", 1),), {"health_check_interval": 5}),
        ("redis+cluster://[::1]:7,[fe80::1]", "cluster", (("::1", 7), ("fe80::1", 6379)), {"username": None}),
        (f"redis+sentinel://:{QUOTED}@a,b:2/my%2Fown/4", "sentinel", (("a", 26379), ("b", 2)), {"db": 4}),
    ],
)  # fmt: skip
def test_a_url_is_read(url: str, kind: str, addresses: tuple[Any, ...], expected: dict[str, Any]) -> None:
    """Every server, credential and option of a URL arrives, decoded; our time-outs and bounds where it sets none."""
    place = urls.parse(url, CONFIG)

    assert (place.kind, place.addresses) == (kind, addresses)
    assert {name: place.connection.get(name) for name in expected} == expected
    assert place.connection_class is (redis.UnixDomainSocketConnection if "unix" in url else redis.Connection)
    assert place.service == ("my/own" if kind == "sentinel" else "")
    assert SECRET not in repr(place)
    assert QUOTED not in repr(place)


def test_the_sentinels_have_credentials_of_their_own() -> None:
    """A password of the data servers is not sent to the sentinels, nor the other way round; TLS is for both."""
    url = f"rediss+sentinel://u:one@a/service?sentinel_username=v&sentinel_password={QUOTED}&ssl_cert_reqs=none"

    place = urls.parse(url, CONFIG)

    shared = {"ssl_cert_reqs": "none", "socket_timeout": 2.5}
    assert dict(place.connection).items() >= (shared | {"username": "u", "password": "one"}).items()
    assert dict(place.sentinel).items() >= (shared | {"username": "v", "password": SECRET}).items()
    assert urls.parse("rediss+sentinel://u:one@a/service", CONFIG).sentinel.get("password") is None
    assert place.connection_class is redis.SSLConnection
    client, make_async = clients.from_url(url, CONFIG, Guard())
    for pool in (client.connection_pool, make_async().connection_pool):
        assert issubclass(pool.connection_class, (redis.SSLConnection, aioredis.SSLConnection))
        assert pool.sentinel_manager.sentinels[0].connection_pool.connection_kwargs["password"] == SECRET


HOSTS = ["", "a,,b", "a:port,b", "a:99999", "[::1,b", "[zz]", "a b", "Zq@b@a", "user:Zq@Zq@a", "user:Zq/Zq@a"]
HOSTS += ["user:Zq,Zq@a@b", "user:Zq?Zq@a", "user:Zq#Zq@a", "user:Zq[Zq@a:port", "user:12/Zq@a", "user:Zq@a:b:1"]
RESTS = {
    "cluster": ["/1", "/x", "?db=1", "?no_such_option=1", "?socket_timeout=soon", "?sentinel_password=Zq", "#x"],
    "sentinel": ["", "/", "/s/x", "/s/1/2", "//1", "/s?no_such_option=1", "/s#x", "/s?db=x&password=Zq"],
}


@pytest.mark.parametrize(
    "url",
    [f"redis+{kind}://user:Zq@a{rest}" for kind, rests in RESTS.items() for rest in rests]
    + [f"redis+cluster://{hosts}" for hosts in HOSTS]
    + [f"redis+sentinel://{hosts}/service" for hosts in HOSTS],
)
def test_a_url_of_several_servers_that_cannot_be_used(url: str) -> None:
    """Refused before anything is connected, without a piece of the password, and with the form that is right."""
    with pytest.raises(ConfigurationError, match=r"The Redis URL .*redis\+(cluster|sentinel)://user:") as caught:
        clients.from_url(url, CONFIG)

    assert "Zq" not in "".join(traceback.format_exception(caught.value))


def test_making_a_client_connects_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even to find the slots of a Cluster, or the master of a Sentinel."""
    monkeypatch.setattr("socket.socket", None)
    for url in ("redis://h", "rediss://h", "unix:///s", "redis+cluster://a,b", "rediss+sentinel://a,b/service"):
        clients.from_url(url, CONFIG, Guard())


# --- twins -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_twin_has_the_users_settings(asynchronous: bool) -> None:
    """Server, database, credentials, TLS and time-outs are the user's; pool, retries and the guard are ours."""
    module: Any = aioredis if asynchronous else redis
    given = module.Redis(
        host="h", port=1, db=2, username="u", password=SECRET, ssl=True, ssl_cert_reqs=ssl.CERT_NONE,
        ssl_check_hostname=False, ssl_ca_certs="ca", socket_timeout=7, client_name="c", max_connections=99,
    )  # fmt: skip
    before = dict(given.connection_pool.connection_kwargs)

    twin = clients.aguarded(given, CONFIG, Guard())() if asynchronous else clients.guarded(given, CONFIG, Guard())

    pool, wanted = twin.connection_pool, {name: before[name] for name in before if name.startswith("ssl_")}
    wanted |= {"host": "h", "port": 1, "db": 2, "username": "u", "password": SECRET, "client_name": "c"}
    assert pool.connection_kwargs.items() >= (wanted | {"socket_timeout": 7, "socket_connect_timeout": 2.5}).items()
    assert pool.connection_class is module.SSLConnection
    assert isinstance(pool, module.BlockingConnectionPool)
    assert (pool.max_connections, pool.timeout) == (7, 2.5)
    connection = pool.connection_class(**pool.connection_kwargs)
    assert (connection.retry._retries, connection.retry._supported_errors) == (3, (redis.ConnectionError,))
    assert given.connection_pool.connection_kwargs == before


@pytest.mark.parametrize("kind", ["sync", "async", "derived"])
def test_a_twin_of_a_master_behind_sentinel(kind: str) -> None:
    """It asks the same sentinels, with their own settings, for the same service; and closes spoiled connections."""
    make: Any = AsyncSentinel if kind == "async" else Sentinel
    manager = make(
        [("s", 1), ("t", 2)],
        min_other_sentinels=1,
        sentinel_kwargs={"password": "sesame", "ssl": True},
        password=SECRET,
    )
    given = manager.master_for("service", db=3, ssl=True, check_connection=True)

    if kind == "sync":
        twin = clients.guarded(given, CONFIG, Guard())
    else:
        twin = (clients.aguarded if kind == "async" else clients.derive_async)(given, CONFIG, Guard())()

    pool = twin.connection_pool
    assert (pool.service_name, pool.check_connection, pool.max_connections) == ("service", True, 7)
    assert pool.connection_kwargs.items() >= {"db": 3, "password": SECRET, "socket_timeout": 2.5}.items()
    assert issubclass(pool.connection_class, (redis.SSLConnection, aioredis.SSLConnection))
    assert pool.sentinel_manager.min_other_sentinels == 1
    for sentinel, address in zip(pool.sentinel_manager.sentinels, (("s", 1), ("t", 2)), strict=True):
        options = sentinel.connection_pool.connection_kwargs
        assert (options["host"], options["port"], options["password"]) == (*address, "sesame")
        assert issubclass(sentinel.connection_pool.connection_class, (redis.SSLConnection, aioredis.SSLConnection))
    assert pool.sentinel_manager.sentinels[0] is not manager.sentinels[0]


def test_no_asynchronous_client_is_derived_that_would_be_less_safe() -> None:
    """A check that asynchronous connections cannot make is not left out in silence."""
    strict = redis.Redis(ssl=True, ssl_validate_ocsp=True)
    peculiar = redis.Redis(redis_connect_func=lambda connection: connection.on_connect())

    with pytest.raises(ConfigurationError, match=r"ssl_validate_ocsp.*async_redis="):
        clients.derive_async(strict, CONFIG)
    with pytest.raises(ConfigurationError, match=r"redis_connect_func.*async_redis="):
        clients.derive_async(peculiar, CONFIG)


# --- where a Cluster's commands go -----------------------------------------------------------------------------------

A, B, C = ("a", 1), ("b", 2), ("c", 3)
HALVES = [[0, 8191, [b"a", 1, b"id"]], [8192, 16383, [b"", 2, b"id"], [b"replica", 9, b"id"]]]
LOW, HIGH = key_slot(b"{x:2}"), key_slot(b"{x:1}")


def unit(slot: int, *more: str) -> Unit:
    """A command that writes to a slot, and those without keys that follow it."""
    return Unit(slot, [(("SET", slot), {}), *(((name,), {}) for name in more)])


def known() -> SlotMap:
    """Slots that two servers share."""
    found = SlotMap([A])
    found.load(HALVES, B)
    return found


def play(steps: Any, answer: Callable[[Any], Any]) -> list[Any]:
    """Answer every request of a delivery until it ends."""
    reply: Any = None
    try:
        while True:
            reply = answer(steps.send(reply))
    except StopIteration as stop:
        result: list[Any] = stop.value
        return result


class Script:
    """Answers exchanges one after the other, and notes every request; time passes by pauses only."""

    def __init__(self, slot_map: SlotMap, *answers: Any, refresh: Any = None) -> None:
        self.slot_map, self.answers, self.refresh = slot_map, list(answers), refresh
        self.seen: list[Any] = []
        self.now = 0.0

    def __call__(self, step: Any) -> Any:
        self.seen.append(step)
        if isinstance(step, Pause):
            assert step.seconds > 0
            self.now += step.seconds
            return None
        if isinstance(step, Refresh):
            return self.refresh(step) if callable(self.refresh) else self.refresh
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return {
            address: answer
            if isinstance(answer, Exception) and not isinstance(answer, redis.ResponseError)
            else [[answer] for _ in part]
            for address, part in step.parts.items()
        }

    def deliver(self, *units: Unit) -> list[Any]:
        """Deliver within a second."""
        return play(slots.deliver(self.slot_map, units, 1.0, clock=lambda: self.now), self)

    def targets(self) -> list[Any]:
        """Where each exchange went, and whether it was announced."""
        return [(a, part[0][1]) for s in self.seen if isinstance(s, Exchange) for a, part in s.parts.items()]


def test_commands_are_sorted_by_master() -> None:
    """One exchange, however many commands; replies come in the order of the commands; WAIT stays with its write."""
    slot_map, seen = known(), []

    def answer(step: Any) -> Any:
        seen.append(step)
        return {a: [[f"{u.slot}{c[0][0]}" for c in u.commands] for u, _ in part] for a, part in step.parts.items()}

    found = play(slots.deliver(slot_map, [unit(HIGH), unit(LOW, "WAIT"), unit(HIGH)], 1.0), answer)

    assert found == [[f"{HIGH}SET"], [f"{LOW}SET", f"{LOW}WAIT"], [f"{HIGH}SET"]]
    assert [list(step.parts) for step in seen] == [[B, A]]


def test_a_redirection_is_followed_and_learned() -> None:
    """MOVED is for ever, ASK for one command, which is announced to a server that has not got the slot yet."""
    moved = Script(known(), redis.exceptions.MovedError(f"{LOW} c:3"), "done")
    asked = Script(known(), redis.exceptions.AskError(f"{LOW} :3"), "done")

    assert (moved.deliver(unit(LOW)), asked.deliver(unit(LOW))) == ([["done"]], [["done"]])

    assert moved.targets() == [(A, False), (C, False)]
    # No host: it is the one that answered.
    assert asked.targets() == [(A, False), (("a", 3), True)]
    assert (moved.slot_map.owner(LOW), asked.slot_map.owner(LOW)) == (C, A)


@pytest.mark.parametrize(
    "error",
    [
        redis.exceptions.TryAgainError("Multiple keys request during rehashing of slot"),
        redis.exceptions.ClusterDownError("The cluster is down"),
        redis.exceptions.MovedError(f"{LOW} a:1"),
        redis.ResponseError("Attempted to access a non local key in a cluster node script: on @user_script:3."),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_passes_by_itself_is_waited_for(error: Exception) -> None:
    """I8: it is tried again, ever more slowly, until the time is over; then the error is one that passes by itself."""
    short, endless = Script(known(), error, error, error, "done"), Script(known(), error)

    assert short.deliver(unit(LOW)) == [["done"]]
    result = endless.deliver(unit(LOW))[0]

    left = result[0] if isinstance(result, list) else result
    assert isinstance(left, (redis.exceptions.TryAgainError, redis.exceptions.ClusterDownError))
    pauses = [step.seconds for step in endless.seen if isinstance(step, Pause)]
    assert sum(pauses) == pytest.approx(1.0)
    assert 10 < len(pauses) < 40
    refreshes = any(isinstance(step, Refresh) for step in endless.seen)
    assert refreshes is isinstance(error, redis.exceptions.ClusterDownError)


def test_another_master_is_looked_for_when_one_is_lost() -> None:
    """A command goes to the replica that was promoted; if there is none yet, the error comes out at once."""
    lost = redis.ConnectionError("refused")
    promoted = Script(known(), lost, "done", refresh=lambda step: promoted.slot_map.load([[0, 16383, [b"c", 3]]], B))
    same = Script(known(), lost, "done", refresh=lambda step: same.slot_map.load(HALVES, B))
    alone = Script(known(), lost, refresh=redis.TimeoutError("nobody answers"))

    asked = redis.exceptions.AskError(f"{LOW} c:3")
    target_gone = Script(known(), asked, lost, "done", refresh=lambda step: target_gone.slot_map.load(HALVES, B))

    assert promoted.deliver(unit(LOW)) == [["done"]]
    assert target_gone.deliver(unit(LOW)) == [lost]
    assert same.deliver(unit(LOW)) == [lost]
    assert alone.deliver(unit(LOW)) == [lost]

    assert promoted.targets() == [(A, False), (C, False)]
    assert [step.failed for step in same.seen if isinstance(step, Refresh)] == [A]
    assert {tuple(same.slot_map.candidates(A)) for _ in range(20)} == {(B, A)}
    assert not any(isinstance(step, Pause) for step in [*promoted.seen, *same.seen, *alone.seen])


@pytest.mark.parametrize("error", [redis.TimeoutError("late"), redis.RedisError("the guard says no")])
def test_what_must_not_be_repeated(error: Exception) -> None:
    """A time-out has taken as long as a call may; a guard's refusal holds for every connection."""
    script = Script(known(), error, "done", refresh=lambda step: script.slot_map.load(HALVES, B))

    assert script.deliver(unit(LOW)) == [error]
    assert len(script.seen) == 1
    # Whoever comes next asks first whether there is another master.
    assert script.deliver(unit(LOW)) == [["done"]]
    assert isinstance(script.seen[1], Refresh) is isinstance(error, redis.TimeoutError)


def test_nobody_knows_the_slots() -> None:
    """The first command asks for them; if nobody tells, or a slot has no master, its error says so."""
    fresh = Script(SlotMap([A]), "done", refresh=lambda step: fresh.slot_map.load(HALVES, B))
    unreachable = redis.ConnectionError("refused")
    away = Script(SlotMap([A]), "done", refresh=unreachable)
    homeless = Script(SlotMap([A]), "done", refresh=lambda step: homeless.slot_map.load(HALVES[:1], B))

    assert fresh.deliver(unit(LOW), unit(HIGH)) == [["done"], ["done"]]
    assert sum(isinstance(step, Refresh) for step in fresh.seen) == 1
    assert away.deliver(unit(LOW)) == [unreachable]
    assert isinstance(homeless.deliver(unit(HIGH))[0], redis.exceptions.ClusterDownError)
    assert homeless.now == pytest.approx(1.0)


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 30))
def test_every_command_arrives_however_slots_move(seed: int, count: int) -> None:
    """Whatever moves, splits and fails, each command is executed where its slot is, or its error comes out."""
    rng = random.Random(seed)
    servers = [A, B, C]
    owners = {slot: rng.choice(servers) for slot in (LOW, HIGH, 5, 9000)}
    moving: dict[int, slots.Address] = {}
    slot_map, executed = SlotMap(servers), Counter[int]()
    units = [Unit(rng.choice(list(owners)), [(("SET", index), {})]) for index in range(count)]
    now = 0.0

    def execute(address: slots.Address, unit: Unit, asking: bool) -> Any:
        slot = unit.slot
        if address != owners[slot] and not (asking and moving.get(slot) == address):
            return redis.exceptions.MovedError(f"{slot} {owners[slot][0]}:{owners[slot][1]}")
        if slot in moving and rng.random() < 0.3:
            return redis.exceptions.TryAgainError("split")
        if slot in moving and address == owners[slot] and rng.random() < 0.5:
            return redis.exceptions.AskError(f"{slot} {moving[slot][0]}:{moving[slot][1]}")
        executed[unit.commands[0][0][1]] += 1
        return "done"

    def answer(step: Any) -> Any:
        nonlocal now
        for slot in owners:
            if rng.random() < 0.1:
                if slot in moving:
                    owners[slot] = moving.pop(slot)
                else:
                    moving[slot] = rng.choice([server for server in servers if server != owners[slot]])
        if isinstance(step, Pause):
            now += step.seconds
            return None
        if isinstance(step, Refresh):
            slot_map.load([[slot, slot, [owner[0], owner[1]]] for slot, owner in owners.items()], A)
            return None
        return {
            address: redis.ConnectionError("cut")
            if rng.random() < 0.1
            else [[execute(address, unit, asking)] for unit, asking in part]
            for address, part in step.parts.items()
        }

    results = play(slots.deliver(slot_map, units, 60.0, clock=lambda: now), answer)

    for index, result in enumerate(results):
        if isinstance(result, Exception):
            assert isinstance(result, redis.ConnectionError)
            assert executed[index] == 0
        else:
            assert (result, executed[index]) == (["done"], 1)


@pytest.mark.parametrize(
    ("command", "slot"),
    [
        (("EVALSHA", "digest", 2, b"{x:1}:a", b"{x:1}:b", "argument"), HIGH),
        (("EVAL", "return 1", "0"), None),
        (("HGETALL", b"{x:1}:hot"), HIGH),
        (("set", "{x:1}:é", 1), HIGH),
        (("WAIT", 1, 100), None),
        (("INFO", "server"), None),
    ],
)
def test_the_slot_of_a_command(command: tuple[Any, ...], slot: int | None) -> None:
    """Scripts name how many keys they have; the other commands with keys begin with one."""
    assert slots.slot_of(command) == slot
