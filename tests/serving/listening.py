"""The application of a replica on a socket, without Ray."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from serving.gate import Gate
from serving.replica import Models
from serving.routes import application
from serving.settings import Settings


@contextmanager
def listening(settings: Settings) -> Iterator[tuple[str, Models]]:
    """Its address, and the models behind it."""
    models = Models(settings)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        config = uvicorn.Config(
            application(models, Gate(settings)), lifespan="off", ws="none", log_level="error"
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[taken])))
        # A connection waits in the backlog until the thread takes it.
        taken.listen()
        thread.start()
        try:
            yield f"http://127.0.0.1:{taken.getsockname()[1]}", models
        finally:
            server.should_exit = True
            thread.join()
