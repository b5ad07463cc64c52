"""Keeping passwords out of messages.

A text of the user's that cannot be parsed is never repeated, because nobody knows where in it the password ends; this
is for texts of others that may hold one.
"""

from __future__ import annotations

import re
from urllib.parse import unquote

# Up to the last "@": a password that was not percent-encoded may hold one.
_URL_PASSWORD = re.compile(r"(?P<head>[A-Za-z][A-Za-z0-9+.-]*:/{0,2}[^\s/@:]*):(?P<password>\S+)@")
_WORD_PASSWORD = re.compile(
    r"(?P<head>\w*(?:password|passwd|pwd)\s*=\s*)(?P<password>'(?:[^'\\]|\\.)*'?|[^\s&]+)", re.I
)


def redact(text: str, *, secrets_in: str = "") -> str:
    """Replace passwords in a text by `***`.

    Args:
        text: A message that may hold a URL or a connection string.
        secrets_in: A connection string whose passwords are also replaced wherever they stand in `text`.
    """
    for pattern in (_URL_PASSWORD, _WORD_PASSWORD):
        for match in pattern.finditer(secrets_in):
            forms = {match["password"].strip("'"), unquote(match["password"])} - {""}
            # The longer form first, or pieces of it could stay around the shorter one.
            for secret in sorted(forms, key=len, reverse=True):
                text = text.replace(secret, "***")
    text = _URL_PASSWORD.sub(r"\g<head>:***@", text)
    return _WORD_PASSWORD.sub(r"\g<head>***", text)
