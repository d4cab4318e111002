"""What stands before every route: the size of a request, its bearer token, and the errors that no route expected."""

import asyncio
import hmac
import json
import logging
import traceback
from collections.abc import Collection

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from roberta_fast.serving.errors import body_of

logger = logging.getLogger("roberta_fast.serving")


class Guards:
    """ASGI middleware. seconds: for a request's body to arrive. open_paths: those that need no token, which is compared in
    constant time."""

    def __init__(self, app: ASGIApp, max_bytes: int, seconds: float, api_key: str | None, open_paths: Collection[str]):
        self.app, self.max_bytes, self.seconds, self.open_paths = app, max_bytes, seconds, frozenset(open_paths)
        self.expected = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if not self._is_allowed(scope, headers):
            await _refuse(scope, send, 401, "unauthorized", "a valid bearer token is required", (b"www-authenticate", b"Bearer"))
            return
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or len(length) > 18 or int(length) > self.max_bytes:
            await _refuse(scope, send, 413, "validation", self._too_large, (b"connection", b"close"))
            return
        started = False

        async def watched_send(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, self._limited(receive), watched_send)
        except Exception as error:  # the server's own log would print the message, which may quote the user's text
            logger.error("%s %s failed: %s", scope["method"], scope["path"], where_it_failed(error))
            if started:
                raise ConnectionAbortedError from None
            await _refuse(scope, send, 500, "backend", "internal error")

    def _is_allowed(self, scope, headers):
        if self.expected is None or (scope["path"] in self.open_paths and scope["method"] in ("GET", "HEAD")):
            return True
        return hmac.compare_digest(headers.get(b"authorization", b""), self.expected)

    def _limited(self, receive: Receive) -> Receive:
        received, until, is_whole = 0, asyncio.get_running_loop().time() + self.seconds, False

        async def limited() -> Message:
            nonlocal received, is_whole
            try:
                # Behind the body there is only the end of the connection to wait for.
                async with asyncio.timeout_at(None if is_whole else until):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"no whole body within {self.seconds:g} seconds", {"Connection": "close"}) from None
            received, is_whole = received + len(message.get("body", b"")), not message.get("more_body", False)
            if received > self.max_bytes:  # a chunked body says its length nowhere
                raise HTTPException(413, self._too_large, {"Connection": "close"})
            return message

        return limited

    @property
    def _too_large(self):
        return f"the request is larger than {self.max_bytes} bytes"


def where_it_failed(error: BaseException) -> str:
    """The type of an error and the lines that raised it, without its message, which may quote what a user sent."""
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    return " < ".join([type(error).__name__, *(f"{frame.filename}:{frame.lineno}" for frame in reversed(frames))])


async def _refuse(scope: Scope, send: Send, status: int, error_type: str, message: str, *headers: tuple[bytes, bytes]) -> None:
    body = json.dumps(body_of(scope["path"], status, error_type, message)).encode()
    size = (b"content-length", str(len(body)).encode())
    await send(
        {"type": "http.response.start", "status": status, "headers": [(b"content-type", b"application/json"), size, *headers]}
    )
    await send({"type": "http.response.body", "body": body})
