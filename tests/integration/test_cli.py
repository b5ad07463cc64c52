"""The `langgraph-tiered` command, run as a user runs it: real processes, their output and their exit codes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import psycopg
import pytest
import redis
from langgraph.checkpoint.postgres import PostgresSaver

from langgraph_tiered_saver.embedded import EmbeddedServers
from langgraph_tiered_saver.hot.keys import Keyspace
from tests.support import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

COMMAND = str(Path(sys.executable).with_name("langgraph-tiered"))
RUN_SECONDS = 100  # far more than any run takes; a run that hangs fails instead of being waited for

# Acknowledges checkpoints that no flusher takes for ten minutes, says so, and waits to be killed.
WRITER = """
import sys
from langgraph.checkpoint.base import empty_checkpoint
from langgraph_tiered_saver import TieredSaver

saver = TieredSaver.from_env(flush_linger=600.0, sweep_interval=0)
saver.setup()
for thread in sys.argv[1:]:
    config = {"configurable": {"thread_id": thread, "checkpoint_ns": ""}}
    for number in range(3):
        version = saver.get_next_version(None, None)
        checkpoint = empty_checkpoint()
        checkpoint |= {"channel_values": {"value": [thread, number]}, "channel_versions": {"value": version}}
        config = saver.put(config, checkpoint, {"source": "loop", "step": number, "parents": {}}, {"value": version})
print("written", flush=True)
sys.stdin.read()
"""

# Runs the command with a report that cannot be the agent's.
DEMO_WITH_ANOTHER_REPORT = """
from langgraph_tiered_saver import cli, demo_agent
demo_agent.report_directly = lambda *arguments: "another report"
cli.main()
"""


def environment(**more: str) -> dict[str, str]:
    """An environment without URLs or settings of the user's, and a terminal width that does not wrap."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("LANGGRAPH_TIERED_")}
    for name in ("REDIS_URL", "DATABASE_URL"):
        kept.pop(name, None)
    return {**kept, "COLUMNS": "200", "NO_COLOR": "1", **more}


def run(*arguments: str | Path, command: tuple[str, ...] = (COMMAND,), **more: str) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    return subprocess.run(
        [*command, *map(str, arguments)], env=environment(**more), capture_output=True, text=True, timeout=RUN_SECONDS
    )


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory that PostgreSQL's account may enter when we are root, which pytest's own are not."""
    path = Path(tempfile.mkdtemp(prefix="tiered-cli-"))
    path.chmod(0o711)
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def files(directory: Path) -> Path:
    """Six files to report on, and what is not to be read: a binary, a hidden and an empty file, and a link."""
    root = directory / "files"
    (root / "package").mkdir(parents=True)
    (root / "notes.md").write_text("# Notes | of mine\nTODO: write them\n")
    for number in range(4):
        body = "".join(f"def function_{n}(): ...  # FIXME\n" for n in range(number))
        (root / "package" / f"module_{number}.py").write_text(f'"""Module {number}."""\n\nclass Thing: ...\n{body}')
    (root / "broken.py").write_text("def broken(:\n")
    (root / "binary.dat").write_bytes(b"\0\1\2")
    (root / ".hidden.py").write_text("x = 1\n")
    (root / "empty.py").touch()
    (root / "link.py").symlink_to(root / "broken.py")
    return root


def left_running(directory: Path) -> list[psutil.Process]:
    """Processes that work in a directory, or whose command line names it."""

    def names(process: psutil.Process) -> str:
        said = []
        for ask in (process.cmdline, process.cwd):
            with contextlib.suppress(psutil.Error):  # gone, a zombie, or nobody's business
                said.append(str(ask()))
        return " ".join(said)

    return [process for process in psutil.process_iter() if str(directory) in names(process)]


class Writer:
    """A process that leaves unflushed records of some threads when it is killed."""

    def __init__(self, urls: dict[str, str], *threads: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", WRITER, *threads],
            env=environment(**urls),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "written\n"

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()
        assert self.process.returncode == -signal.SIGKILL


@pytest.fixture
def urls(redis_url: str, postgres_url: str, key_prefix: str) -> dict[str, str]:
    """This test's database and prefix, as environment variables."""
    return {
        "LANGGRAPH_TIERED_REDIS_URL": redis_url,
        "LANGGRAPH_TIERED_POSTGRES_URL": postgres_url,
        "LANGGRAPH_TIERED_KEY_PREFIX": key_prefix,
    }


def steps_in_postgres(url: str, thread: str) -> list[int]:
    """The steps of a thread's versions, as plain PostgresSaver lists them."""
    with PostgresSaver.from_conn_string(url) as saver:
        return [found.metadata["step"] for found in saver.list({"configurable": {"thread_id": thread}})]


# --- demo ------------------------------------------------------------------------------------------------------------


def test_demo_kills_resumes_checks_and_measures(directory: Path) -> None:
    """The newcomer's command ends with 0 only when every claim held, prints its table, and leaves nothing behind."""
    began = time.monotonic()

    result = run("demo", TMPDIR=str(directory))

    assert result.returncode == 0, result.stdout + result.stderr
    assert time.monotonic() - began < 60
    text = result.stdout
    assert "A deterministic planner stands in for the model" in text
    assert re.search(r"files of the installed langgraph package", text)
    killed = re.search(r"SIGKILL +in the middle of step (\d+), where it was held: tool call (\d+) has run", text)
    assert killed is not None, text
    assert f"Agent 2 went on at step {killed[1]}" in text
    for claim in ("ended by SIGKILL", "saw every acknowledged step", "No finished step was redone",
                  "The report equals", "A plain PostgresSaver reads the same", "every acknowledged version",
                  "Nothing was lost"):  # fmt: skip
        assert re.search(rf"^ +✓ .*{claim}", text, re.M), claim
    for row, value in (("steps", r"\d+"), ("hot read, median", r"[\d.]+ ms"), ("hot write, median", r"[\d.]+ ms"),
                       ("cold read, median", r"[\d.]+ ms"), ("flush lag, median", r"[\d.]+ ms"),
                       ("versions in PostgreSQL", r"\d+"), ("redone steps", "0")):  # fmt: skip
        assert re.search(rf"^ +{row} +{value} ", text, re.M), row
    assert "The next thing to try" in text
    assert "01_quickstart.ipynb" in text
    assert "\x1b" not in text
    assert list(directory.iterdir()) == []
    assert left_running(directory) == []


def test_demo_reports_on_a_given_directory_and_keeps_its_data(directory: Path, files: Path) -> None:
    """With --data and --json: one JSON document, and a ledger, a report and a database that bear out what it says."""
    data = directory / "data"

    result = run("demo", "--directory", files, "--data", data, "--json")

    assert result.returncode == 0, result.stderr
    outcome: dict[str, Any] = json.loads(result.stdout)
    figures = outcome["figures"]
    assert outcome["ok"]
    assert outcome["kept"] == str(data)
    assert all(claim["holds"] for claim in outcome["claims"])
    # list_files, a count and a look at each of six files, grep
    assert figures["tool_calls"] == 1 + 6 + 6 + 1
    assert (figures["redone_steps"], figures["redone_tool_calls"], figures["lost_records"]) == (0, 0, 0)
    report = (data / "demo" / outcome["thread_id"] / "report.md").read_text()
    assert report == outcome["report"] + "\n"
    assert report.startswith("6 files, 21 lines, 4 classes, 6 functions, 7 marks to do.\n")
    assert "| package/module_3.py | 6 | 1 | 3 | 3 | Module 3. |" in report
    assert "| notes.md | 2 | 0 | 0 | 1 | Notes / of mine |" in report

    ledger = (data / "demo" / outcome["thread_id"] / "ledger.jsonl").read_text().splitlines()
    executed = Counter(json.loads(line)["call"] for line in ledger)
    assert len(executed) == figures["tool_calls"]
    assert sorted(executed.values())[-2:] == [1, 2], "the call in flight at the kill ran twice, and no other"
    assert left_running(directory) == []
    with EmbeddedServers.start(data) as servers:
        steps = steps_in_postgres(servers.postgres_url, outcome["thread_id"])
    assert steps == list(range(figures["steps"] - 2, -2, -1))
    assert figures["versions_in_postgresql"] == figures["steps"]


def test_demo_of_one_file_narrates_on_standard_error_with_json(directory: Path) -> None:
    """The smallest job is killed and resumed, too; with --json, standard output holds nothing but the JSON."""
    only = directory / "files"
    only.mkdir()
    (only / "one.txt").write_text("one line\n")

    result = run("demo", "--directory", only, "--json", TMPDIR=str(directory))

    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["figures"]["tool_calls"] == 4
    assert "SIGKILL" in result.stderr
    assert [path.name for path in directory.iterdir()] == ["files"]


def test_demo_with_a_false_claim_fails_and_names_it(directory: Path, files: Path) -> None:
    """Exit code 1, and the claim is listed, when a check comes out false."""
    result = run("demo", "--directory", files, TMPDIR=str(directory),
                 command=(sys.executable, "-c", DEMO_WITH_ANOTHER_REPORT))  # fmt: skip

    assert result.returncode == 1, result.stderr
    assert re.search(r"1 claim does not hold:\n +The report equals one computed directly", result.stdout)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_demo_that_is_interrupted_leaves_nothing(number: signal.Signals, directory: Path) -> None:
    """Ctrl-C and SIGTERM at any moment stop the agents and the servers and remove the data."""
    process = subprocess.Popen(
        [COMMAND, "demo"], env=environment(TMPDIR=str(directory)), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
        # A shell that runs the tests in the background lets them, and what they start, ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stdout is not None
    while "agent 1" not in (line := process.stdout.readline()):
        assert line, process.communicate(timeout=10)
    process.send_signal(number)

    _, errors = process.communicate(timeout=30)

    assert (process.returncode, errors) == (130, "langgraph-tiered: Interrupted; everything it started is stopped.\n")
    assert left_running(directory) == []
    assert list(directory.iterdir()) == []


def test_demo_refuses_directories_it_cannot_use(directory: Path, files: Path) -> None:
    """Exit code 2 and one line for an empty directory, a missing one, and data among the files."""
    empty = directory / "empty"
    empty.mkdir()

    results = [
        run("demo", "--directory", empty),
        run("demo", "--directory", directory / "missing"),
        run("demo", "--directory", files, "--data", files / "data"),
        run("demo", "--data", files),
    ]

    assert [result.returncode for result in results] == [2, 2, 2, 2]
    assert "holds no text files" in results[0].stderr
    assert "does not exist" in results[1].stderr
    assert "lies among the files" in results[2].stderr
    assert "holds other files" in results[3].stderr
    assert not any("Traceback" in result.stderr for result in results)


# --- worker ----------------------------------------------------------------------------------------------------------


def test_worker_once_adopts_what_a_killed_writer_left(urls: dict[str, str], postgres_url: str) -> None:
    """I1: what a process acknowledged before SIGKILL is in PostgreSQL when `worker --once` has exited with 0."""
    Writer(urls, "thread {a}:1/ü", "b").kill()
    assert steps_in_postgres(postgres_url, "b") == []

    result = run("worker", "--once", "--json", **urls)

    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    assert (summary["adopted_records"], summary["unflushed_threads"]) == (6, 0)
    assert steps_in_postgres(postgres_url, "thread {a}:1/ü") == [2, 1, 0]
    assert steps_in_postgres(postgres_url, "b") == [2, 1, 0]
    again = run("worker", "--once", **urls)
    assert again.returncode == 0
    assert re.fullmatch(r"Done in [\d.]+ s: 0 records adopted, 0 threads with unflushed records\.\n", again.stdout)


def test_worker_once_takes_urls_and_names_as_options(
    redis_url: str, postgres_url: str, key_prefix: str, urls: dict[str, str]
) -> None:
    """Options name the servers, the key prefix and the schema, and win over the environment."""
    Writer({**urls, "LANGGRAPH_TIERED_POSTGRES_SCHEMA": "agents"}, "a").kill()

    options = {
        "--redis-url": redis_url,
        "--postgres-url": postgres_url,
        "--schema": "agents",
        "--key-prefix": key_prefix,
    }
    given = [word for option in options.items() for word in option]
    result = run("worker", "--once", *given, LANGGRAPH_TIERED_KEY_PREFIX="another", REDIS_URL="redis://nowhere")

    assert result.returncode == 0, result.stderr
    with psycopg.connect(postgres_url) as connection:
        assert connection.execute("SELECT count(*) FROM agents.checkpoints").fetchone() == (3,)


def test_worker_once_names_threads_that_postgresql_refuses(
    urls: dict[str, str], redis_url: str, postgres_url: str, key_prefix: str
) -> None:
    """Exit code 1 names a thread whose journal cannot be written; every other thread is adopted."""
    Writer(urls, "good", "bad").kill()
    with redis.Redis.from_url(redis_url) as client:
        shards = int(client.hget(f"{{{key_prefix}}}:meta", "shards"))
        journal = Keyspace(key_prefix, shards).thread("bad").journal
        newest = int(client.xrevrange(journal, count=1)[0][0].split(b"-")[0])
        client.xadd(journal, {"r": b"not a record"}, id=f"{newest + 1}-0")

    result = run("worker", "--once", **urls)

    assert result.returncode == 1
    assert "'bad'" in result.stderr.splitlines()[-1]
    assert steps_in_postgres(postgres_url, "good") == [2, 1, 0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_worker_adopts_until_it_is_told_to_stop(
    number: signal.Signals, urls: dict[str, str], postgres_url: str
) -> None:
    """A running worker adopts orphans past their grace, and ends with 0 within seconds of a signal."""
    worker = subprocess.Popen(
        [COMMAND, "worker", "--interval", "0.2", "--grace", "0.5", "--status-interval", "0.5"],
        env=environment(**urls), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        Writer(urls, "a").kill()
        wait_until(lambda: steps_in_postgres_if_any(postgres_url, "a") == [2, 1, 0], message="adoption")
        began = time.monotonic()
        worker.send_signal(number)
        output, log = worker.communicate(timeout=20)
    finally:
        worker.kill()

    assert worker.returncode == 0, log
    assert time.monotonic() - began < 5
    assert output == ""
    assert re.search(r"Worker started for key prefix", log)
    assert re.search(r"Adopting the unflushed records of 1 threads", log)
    assert re.search(rf"{number.name}: draining\n.*Worker stopped after .*: 3 records adopted, 0 threads", log)
    assert len(re.findall("Worker started|Adopting|draining|stopped", log)) == 4, "one line for each change"


def steps_in_postgres_if_any(url: str, thread: str) -> list[int]:
    """`steps_in_postgres`, or nothing while the tables are missing."""
    try:
        return steps_in_postgres(url, thread)
    except psycopg.errors.UndefinedTable:
        return []


# --- errors and help -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("redis_given", "postgres_given", "code", "says"),
    [
        ("", "", 2, "No URL for Redis: set LANGGRAPH_TIERED_REDIS_URL"),
        ("redis://:hunter2@127.0.0.1:1/0", "", 2, "No URL for PostgreSQL"),
        ("http://me:hunter2@127.0.0.1/0", "postgresql://me:hunter2@127.0.0.1:1/x", 2, "The Redis URL"),
        ("redis://:hunter2@127.0.0.1:1/0", "postgres//me:hunter2@127.0.0.1", 2, "The PostgreSQL URL"),
        ("redis://me:hunter2@127.0.0.1:1/0", "postgresql://me:hunter2@127.0.0.1:1/x", 3, "Connection refused"),
        (None, "postgresql://me:hunter2@127.0.0.1:1/x", 3, "PostgreSQL is not available"),
        ("wrong password", "postgresql://me:hunter2@127.0.0.1:1/x", 3, "Check the user name and password"),
    ],
)
def test_wrong_urls_give_one_line_and_no_password(
    redis_given: str | None, postgres_given: str, code: int, says: str, redis_url: str, key_prefix: str
) -> None:
    """A URL that cannot be used is exit code 2, a server that cannot be reached is 3; no password is shown."""
    if redis_given is None:
        redis_given = redis_url
    elif redis_given == "wrong password":
        redis_given = re.sub(r"//:.*@", "//:hunter2@", redis_url)

    result = run("worker", "--once", "--key-prefix", key_prefix, LANGGRAPH_TIERED_REDIS_URL=redis_given,
                 LANGGRAPH_TIERED_POSTGRES_URL=postgres_given)  # fmt: skip

    assert result.returncode == code, result.stderr
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("langgraph-tiered: ")
    assert says in result.stderr
    assert "hunter2" not in result.stderr


def test_debug_shows_where_an_error_came_from() -> None:
    """--debug, before or after the command, lets the error through with its traceback."""
    arguments = ("worker", "--redis-url", "redis://127.0.0.1:1", "--postgres-url", "postgresql://127.0.0.1:1/x")

    results = [run("--debug", *arguments), run(*arguments, "--debug")]

    assert [result.returncode for result in results] == [1, 1]
    assert all("Traceback" in result.stderr and "BothTiersUnavailableError" in result.stderr for result in results)


def test_help_explains_each_command_and_the_exit_codes() -> None:
    """--help of each command tells its options, the variables it reads and the exit codes."""
    pages = {command: run(*command, "--help") for command in ((), ("demo",), ("worker",))}

    assert [page.returncode for page in pages.values()] == [0, 0, 0]
    assert all("Exit codes: 0 it is done; 1 a claim or a check failed" in page.stdout for page in pages.values())
    assert re.search(r"demo .*Kill an agent in mid-step", pages[()].stdout)
    assert re.search(r"worker .*Bring to PostgreSQL", pages[()].stdout)
    assert "--install-completion" in pages[()].stdout
    assert "deterministic planner stands in for the model" in pages[("demo",)].stdout
    for option in ("--directory", "--data", "--keep", "--json", "--debug"):
        assert option in pages[("demo",)].stdout
    for option in ("--redis-url", "--postgres-url", "--interval", "--grace", "--once", "LANGGRAPH_TIERED_REDIS_URL",
                   "DATABASE_URL"):  # fmt: skip
        assert option in pages[("worker",)].stdout


def test_version_completion_and_a_mistyped_command() -> None:
    """--version tells the version, the shell can complete a command's name, and a wrong one is exit code 2."""
    version = run("--version")
    completed = run(_LANGGRAPH_TIERED_COMPLETE="complete_bash", COMP_WORDS="langgraph-tiered wo", COMP_CWORD="1")
    mistyped = run("wroker")

    assert re.fullmatch(r"langgraph-tiered \d+\.\d+\.\d+\S*\n", version.stdout)
    assert completed.stdout.split() == ["worker"]
    assert mistyped.returncode == 2
    assert "No such command 'wroker'" in mistyped.stderr
