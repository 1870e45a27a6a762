"""Who may use the HTTP server: bearer tokens of users, and cookies that the server signs."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sam4mllm_tool.errors import InputError

_SHARED = ""


@dataclass(frozen=True)
class Credentials:
    """Whom the server knows.

    Attributes:
        token: a token that any client may send; says nothing about who it is.
        users: tokens by user; what belongs to a user is kept apart by the token alone.
        cookie_key: signs cookies. A new one makes cookies from before invalid.
    """

    token: str | None = None
    users: Mapping[str, str] = field(default_factory=dict)
    cookie_key: bytes = field(default_factory=lambda: secrets.token_bytes(32))

    @property
    def needed(self) -> bool:
        """Whether clients have to send a token."""
        return bool(self.token or self.users)

    def user_of(self, authorization: str) -> str | None:
        """The user whose token the header holds ("" if the token is shared), ``None`` if nobody's.

        Every token is compared, and each in constant time.
        """
        scheme, _, given = authorization.partition(" ")
        found = None
        for user, token in ((_SHARED, self.token), *self.users.items()):
            if token and hmac.compare_digest(_digest(given.strip()), _digest(token)):
                found = user
        return found if scheme.lower() == "bearer" else None

    def new_cookie(self) -> str:
        """A name that nobody can guess, signed."""
        name = secrets.token_urlsafe(18)
        return f"{name}.{self._signature(name)}"

    def name_in(self, cookie: str) -> str | None:
        """The name in a cookie that this server signed; ``None`` for any other."""
        name, _, signature = cookie.rpartition(".")
        genuine = hmac.compare_digest(signature.encode(), self._signature(name).encode())
        return name if genuine else None

    def _signature(self, name: str) -> str:
        return hmac.new(self.cookie_key, name.encode(), hashlib.sha256).hexdigest()


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode(errors="replace")).digest()


def read_tokens(path: Path) -> dict[str, str]:
    """Tokens by user from a file with a line ``USER TOKEN`` for each; ``#`` begins a comment.

    Raises:
        InputError: the file cannot be read, a line is malformed, or a user or token comes twice.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}", hint="Check --tokens.") from error
    users: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) != 2 or words[0] in users or words[1] in users.values():
            raise InputError(
                f"{path}, line {number} is not one new user and one new token",
                hint="Write each as: USER TOKEN",
            )
        users[words[0]] = words[1]
    if not users:
        raise InputError(f"{path} holds no tokens", hint="Write each as: USER TOKEN")
    return users
