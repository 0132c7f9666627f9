"""Keeps as many workers as work needs, and moves work off those that are to go.

Runs on an environment's head (`entrypoint.sh fleet`). Ray says what work waits for room and how
long each node has been idle; the autoscaling groups start and end machines. Their notices (spot
interruption, rebalance recommendation, termination by the group) come by a queue: the node is
drained in Ray, so that its objects move and nothing new starts there, and then let go.

Knows nothing of Liftyard's packages: a cluster of any program on Ray can be kept by it. What it
remembers is lost with it: a machine then goes at its lifecycle hook's timeout.
"""

import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SPOT_S = 110  # a spot notice comes two minutes ahead


@dataclass(frozen=True, kw_only=True)
class Pool:
    """An autoscaling group of workers.

    Attributes:
        group: Name of the autoscaling group.
        cpus: CPUs of its smallest machine.
        gpus: GPUs of its smallest machine.
        max: Machines it may have.
        warm: Machines it keeps stopped and ready.
    """

    group: str
    cpus: int
    gpus: int
    max: int
    warm: int


@dataclass(frozen=True, kw_only=True)
class Worker:
    """A machine of a pool.

    Attributes:
        instance: EC2's id.
        group: Name of its autoscaling group.
        address: Private IPv4 address, by which Ray knows it.
        going: Whether its group is ending it already.
    """

    instance: str
    group: str
    address: str
    going: bool


@dataclass(frozen=True, kw_only=True)
class Leaving:
    """A machine that is being drained.

    Attributes:
        worker: The machine.
        until: When it is let go at the latest, seconds of the monotonic clock.
        hook: What completes its lifecycle action; None after a spot notice, which has none.
    """

    worker: Worker
    until: float
    hook: dict[str, str] | None


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the fleet is kept by; it may change while the keeper runs.

    Attributes:
        pools: The pools, those with warm machines first: they answer soonest.
        drain_s: Seconds that a worker has when its group ends it.
        idle_s: Seconds after which an idle worker is given back.
    """

    pools: tuple[Pool, ...]
    drain_s: int
    idle_s: int


def read(parameter: str) -> Settings:
    """The settings that Terraform wrote to an SSM parameter."""
    import boto3

    found = json.loads(boto3.client("ssm").get_parameter(Name=parameter)["Parameter"]["Value"])
    pools = [Pool(**pool) for _, pool in sorted(found["pools"].items())]
    return Settings(
        pools=tuple(sorted(pools, key=lambda pool: pool.warm == 0)),
        drain_s=found["drain_s"],
        idle_s=found["idle_s"],
    )


def waiting(status: Any) -> tuple[float, float]:
    """CPUs of work that waits and needs no GPU, and GPUs of work that waits.

    Args:
        status: A `ClusterStatus` of `ray.autoscaler.v2.sdk.get_cluster_status`.
    """
    cpus = gpus = 0.0
    demands = status.resource_demands
    for demand in [*demands.ray_task_actor_demand, *demands.placement_group_demand]:
        for request in demand.bundles_by_count:
            gpu = request.bundle.get("GPU", 0.0) * request.count
            gpus += gpu
            if not gpu:
                cpus += request.bundle.get("CPU", 0.0) * request.count
    return cpus, gpus


def sizes(
    pools: Sequence[Pool],
    *,
    cpus: float,
    gpus: float,
    desired: dict[str, int],
    joined: dict[str, int],
) -> dict[str, int]:
    """How many machines each group should have, where that is more than it has.

    Machines that were asked for and haven't joined Ray yet are counted first.

    Args:
        pools: The pools, in the order they are filled.
        cpus: CPUs that work without a GPU waits for.
        gpus: GPUs that work waits for.
        desired: Machines that each group was asked for.
        joined: Machines of each group that are in Ray.

    Returns:
        The new desired capacity by group.
    """
    larger: dict[str, int] = {}
    for has_gpu, need in ((True, gpus), (False, cpus)):
        fitting = [pool for pool in pools if (pool.gpus > 0) == has_gpu]
        room = [(pool, pool.gpus if has_gpu else pool.cpus) for pool in fitting]
        for pool, each in room:
            need -= each * max(0, desired[pool.group] - joined.get(pool.group, 0))
        for pool, each in room:
            if need <= 0:
                break
            more = min(math.ceil(need / each), pool.max - desired[pool.group])
            if more > 0:
                larger[pool.group] = desired[pool.group] + more
                need -= more * each
    return larger


class Keeper:
    """The fleet of one environment."""

    def __init__(self, *, ray_address: str, queue_url: str) -> None:
        """Connects to the groups, the queue and Ray.

        Args:
            ray_address: The head, `host:port`.
            queue_url: Queue of the notices.
        """
        import boto3

        self.ray_address = ray_address
        self.queue_url = queue_url
        self.groups = boto3.client("autoscaling")
        self.ec2 = boto3.client("ec2")
        self.queue = boto3.client("sqs")
        self.leaving: dict[str, Leaving] = {}

    def turn(self, settings: Settings, *, wait_s: int) -> None:
        """Drains what is to go, lets go what has drained, starts and ends machines.

        Args:
            settings: The pools and times.
            wait_s: How long to wait for a notice, 0 to 20 s.
        """
        workers, desired, least = self._fleet(settings.pools)
        found = self.queue.receive_message(
            QueueUrl=self.queue_url, MaxNumberOfMessages=10, WaitTimeSeconds=wait_s
        )
        status = self._status()
        nodes = {n.ip_address: n for n in [*status.active_nodes, *status.idle_nodes]}
        for message in found.get("Messages", []):
            self._drain(json.loads(message["Body"]), workers, nodes, settings.drain_s)
            self.queue.delete_message(
                QueueUrl=self.queue_url, ReceiptHandle=message["ReceiptHandle"]
            )
        self._let_go(nodes)
        joined: dict[str, int] = {}
        staying = [worker for worker in workers.values() if not worker.going]
        for worker in staying:
            joined[worker.group] = joined.get(worker.group, 0) + (worker.address in nodes)
        cpus, gpus = waiting(status)
        larger = sizes(settings.pools, cpus=cpus, gpus=gpus, desired=desired, joined=joined)
        for group, size in larger.items():
            _say("grow", group=group, size=size, waiting_cpus=cpus, waiting_gpus=gpus)
            self.groups.set_desired_capacity(
                AutoScalingGroupName=group, DesiredCapacity=size, HonorCooldown=False
            )
        for worker in staying:
            node = nodes.get(worker.address)
            idle_s = node.resource_usage.idle_time_ms / 1000 if node else 0.0
            # Work that waits may be for the idle machine: Ray hasn't placed it yet.
            enough = desired[worker.group] > least[worker.group] and not cpus and not gpus
            if idle_s > settings.idle_s and enough and worker.instance not in self.leaving:
                _say("shrink", instance=worker.instance, group=worker.group, idle_s=round(idle_s))
                self.groups.terminate_instance_in_auto_scaling_group(
                    InstanceId=worker.instance, ShouldDecrementDesiredCapacity=True
                )
                desired[worker.group] -= 1

    def _status(self) -> Any:
        from ray.autoscaler.v2.sdk import get_cluster_status

        return get_cluster_status(self.ray_address)

    def _fleet(
        self, pools: Sequence[Pool]
    ) -> tuple[dict[str, Worker], dict[str, int], dict[str, int]]:
        """Machines by instance id; desired and least machines by group."""
        names = [pool.group for pool in pools]
        pages = self.groups.get_paginator("describe_auto_scaling_groups").paginate(
            AutoScalingGroupNames=names
        )
        groups = [group for page in pages for group in page["AutoScalingGroups"]]
        # A warm pool's machines are stopped: they aren't in Ray and aren't counted as desired.
        group_of = {
            instance["InstanceId"]: (group["AutoScalingGroupName"], instance["LifecycleState"])
            for group in groups
            for instance in group["Instances"]
            if not instance["LifecycleState"].startswith("Warmed")
        }
        workers: dict[str, Worker] = {}
        if group_of:
            described = self.ec2.get_paginator("describe_instances").paginate(
                Filters=[{"Name": "instance-id", "Values": list(group_of)}]
            )
            for instance in (
                i for p in described for r in p["Reservations"] for i in r["Instances"]
            ):
                # A machine that has ended has no address any more.
                if "PrivateIpAddress" in instance:
                    key = instance["InstanceId"]
                    group, state = group_of[key]
                    workers[key] = Worker(
                        instance=key,
                        group=group,
                        address=instance["PrivateIpAddress"],
                        going=state.startswith("Terminating"),
                    )
        desired = {g["AutoScalingGroupName"]: g["DesiredCapacity"] for g in groups}
        least = {g["AutoScalingGroupName"]: g["MinSize"] for g in groups}
        return workers, desired, least

    def _drain(
        self, event: dict[str, Any], workers: dict[str, Worker], nodes: Any, drain_s: int
    ) -> None:
        detail = event["detail"]
        instance = detail.get("instance-id") or detail.get("EC2InstanceId")
        worker = workers.get(instance)
        if worker is None:
            # Spot notices are the whole account's, and not only this environment's.
            return
        known = self.leaving.get(worker.instance)
        hook = known.hook if known else None
        within_s = SPOT_S
        if event["source"] == "aws.autoscaling":
            hook = {
                "AutoScalingGroupName": detail["AutoScalingGroupName"],
                "LifecycleHookName": detail["LifecycleHookName"],
                "LifecycleActionToken": detail["LifecycleActionToken"],
                "InstanceId": instance,
            }
            within_s = drain_s
        node = nodes.get(worker.address)
        _say("drain", instance=instance, cause=event["detail-type"], in_ray=node is not None)
        if node is not None:
            from ray import _raylet
            from ray.core.generated import autoscaler_pb2

            native: Any = _raylet
            messages: Any = autoscaler_pb2
            # Ray never refuses to drain for this reason, as it may for an idle node.
            native.GcsClient(address=self.ray_address).drain_node(
                node.node_id,
                messages.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
                event["detail-type"],
                int((time.time() + within_s) * 1000),
            )
        until = time.monotonic() + within_s
        self.leaving[instance] = Leaving(worker=worker, until=until, hook=hook)

    def _let_go(self, nodes: Any) -> None:
        for instance, leaving in list(self.leaving.items()):
            drained = leaving.worker.address not in nodes
            if not drained and time.monotonic() < leaving.until:
                continue
            _say("let go", instance=instance, drained=drained)
            if leaving.hook is not None:
                self.groups.complete_lifecycle_action(
                    **leaving.hook, LifecycleActionResult="CONTINUE"
                )
            del self.leaving[instance]


def _say(what: str, **facts: object) -> None:
    print(json.dumps({"at": time.time(), "what": what, **facts}), flush=True)


def main() -> None:
    """Keeps the fleet until it is stopped; an error is logged and the next turn tries again."""
    keeper = Keeper(
        ray_address=os.environ["RAY_ADDRESS"], queue_url=os.environ["LIFTYARD_DRAIN_QUEUE_URL"]
    )
    while True:
        try:
            keeper.turn(read(os.environ["LIFTYARD_FLEET_PARAMETER"]), wait_s=10)
        except Exception as error:
            # The head may be restarting, or AWS refuse for a moment; neither ends the fleet.
            _say("error", error=f"{type(error).__name__}: {error}")
            time.sleep(10)


if __name__ == "__main__":
    main()
