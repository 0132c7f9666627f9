"""Ports of this machine that nothing listens on."""

import socket


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
