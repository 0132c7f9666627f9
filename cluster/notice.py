"""That a machine is about to go: the cloud's notice of it, and how Ray is told."""

import time
import urllib.error
import urllib.request
from typing import Any


def notice(metadata: str | None) -> str | None:
    """Why the cloud is about to take the machine, or None.

    Asks the metadata service (IMDSv2) for a spot notice and the group's lifecycle state. One that
    doesn't answer is no notice: the fleet's keeper at the head hears of it too.

    Args:
        metadata: The service's address; None where there is none, and so no notice.
    """
    if metadata is None:
        return None
    try:
        asked = urllib.request.Request(
            f"{metadata}/latest/api/token",
            method="PUT",
            headers={"X-aws-ec2-metadata-token-ttl-seconds": "60"},
        )
        with urllib.request.urlopen(asked, timeout=2) as answer:
            token = answer.read().decode()
        spot = _metadata(metadata, "spot/instance-action", token)
        if spot is not None:
            return f"spot notice {spot}"
        group = _metadata(metadata, "autoscaling/target-lifecycle-state", token)
        if group is not None and group.startswith("Terminated"):
            return f"its group's target is {group}"
    except OSError:
        return None
    return None


def drain(head: str, address: str, *, within_s: int, why: str) -> None:
    """Tells Ray that a node goes: nothing new starts on it, and it leaves when it is idle.

    Args:
        head: The head's address, `host:port`.
        address: The node's.
        within_s: Seconds after which it leaves, idle or not.
        why: For the log.
    """
    from ray import _raylet
    from ray.core.generated import autoscaler_pb2

    native: Any = _raylet
    messages: Any = autoscaler_pb2
    gcs = native.GcsClient(address=head)
    for id, info in gcs.get_all_node_info().items():
        # 0 is alive; a node of this address that died before is none of ours.
        if info.node_manager_address == address and info.state == 0:
            gcs.drain_node(
                id.hex(),
                messages.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
                why,
                int((time.time() + within_s) * 1000),
            )


def _metadata(url: str, path: str, token: str) -> str | None:
    asked = urllib.request.Request(
        f"{url}/latest/meta-data/{path}", headers={"X-aws-ec2-metadata-token": token}
    )
    try:
        with urllib.request.urlopen(asked, timeout=2) as answer:
            return str(answer.read().decode())
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 404:
                return None
        raise
