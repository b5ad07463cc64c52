"""The README does not promise what the code does not do: its snippets run, its tables are the code's."""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
from operator import add
from pathlib import Path
from typing import Annotated, Any, TypedDict

import pytest
from langgraph.graph import END, START, StateGraph

from tests.readme_tables import README, filled

TEXT = README.read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```", TEXT, re.S | re.M)


class State(TypedDict):
    log: Annotated[list[str], add]


def builder() -> StateGraph[State]:
    graph = StateGraph(State)
    graph.add_node("work", lambda state: {"log": []})
    graph.add_edge(START, "work")
    graph.add_edge("work", END)
    return graph


def test_there_are_snippets() -> None:
    """The tests below look at something."""
    assert len(SNIPPETS) >= 8


@pytest.mark.parametrize("snippet", SNIPPETS, ids=[f"snippet-{number}" for number in range(len(SNIPPETS))])
def test_a_snippet_runs(
    snippet: str, redis_url: str, postgres_url: str, key_prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the README shows works as it stands, with the names it introduces."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LANGGRAPH_TIERED_REDIS_URL", redis_url)
    monkeypatch.setenv("LANGGRAPH_TIERED_POSTGRES_URL", postgres_url)
    monkeypatch.setenv("LANGGRAPH_TIERED_KEY_PREFIX", key_prefix)
    # Every test has a key prefix of its own; the README's reader does not need one.
    snippet = snippet.replace('key_prefix="my-agent"', f'key_prefix="{key_prefix}"')
    snippet = snippet.replace("(redis_url, postgres_url)", f'(redis_url, postgres_url, key_prefix="{key_prefix}")')
    names: dict[str, Any] = {"redis_url": redis_url, "postgres_url": postgres_url, "builder": builder()}
    setup = "from langgraph_tiered_saver import TieredSaver\n"

    code = compile(setup + snippet, "README.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    result = eval(code, names)
    if inspect.iscoroutine(result):
        asyncio.run(result)


def test_the_tables_are_up_to_date() -> None:
    """Every setting, figure and error is in the README as the code documents it."""
    assert filled(TEXT) == TEXT, "run python -m tests.readme_tables"


def test_links_and_commands_exist() -> None:
    """What the README points to is there."""
    root = README.parent
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        if not target.startswith("http"):
            assert (root / target).exists(), target
    for module in re.findall(r"python -m (tests\.[\w.]+)", TEXT):
        place = root / module.replace(".", "/")
        assert place.with_suffix(".py").exists() or (place / "__main__.py").exists(), module
    for file, test in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", TEXT):
        assert f"def {test}" in (root / file).read_text(), (file, test)
