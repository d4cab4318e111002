"""Servers: real HTTP on a port of this machine."""

import contextlib
import threading
import time

import httpx
import uvicorn

from roberta_fast.serving.app import create_app
from roberta_fast.serving.connections import OPTIONS
from roberta_fast.serving.engine import Engine
from roberta_fast.serving.settings import Settings


@contextlib.contextmanager
def served(**settings):
    """An httpx.Client of a server in a thread of this process, with ``server`` and ``service`` beside it."""
    app = create_app(Engine(Settings(threads=1, **settings)))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=20, **OPTIONS))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.02)
        port = server.servers[0].sockets[0].getsockname()[1]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            client.service = app.state.service
            yield client
    finally:
        server.should_exit = True
        thread.join()
