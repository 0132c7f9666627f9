"""Dask's scheduler and a worker as Ray actors, and the certificates that they show.

Dask's ports take who shows a certificate of the environment's authority where Ray speaks TLS
(`RAY_USE_TLS`), and else anyone: the hosts' network must then be private (an embedded one binds to
the loopback).
"""

from collections.abc import Callable
from typing import Any


def security() -> Any:
    """What connects this process to Dask as the environment does: Ray's own certificates.

    Returns:
        A `distributed.Security` of the files that `RAY_TLS_CA_CERT`, `RAY_TLS_SERVER_CERT` and
        `RAY_TLS_SERVER_KEY` name; None where `RAY_USE_TLS` isn't on.
    """
    from distributed import Security

    files = _tls_reader()()
    make: Any = Security
    return make(**files) if files else None


def _tls_reader() -> Callable[[], dict[str, Any]]:
    """What reads `distributed.Security`'s settings off a process's variables; {} without TLS.

    A function of its own at each call, so that it too is pickled by value.
    """

    def read() -> dict[str, Any]:
        import os

        if os.environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):
            return {}
        key, cert = os.environ["RAY_TLS_SERVER_KEY"], os.environ["RAY_TLS_SERVER_CERT"]
        settings: dict[str, Any] = {
            "require_encryption": True,
            "tls_ca_file": os.environ["RAY_TLS_CA_CERT"],
        }
        for role in ("client", "scheduler", "worker"):
            settings |= {f"tls_{role}_key": key, f"tls_{role}_cert": cert}
        return settings

    return read


def actor_classes() -> tuple[Any, Any]:
    """The actors of the scheduler and of a worker.

    Local classes are pickled by value, so that nodes need no copy of this package.
    """
    import ray

    tls = _tls_reader()

    @ray.remote
    class DaskScheduler:
        async def start(self, port: int) -> str:
            import ray
            from distributed import Scheduler, Security

            host = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
            files = tls()
            self.scheduler = await Scheduler(
                host=host,
                port=port,
                protocol="tls" if files else "tcp",
                security=Security(**files),  # type: ignore[no-untyped-call]
                dashboard=False,
            )
            return str(self.scheduler.address)

    @ray.remote
    class DaskWorker:
        def __init__(self, scheduler: str, memory_bytes: int) -> None:
            import asyncio

            self.scheduler = scheduler
            self.memory_bytes = memory_bytes
            # Asked here: each node has files of its own.
            self.tls = tls()
            self.up = asyncio.Event()

        async def run(self) -> None:
            import ray
            from distributed import Security, Worker

            self.worker = await Worker(
                self.scheduler,
                protocol="tls" if self.tls else "tcp",
                security=Security(**self.tls),  # type: ignore[no-untyped-call]
                host=ray.util.get_node_ip_address(),  # type: ignore[no-untyped-call]
                nthreads=1,
                memory_limit=self.memory_bytes,
            )
            self.up.set()
            await self.worker.finished()

        async def address(self) -> str:
            await self.up.wait()
            return str(self.worker.address)

    return DaskScheduler, DaskWorker
