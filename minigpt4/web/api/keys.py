"""Who may use the API and read the metrics."""

import hmac

from starlette.exceptions import HTTPException
from starlette.requests import Request


class Keys:
    """key: what programs must send; "" lets everyone in, unless the page asks for a password.

    page_has_password: then the API is closed until it has a key, or it would be a way around.
    """

    def __init__(self, key: str = "", page_has_password: bool = False) -> None:
        self._key = key.encode()
        self._closed = page_has_password and not key

    def check(self, request: Request) -> None:
        """HTTPException 401 without the key."""
        if self._closed:
            raise self._unauthorized("The API is closed: its operator has set no API key.")
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        # Compared in constant time: how long it takes tells nothing about the key.
        good = hmac.compare_digest(given.strip().encode("latin-1"), self._key)
        if self._key and not (good and scheme.lower() == "bearer"):
            raise self._unauthorized(
                "The API key is missing or wrong: send “Authorization: Bearer KEY”."
            )

    @staticmethod
    def _unauthorized(sentence: str) -> HTTPException:
        return HTTPException(401, sentence, {"WWW-Authenticate": "Bearer"})
