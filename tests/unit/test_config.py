"""Settings: validated when made, also from the environment."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from langgraph_tiered_saver import ConfigurationError, TieredConfig, TieredSaver
from langgraph_tiered_saver.config import ENVIRONMENT_PREFIX

FIELDS = {field.name: field.default for field in dataclasses.fields(TieredConfig)}
BOUNDS = ["flush_max_records", "flush_max_bytes", "max_backlog_records", "max_backlog_bytes", "redis_pool_size"]
TIMES = ["flush_linger", "backlog_timeout", "flush_timeout", "close_timeout", "exit_timeout", "sweep_interval",
         "orphan_grace", "postgres_statement_timeout"]  # fmt: skip


def test_the_defaults_can_be_used() -> None:
    """I8: without any setting, memory, backlog and every wait are bounded."""
    config = TieredConfig()

    assert config.write_mode == "behind"
    assert config.allow_eviction is False
    for name in [*BOUNDS, *TIMES, "redis_timeout", "postgres_timeout", "max_memory_bytes", "hot_ttl"]:
        assert math.isfinite(getattr(config, name)), name


def test_a_configuration_cannot_be_changed() -> None:
    """What was validated stays as it was."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        TieredConfig().flush_linger = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("key_prefix", ""),
        ("key_prefix", "a" * 65),
        ("key_prefix", "with{brace}"),
        ("key_prefix", "with:colon"),
        ("key_prefix", "line\n"),
        ("key_prefix", "ünicode"),
        ("postgres_schema", ""),
        ("postgres_schema", "pg_catalog"),
        ("postgres_schema", "a" * 64),
        ("postgres_schema", "ü" * 32),
        ("postgres_schema", "nul\0"),
        ("write_mode", "sideways"),
        ("write_mode", ""),
        ("shard_count", 0),
        ("shard_count", 4097),
        ("hot_ttl", 0.5),
        ("hot_ttl", -1.0),
        ("postgres_pool_size", 1),
        ("redis_timeout", 0.0),
        ("postgres_timeout", 0.0),
        ("redis_timeout", math.nan),
        ("max_memory_bytes", -1),
        ("redis_retries", -1),
        *((name, 0) for name in BOUNDS),
        *((name, -0.001) for name in TIMES),
        *((name, math.nan) for name in TIMES),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_name(name: str, value: Any) -> None:
    """I7: a setting that cannot be used is a typed error that names the field, when it is made."""
    with pytest.raises(ConfigurationError, match=name):
        TieredConfig(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("key_prefix", "a" * 64),
        ("key_prefix", "A-b_c.9"),
        ("postgres_schema", None),
        ("postgres_schema", 'quo"ted; DROP'),
        ("postgres_schema", "ü" * 31),
        ("write_mode", "through"),
        ("shard_count", 1),
        ("shard_count", 4096),
        ("hot_ttl", None),
        ("hot_ttl", 1),
        ("postgres_pool_size", 2),
        ("max_memory_bytes", 0),
        ("redis_retries", 0),
        *((name, 1) for name in BOUNDS),
        *((name, 0.0) for name in TIMES),
    ],
)
def test_a_value_at_the_border_is_taken(name: str, value: Any) -> None:
    """The borders that a message names belong to what is allowed."""
    assert getattr(TieredConfig(**{name: value}), name) == value


@pytest.mark.parametrize(
    "settings",
    [
        {"flush_lingr": 1.0},
        {"hot_ttl": "5"},
        {"shard_count": None},
        {"key_prefix": 7},
        {"key_prefix": None},
        {"write_mode": ["behind"]},
        {"postgres_schema": 3},
        {"flush_max_records": "many"},
    ],
    ids=str,
)
def test_a_setting_of_the_wrong_name_or_type_is_refused(settings: dict[str, Any]) -> None:
    """I7: a typing error in a setting is a typed error too, and names what it is about."""
    with pytest.raises(ConfigurationError):
        TieredConfig.from_settings(settings)
    with pytest.raises(ConfigurationError):
        TieredSaver.from_conn_string("redis://localhost", "postgresql://localhost/none", **settings)


def test_an_unknown_setting_is_answered_with_the_known_ones() -> None:
    """A message says what to do next."""
    with pytest.raises(ConfigurationError, match=r"'flush_lingr'.*flush_linger"):
        TieredConfig.from_settings({"flush_lingr": 1.0})


def test_every_field_can_be_set_by_a_variable() -> None:
    """`from_env` reads the text of each field's default back as that default."""
    environ = {ENVIRONMENT_PREFIX + name.upper(): str(value) for name, value in FIELDS.items()}

    assert TieredConfig(**TieredConfig.settings_from_env(environ)) == TieredConfig()
    assert set(TieredConfig.settings_from_env(environ)) == set(FIELDS)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("hot_ttl", "none", None),
        ("hot_ttl", "", None),
        ("hot_ttl", "3600", 3600.0),
        ("postgres_schema", "None", None),
        ("postgres_schema", "tiered", "tiered"),
        ("auto_setup", "FALSE", False),
        ("auto_setup", "yes", True),
        ("allow_eviction", "1", True),
        ("flush_max_records", "12", 12),
        ("flush_linger", "1e-3", 0.001),
        ("write_mode", "through", "through"),
        ("key_prefix", "12", "12"),
    ],
)
def test_a_variable_is_read_as_its_field_s_type(name: str, text: str, value: Any) -> None:
    """A number stays a number, a prefix of digits stays text."""
    settings = TieredConfig.settings_from_env({ENVIRONMENT_PREFIX + name.upper(): text, "OTHER": "x"})

    assert settings == {name: value}
    assert type(settings[name]) is type(value)


@pytest.mark.parametrize(
    ("name", "text"),
    [("auto_setup", "maybe"), ("flush_max_records", "1.5"), ("flush_linger", "soon"), ("shard_count", "")],
)
def test_a_variable_that_cannot_be_read_is_named(name: str, text: str) -> None:
    """I7: the message names the variable, not only the field."""
    with pytest.raises(ConfigurationError, match=ENVIRONMENT_PREFIX + name.upper()):
        TieredConfig.settings_from_env({ENVIRONMENT_PREFIX + name.upper(): text})


def test_from_env_takes_the_first_of_each_url(monkeypatch: pytest.MonkeyPatch) -> None:
    """The documented variables win over the common ones, and arguments win over all."""
    for name in ("REDIS_URL", "DATABASE_URL"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(ENVIRONMENT_PREFIX + name, raising=False)
    monkeypatch.delenv(ENVIRONMENT_PREFIX + "POSTGRES_URL", raising=False)
    with pytest.raises(ConfigurationError, match=f"{ENVIRONMENT_PREFIX}REDIS_URL"):
        TieredSaver.from_env()
    monkeypatch.setenv("REDIS_URL", "redis://common")
    with pytest.raises(ConfigurationError, match=f"{ENVIRONMENT_PREFIX}POSTGRES_URL"):
        TieredSaver.from_env()
    monkeypatch.setenv("DATABASE_URL", "postgresql://common/db")
    monkeypatch.setenv(ENVIRONMENT_PREFIX + "HOT_TTL", "60")
    monkeypatch.setenv(ENVIRONMENT_PREFIX + "SHARD_COUNT", "3")

    saver = TieredSaver.from_env(shard_count=5)

    assert (saver.config.hot_ttl, saver.config.shard_count) == (60.0, 5)
    monkeypatch.setenv(ENVIRONMENT_PREFIX + "REDIS_URL", "nonsense")
    with pytest.raises(ConfigurationError, match="The Redis URL cannot be used"):
        TieredSaver.from_env()


def test_every_field_is_documented_with_its_unit() -> None:
    """House rule: each field has a docstring of its own, and times and sizes name their unit."""
    import ast
    import inspect

    tree = ast.parse(inspect.getsource(TieredConfig)).body[0]
    assert isinstance(tree, ast.ClassDef)
    documented = {}
    for statement, following in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            assert isinstance(following, ast.Expr), statement.target.id
            assert isinstance(following.value, ast.Constant)
            documented[statement.target.id] = str(following.value.value)

    assert set(documented) == set(FIELDS)
    for name, text in documented.items():
        if name.endswith(("_timeout", "_linger", "_ttl", "_grace", "_interval")):
            assert "econds" in text, name
        if name.endswith("_bytes"):
            assert "bytes" in text, name
