"""The README's tables, made from the code they describe.

python -m tests.readme_tables      # writes them into README.md, between their marks
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import langgraph_tiered_saver as package

README = Path(__file__).parents[1] / "README.md"


def attribute_docstrings(cls: type[Any]) -> dict[str, str]:
    """The string below each field of a class."""
    (tree,) = ast.parse(inspect.getsource(cls)).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for field, text in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            assert isinstance(field.target, ast.Name)
            found[field.target.id] = " ".join(inspect.cleandoc(str(text.value.value)).split())
    return found


def documented_attributes(cls: type[Any]) -> dict[str, str]:
    """The entries of a class docstring's `Attributes:` section."""
    text = inspect.getdoc(cls) or ""
    section = text.split("Attributes:\n", 1)[1]
    return {name: " ".join(rest.split()) for name, rest in re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", section, re.M)}


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def config() -> str:
    """Every setting, with its default."""
    texts = attribute_docstrings(package.TieredConfig)
    fields = dataclasses.fields(package.TieredConfig)
    return table(
        ("setting", "default", "meaning"), [(f"`{f.name}`", f"`{f.default!r}`", texts[f.name]) for f in fields]
    )


def stats() -> str:
    """Every figure that `stats()` gives."""
    return table(
        ("figure", "meaning"), [(f"`{n}`", text) for n, text in documented_attributes(package.TieredStats).items()]
    )


def errors() -> str:
    """Every error, with what it says."""
    found = [
        value
        for name in package.__all__
        if inspect.isclass(value := getattr(package, name)) and issubclass(value, package.TieredSaverError)
    ]
    rows = []
    for error in found:
        if error is not package.TieredSaverError:
            paragraphs = re.split(r"\n\s*\n", inspect.getdoc(error) or "")
            text = [" ".join(p.split()) for p in paragraphs if not p.startswith("Attributes:")]
            rows.append((f"`{error.__name__}`", " ".join(text)))
    return table(("error", "meaning"), rows)


TABLES = {"config": config, "stats": stats, "errors": errors}


def filled(text: str) -> str:
    """The README with its tables made anew."""
    for name, make in TABLES.items():
        begin, end = f"<!-- {name}: made by tests/readme_tables.py -->", f"<!-- end of {name} -->"
        pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.S)
        assert pattern.search(text), f"README.md has no mark {begin}"
        text = pattern.sub(lambda _, b=begin, m=make, e=end: f"{b}\n{m()}\n{e}", text)
    return text


if __name__ == "__main__":
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")
