"""Real LangGraph graphs, begun by one process and resumed by another, compared with the same graphs in memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import uuid
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

import psycopg
import pytest
import redis
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.postgres import PostgresSaver

from langgraph_tiered_saver import TieredSaver
from tests.integration import graphs
from tests.support import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from langgraph_tiered_saver.embedded import EmbeddedServers

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Relay:
    """How a thread is handed over: who begins it, who resumes it, and how both call the graph."""

    begins: str
    resumes: str
    asynchronous: bool


RELAYS = {
    "async": Relay("tiered", "tiered", asynchronous=True),
    "from_postgres_saver": Relay("postgres", "tiered", asynchronous=False),
    "to_postgres_saver": Relay("tiered", "postgres", asynchronous=False),
}


@dataclass(frozen=True)
class Finished:
    """What two processes left: what the calls gave, and where the threads lie."""

    relay: Relay
    options: dict[str, Any]
    directory: Path
    begun: dict[str, Any]
    resumed: dict[str, Any]


@contextmanager
def database(servers: EmbeddedServers) -> Iterator[str]:
    name = f"test_{uuid.uuid4().hex}"
    with psycopg.connect(servers.postgres_url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE template0")
        yield urlunsplit(urlsplit(servers.postgres_url)._replace(path=f"/{name}"))
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


def second_process(options: dict[str, Any], **more: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.integration.graphs", json.dumps({**options, **more})],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    )


def output(process: subprocess.Popen[bytes]) -> Any:
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors.decode()
    return json.loads(out)


@pytest.fixture(scope="module", params=RELAYS)
def finished(request: pytest.FixtureRequest, servers: EmbeddedServers) -> Iterator[Finished]:
    """Every graph, begun in this process and resumed in another one."""
    relay = RELAYS[request.param]
    directory = Path(tempfile.mkdtemp(prefix="tiered-graphs-"))
    with database(servers) as postgres_url:
        options = {
            "redis_url": servers.redis_url,
            "postgres_url": postgres_url,
            "settings": {"key_prefix": graphs.random_prefix()},
            "directory": str(directory),
            "role": "resume",
            "asynchronous": relay.asynchronous,
        }
        with graphs.open_saver({**options, "kind": relay.begins}) as saver:
            saver.setup()
            begun = graphs.perform("begin", saver, directory, asynchronous=relay.asynchronous)
            if relay.resumes == "postgres":
                saver.flush()
            # The first process is still there, as in a rolling deployment.
            resumed = output(second_process(options, kind=relay.resumes))
        yield Finished(relay, options, directory, begun, resumed)
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], dict[str, Any]]:
    """What a graph gives when one process does it all on an InMemorySaver."""
    known: dict[tuple[str, bool], dict[str, Any]] = {}

    def run(name: str, asynchronous: bool) -> dict[str, Any]:
        if (name, asynchronous) not in known:
            directory = tmp_path_factory.mktemp("model")
            case = graphs.CASES[name]
            run, effects = graphs.runner(name, InMemorySaver(), directory, asynchronous=asynchronous)
            known[name, asynchronous] = {
                "begun": graphs.plain(case.begin(run, effects)),
                "resumed": graphs.plain(case.resume(run, effects)),
                "state": graphs.plain(run.state()),
                "history": graphs.plain(run.history()),
                "done": effects.done(),
            }
        return known[name, asynchronous]

    return run


def evict_hot(options: dict[str, Any]) -> int:
    """Remove the hot hashes, as a TTL would; the journal stays."""
    with redis.Redis.from_url(options["redis_url"]) as client:
        names = list(client.scan_iter(f"{{{options['settings']['key_prefix']}:*}}:hot:*", 1000))
        return int(client.delete(*names)) if names else 0


@pytest.mark.parametrize("name", graphs.CASES)
def test_a_graph_resumed_by_another_process_does_what_one_process_would(
    finished: Finished, expected: Callable[[str, bool], dict[str, Any]], name: str
) -> None:
    """I9, I6: results, state, history and side effects are those of one process on an InMemorySaver."""
    model = expected(name, finished.relay.asynchronous)

    with graphs.open_saver({**finished.options, "kind": finished.relay.resumes}) as saver:
        run, effects = graphs.runner(name, saver, finished.directory, asynchronous=finished.relay.asynchronous)
        found = {
            "begun": finished.begun[name],
            "resumed": finished.resumed[name],
            "state": graphs.plain(run.state()),
            "history": graphs.plain(run.history()),
            "done": effects.done(),
        }

    assert "traceback" not in found["begun"], found["begun"]["traceback"]
    assert "traceback" not in found["resumed"], found["resumed"]["traceback"]
    for part, value in graphs.normalised(model).items():
        assert graphs.normalised(found)[part] == value, part


@pytest.mark.parametrize("name", graphs.CASES)
def test_both_savers_and_both_tiers_read_the_same_history(finished: Finished, name: str) -> None:
    """I9: state and history are the same, ids and times included, hot, cold, and by a plain PostgresSaver."""
    with (
        graphs.open_saver({**finished.options, "kind": "tiered"}) as saver,
        graphs.open_saver({**finished.options, "kind": "postgres"}) as reference,
    ):
        plain_run, _ = graphs.runner(name, reference, finished.directory, asynchronous=False)
        run, _ = graphs.runner(name, saver, finished.directory, asynchronous=finished.relay.asynchronous)
        saver.flush()
        expected = [plain_run.state(), plain_run.history()]
        assert len(expected[1]) > 0
        if finished.relay.resumes == "postgres":
            # A saver that knows nothing of the hot tier went on with the thread.
            evict_hot(finished.options)

        first = [run.state(), run.history()]
        evict_hot(finished.options)
        cold = [run.state(), run.history()]
        warmed = [run.state(), run.history()]

    assert graphs.plain(first) == graphs.plain(expected)
    assert graphs.plain(cold) == graphs.plain(expected)
    assert graphs.plain(warmed) == graphs.plain(expected)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_fan_out_that_was_killed_redoes_no_finished_task(
    redis_url: str, postgres_url: str, key_prefix: str, tmp_path: Path, asynchronous: bool
) -> None:
    """I1: of 200 tasks, those whose writes were acknowledged before a SIGKILL are not run again."""
    options = {
        "redis_url": redis_url,
        "postgres_url": postgres_url,
        "settings": {"key_prefix": key_prefix},
        "directory": str(tmp_path),
        "kind": "tiered",
        "asynchronous": asynchronous,
    }
    effects = graphs.Effects(tmp_path)
    with TieredSaver.from_conn_string(redis_url, postgres_url, key_prefix=key_prefix) as saver:
        process = second_process(options, role="fan_out")

        def acknowledged() -> int:
            assert process.poll() is None, process.communicate()
            found = saver.get_tuple(graphs.fan_out_config())
            writes = found.pending_writes or [] if found else []
            return len({task_id for task_id, channel, _ in writes if channel == "results"})

        try:
            wait_until(lambda: acknowledged() == graphs.FREE_TASKS, 60, "the tasks that nothing holds back")
        finally:
            process.kill()
            process.communicate()
        assert effects.done() == {f"task {number}": 1 for number in range(graphs.FREE_TASKS)}

    effects.allow()
    found = output(second_process(options, role="go_on"))

    squares = [number * number for number in range(graphs.FAN_OUT)]
    assert found["results"] == [*squares, sum(squares)]
    assert effects.done() == {f"task {number}": 1 for number in range(graphs.FAN_OUT)}
    with PostgresSaver.from_conn_string(postgres_url) as reference:
        cold = reference.get_tuple(graphs.fan_out_config())
    assert cold is not None
    assert cold.checkpoint["channel_values"]["results"] == found["results"]


def test_delta_threads_are_answered_hot(make_saver: Callable[..., TieredSaver], tmp_path: Path) -> None:
    """I2: a checkpoint that names a delta channel's older snapshot without carrying it is complete, so it is a hit."""
    saver = make_saver()
    run = graphs.Runner(
        graphs.delta(saver, graphs.Effects(tmp_path)), {"configurable": {"thread_id": "delta"}}, asynchronous=False
    )
    model = graphs.Runner(graphs.delta(InMemorySaver(), graphs.Effects(tmp_path)), run.config, asynchronous=False)
    graphs.begin_delta(run, graphs.Effects(tmp_path))
    graphs.begin_delta(model, graphs.Effects(tmp_path))
    before = saver.stats()

    for turn in range(6):
        given = {"seldom": [f"s{turn}"], "turn": turn}
        assert run.invoke(given) == model.invoke(given)
        assert saver.get_tuple(run.config) is not None
        assert run.state().values == model.state().values

    after = saver.stats()
    assert after.hot_misses == before.hot_misses
    assert after.hot_hits >= before.hot_hits + 18


def test_every_fork_of_a_delta_thread_reads_as_postgres_saver_reads_it(
    make_saver: Callable[..., TieredSaver], postgres_url: str, redis_url: str, key_prefix: str, tmp_path: Path
) -> None:
    """I2, I9: whichever checkpoint of a delta thread is forked, the fork's tuple is the one PostgreSQL will hold."""
    saver = make_saver()
    effects = graphs.Effects(tmp_path)
    graph = graphs.delta(saver, effects)
    config = {"configurable": {"thread_id": "forked"}}
    run = graphs.Runner(graph, config, asynchronous=False)
    graphs.begin_delta(run, effects)
    older = [state.config for state in run.history()]
    assert len(older) > 9
    with PostgresSaver.from_conn_string(postgres_url) as reference:
        for number, at in enumerate(older):
            # The fork of an older checkpoint is put on a hot hash that holds another branch.
            fork = run.update(at, {"often": [f"fork {number}"], "turn": number}, "next")
            hot = saver.get_tuple(config)
            hot_state = run.state()
            saver.flush()
            cold = reference.get_tuple(config)

            assert hot == cold
            assert hot is not None
            assert hot.config["configurable"]["checkpoint_id"] == fork["configurable"]["checkpoint_id"]
            assert hot_state.values == graphs.delta(reference, effects).get_state(config).values
            evict_hot({"redis_url": redis_url, "settings": {"key_prefix": key_prefix}})
            assert run.state().values == hot_state.values
