"""Keeping passwords out of messages."""

from __future__ import annotations

import re
from urllib.parse import unquote

_URL_PASSWORD = re.compile(r"(?P<head>[A-Za-z][A-Za-z0-9+.-]*://[^\s/@]*?):(?P<password>[^\s@]*)@")
_WORD_PASSWORD = re.compile(r"(?P<head>\b(?:password|passwd|pwd)\s*=\s*)(?P<password>'(?:[^'\\]|\\.)*'|[^\s&]+)", re.I)


def redact(text: str, *, secrets_in: str = "") -> str:
    """Replace passwords in a text by `***`.

    Args:
        text: A URL, a connection string or a message that may hold one.
        secrets_in: A connection string whose passwords are also replaced wherever they stand in `text`.
    """
    for pattern in (_URL_PASSWORD, _WORD_PASSWORD):
        for match in pattern.finditer(secrets_in):
            for secret in {match["password"].strip("'"), unquote(match["password"])} - {""}:
                text = text.replace(secret, "***")
    text = _URL_PASSWORD.sub(r"\g<head>:***@", text)
    return _WORD_PASSWORD.sub(r"\g<head>***", text)
