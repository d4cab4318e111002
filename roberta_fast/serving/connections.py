"""How uvicorn speaks with clients: HTTP alone, and not for ever with those that ask nothing."""

import asyncio

from uvicorn.protocols.http.auto import AutoHTTPProtocol

REQUEST_SECONDS = 10.0  # to send the head of a request; uvicorn itself has a limit behind a response only


class Connection(AutoHTTPProtocol):
    """Closes a connection that brought no whole head of a request for ``REQUEST_SECONDS``, up to twice of which may pass."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._watch = self.loop.call_later(REQUEST_SECONDS, self._close_if_idle, self.cycle)

    def connection_lost(self, error: Exception | None) -> None:
        self._watch.cancel()
        super().connection_lost(error)

    def _close_if_idle(self, last):
        # uvicorn has a cycle for each request, from its head to the end of its response.
        if self.cycle is last and (last is None or last.response_complete):
            self.transport.close()
        else:
            self._watch = self.loop.call_later(REQUEST_SECONDS, self._close_if_idle, self.cycle)


OPTIONS = {"http": Connection, "ws": "none", "server_header": False}  # of uvicorn.Config
