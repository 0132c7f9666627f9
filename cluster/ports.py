"""Ports of this machine that nothing listens on."""

import socket


def held(port: int, host: str = "") -> str | None:
    """Why nobody could listen on the port now, or None; on any interface where `host` is empty."""
    with socket.socket() as probe:
        # Else a connection closed a minute ago counts as a listener.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.strerror
    return None


def free(count: int) -> list[int]:
    """As many different ports, free on every interface at this moment.

    Nothing holds them for the caller: another process may take one before it is used.
    """
    held = [socket.socket() for _ in range(count)]
    try:
        for each in held:
            each.bind(("", 0))
        return [each.getsockname()[1] for each in held]
    finally:
        for each in held:
            each.close()
