"""Keeping passwords out of messages."""

from __future__ import annotations

import string
from urllib.parse import quote, urlsplit

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from langgraph_tiered_saver import ConfigurationError, TieredSaver
from langgraph_tiered_saver.redaction import redact

# On a busy machine neither a slow example nor slow generation is a failure.
RELAXED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
# "Zq" is in no host, scheme or message, so that finding it means that a part of the password was let through.
passwords = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), max_size=8).map(
    lambda text: f"Zq{text}Zq"
)
unquoted = st.text(string.ascii_letters + string.digits + string.punctuation.replace("&", ""), max_size=8).map(
    lambda text: f"Zq{text}Zq"
)
schemes = st.sampled_from(["redis", "rediss", "postgresql", "postgres", "unix"])
users = st.sampled_from(["", "user", "a.b-c", "user%40corp"])


@RELAXED
@given(schemes, users, passwords)
def test_an_encoded_password_in_a_url_is_hidden(scheme: str, user: str, password: str) -> None:
    """A percent-encoded password is replaced, and nothing else of the URL."""
    url = f"{scheme}://{user}:{quote(password, safe='')}@host.example:1234/0?timeout=3"

    assert redact(url) == f"{scheme}://{user}:***@host.example:1234/0?timeout=3"


@RELAXED
@given(st.sampled_from(["redis+cluster", "rediss+cluster", "redis+sentinel", "rediss+sentinel"]), users, passwords)
def test_an_encoded_password_in_a_url_of_several_servers_is_hidden(scheme: str, user: str, password: str) -> None:
    """The servers stay; the sentinels' own password goes, too."""
    encoded = quote(password, safe="")
    servers = "host.example:1234,[::1]:26379,other/service/0"
    url = f"{scheme}://{user}:{encoded}@{servers}?timeout=3&sentinel_password={encoded}"

    assert redact(url) == f"{scheme}://{user}:***@{servers}?timeout=3&sentinel_password=***"
    assert redact(f"{scheme}://{servers}") == f"{scheme}://{servers}"


@RELAXED
@given(users, unquoted)
def test_a_password_that_redis_py_takes_unencoded_is_hidden(user: str, password: str) -> None:
    """redis-py splits at the last `@`, so that a password may hold others; no part of it stays."""
    url = f"redis://{user}:{password}@host:6379/0"
    try:
        assume(urlsplit(url).password == password)
    except ValueError:
        assume(False)

    assert redact(url) == f"redis://{user}:***@host:6379/0"


@RELAXED
@given(passwords)
def test_a_quoted_password_of_a_connection_string_is_hidden(password: str) -> None:
    """The client library quotes with `'` and escapes with a backslash."""
    escaped = password.replace("\\", "\\\\").replace("'", "\\'")

    assert redact(f"host=h password='{escaped}' dbname=d") == "host=h password=*** dbname=d"
    assert redact(f"password = '{escaped}'") == "password = ***"


@RELAXED
@given(st.sampled_from(["password", "PASSWORD", "passwd", "pwd", "sslpassword"]), unquoted)
def test_an_unquoted_password_is_hidden(name: str, password: str) -> None:
    """So is a plain one, by whatever name, in a connection string or in a URL's query."""
    assume("'" not in password)
    assert "Zq" not in redact(f"host=h {name}={password} dbname=d")
    assert "Zq" not in redact(f"postgresql://host/db?{name}={quote(password, safe='')}&connect_timeout=3")


@RELAXED
@given(passwords, st.sampled_from(["could not connect as {}", 'invalid token: "{}"', "{}", "{}:{}"]))
def test_a_password_is_hidden_wherever_a_message_repeats_it(password: str, message: str) -> None:
    """A driver's message may quote the password without its URL, encoded or not."""
    url = f"postgresql://user:{quote(password, safe='')}@host/db"

    for form in (password, quote(password, safe="")):
        assert "Zq" not in redact(message.format(form, form), secrets_in=url)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "redis://localhost:6379/0",
        "redis://user@localhost:6379/0",
        "postgresql://user@/db?host=%2Ftmp%2Fsocket",
        "postgresql://localhost/db",
        "host=localhost dbname=d user=u",
        "connection to server at 127.0.0.1, port 5432 failed",
        "the password of user u is wrong",
    ],
)
def test_a_text_without_a_password_stays_as_it_is(text: str) -> None:
    """A message is only useful if what is no secret stays in it."""
    assert redact(text) == text


POSTGRES = "postgresql://localhost/db"
REDIS = "redis://localhost:6379/0"


@pytest.mark.parametrize(
    ("redis_url", "postgres_url"),
    [
        # As it is copied from a password generator that emits Base64.
        ("redis://:Zqa1/b2Zq+c3Zq==@localhost:6379/0", POSTGRES),
        ("redis://user:Zq?Zq@localhost:6379/0", POSTGRES),
        ("redis://user:Zq#Zq@localhost:6379/0", POSTGRES),
        ("redis://user:Zq[Zq@localhost:6379/0", POSTGRES),
        ("redis://user:Zq@Zq@localhost:port/0", POSTGRES),
        ("redis://user:Zq Zq@localhost:port/0", POSTGRES),
        ("http://user:Zq@Zq@localhost", POSTGRES),
        (REDIS, "postgresql://user:Zq Zq@localhost/db"),
        (REDIS, "postgresql://user:Zq%zzZq@localhost/db"),
        (REDIS, "postgresql://user:Zq@localhost/db?no such option=1"),
        (REDIS, "postgresql://localhost/db?password=Zq%zzZq"),
        (REDIS, "postgresql://localhost/db?sslpassword=Zq&nonsense"),
        (REDIS, "host=h password=Zq Zq"),
        (REDIS, "host=h password='Zq Zq"),
        (REDIS, "host=h password='Zq\\' Zq' nonsense"),
        (REDIS, "host=h sslpassword=Zq nonsense"),
    ],
)
def test_an_unusable_url_is_refused_without_its_password(redis_url: str, postgres_url: str) -> None:
    """A URL that cannot be read is where a password is least expected; no part of it reaches the error."""
    with pytest.raises(ConfigurationError) as raised:
        TieredSaver.from_conn_string(redis_url, postgres_url)

    assert "Zq" not in str(raised.value)
    assert "Zq" not in repr(raised.value.__cause__)
