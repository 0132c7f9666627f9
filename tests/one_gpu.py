"""A Ray cluster of this process with two CPUs and a GPU that Ray counts, and nobody has."""

from collections.abc import Iterator
from contextlib import contextmanager

import ray

from cluster import session


@contextmanager
def connected() -> Iterator[None]:
    """Starts it, and ends it on exit."""
    session.authenticate(make=True)
    ray.init(
        address="local",
        num_cpus=2,
        num_gpus=1,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        _node_ip_address=session.loopback(),
    )
    try:
        yield
    finally:
        ray.shutdown()
