"""The fleet's keeper between a real Ray cluster and an emulated AWS."""

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import boto3
import pytest
import ray

from cluster.session import Session, connect
from infra.image import fleet

CPU = fleet.Pool(group="cpu", cpus=4, gpus=0, max=3, warm=0)
GPU = fleet.Pool(group="gpu", cpus=8, gpus=1, max=4, warm=0)
READY = fleet.Pool(group="ready", cpus=8, gpus=1, max=2, warm=1)
NONE = {"cpu": 0, "gpu": 0, "ready": 0}


@pytest.mark.parametrize(
    ("cpus", "gpus", "desired", "joined", "larger"),
    [
        (0, 0, NONE, {}, {}),
        (5, 0, NONE, {}, {"cpu": 2}),
        (99, 0, NONE, {}, {"cpu": 3}),
        (0, 1, NONE, {}, {"ready": 1}),
        (0, 3, NONE, {}, {"ready": 2, "gpu": 1}),
        (0, 0.5, NONE, {}, {"ready": 1}),
        # A machine that has been asked for is waited for; one that has joined is full.
        (4, 0, {**NONE, "cpu": 1}, {}, {}),
        (4, 0, {**NONE, "cpu": 1}, {"cpu": 1}, {"cpu": 2}),
        (6, 0, {**NONE, "cpu": 2}, {"cpu": 1}, {"cpu": 3}),
        (0, 1, {**NONE, "gpu": 1}, {}, {}),
        (4, 0, {**NONE, "cpu": 3}, {"cpu": 3}, {}),
    ],
)
def test_groups_grow_by_what_waits(
    cpus: float,
    gpus: float,
    desired: dict[str, int],
    joined: dict[str, int],
    larger: dict[str, int],
) -> None:
    pools = [READY, CPU, GPU]
    assert fleet.sizes(pools, cpus=cpus, gpus=gpus, desired=desired, joined=joined) == larger


@pytest.fixture
def groups(aws: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Groups `cpu` (two machines) and `gpu` (none) and a queue; addresses by instance.

    The subnet's addresses are the loopback's, so that Ray nodes can really have them.
    """
    for name, value in aws.items():
        monkeypatch.setenv(name, value)
    ec2, scaling = boto3.client("ec2"), boto3.client("autoscaling")
    vpc = ec2.create_vpc(CidrBlock="127.0.0.0/16")["Vpc"]["VpcId"]
    subnet = ec2.create_subnet(VpcId=vpc, CidrBlock="127.0.96.0/24")["Subnet"]["SubnetId"]
    image = ec2.describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
    ec2.create_launch_template(
        LaunchTemplateName="worker",
        LaunchTemplateData={"ImageId": image, "InstanceType": "m7i.large"},
    )
    for group, size in (("cpu", 2), ("gpu", 0)):
        scaling.create_auto_scaling_group(
            AutoScalingGroupName=group,
            MinSize=0,
            MaxSize=3,
            DesiredCapacity=size,
            LaunchTemplate={"LaunchTemplateName": "worker"},
            VPCZoneIdentifier=subnet,
        )
        scaling.put_lifecycle_hook(
            LifecycleHookName="drain",
            AutoScalingGroupName=group,
            LifecycleTransition="autoscaling:EC2_INSTANCE_TERMINATING",
        )
    boto3.client("sqs").create_queue(QueueName="drain")
    settings = {"pools": {p.group: asdict(p) for p in (CPU, GPU)}, "drain_s": 60, "idle_s": 3600}
    boto3.client("ssm").put_parameter(Name="/fleet", Type="String", Value=json.dumps(settings))
    reservations = ec2.describe_instances()["Reservations"]
    return {i["InstanceId"]: i["PrivateIpAddress"] for r in reservations for i in r["Instances"]}


@pytest.fixture
def cluster(groups: dict[str, str], tmp_path: Path) -> Iterator[Session]:
    """A head, and a Ray node at each machine's address."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
        patch.delenv("RAY_AUTH_TOKEN", raising=False)
        with connect(cpus=1) as session:
            ray_command = str(Path(sys.executable).with_name("ray"))
            nodes = []
            # Short, since the path of a socket may have 107 characters only.
            scratch = Path(tempfile.mkdtemp(prefix="fleet-"))
            try:
                for address in groups.values():
                    command = [
                        ray_command, "start", f"--address={session.address}", "--block",
                        f"--node-ip-address={address}", "--num-cpus=1", "--num-gpus=0",
                        "--object-store-memory=80000000", "--disable-usage-stats",
                        "--dashboard-agent-listen-port=0", f"--temp-dir={scratch / address}",
                    ]  # fmt: skip
                    node = subprocess.Popen(
                        command,
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.DEVNULL,
                        stderr=subprocess.DEVNULL,
                        start_new_session=True,
                    )
                    nodes.append(node)
                    _until(lambda address=address: address in _addresses())
                yield session
            finally:
                for node in nodes:
                    node.send_signal(signal.SIGTERM)
                for node in nodes:
                    node.wait(60)
                shutil.rmtree(scratch, ignore_errors=True)


def _addresses() -> set[str]:
    return {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}


def _until(reached: Callable[[], bool], within_s: float = 40) -> None:
    end = time.monotonic() + within_s
    while not reached():
        assert time.monotonic() < end, "not reached in time"
        time.sleep(0.2)


def _sizes() -> dict[str, int]:
    found = boto3.client("autoscaling").describe_auto_scaling_groups()["AutoScalingGroups"]
    return {g["AutoScalingGroupName"]: g["DesiredCapacity"] for g in found}


def _states() -> dict[str, str]:
    found = boto3.client("autoscaling").describe_auto_scaling_groups()["AutoScalingGroups"]
    return {i["InstanceId"]: i["LifecycleState"] for g in found for i in g["Instances"]}


@pytest.mark.timeout(120)
def test_machines_come_for_work_are_drained_and_given_back(
    groups: dict[str, str], cluster: Session
) -> None:
    first, second = groups
    queue = boto3.client("sqs").get_queue_url(QueueName="drain")["QueueUrl"]
    patient = fleet.read("/fleet")
    assert patient == fleet.Settings(pools=(CPU, GPU), drain_s=60, idle_s=3600)
    hasty = replace(patient, idle_s=0)
    keeper = fleet.Keeper(ray_address=cluster.address, queue_url=queue)

    @ray.remote(num_gpus=1)
    def work() -> None: ...

    task = work.remote()
    _until(lambda: keeper.turn(patient, wait_s=0) is None and _sizes() == {"cpu": 2, "gpu": 1})
    # Idle machines stay as long as work waits, whether or not it is for them.
    keeper.turn(hasty, wait_s=0)
    assert _sizes() == {"cpu": 2, "gpu": 1}
    ray.cancel(task)

    notice = {
        "source": "aws.autoscaling",
        "detail-type": "EC2 Instance-terminate Lifecycle Action",
        "detail": {
            "EC2InstanceId": first,
            "AutoScalingGroupName": "cpu",
            "LifecycleHookName": "drain",
            "LifecycleActionToken": "87654321-4321-4321-4321-210987654321",
        },
    }
    foreign = {
        "source": "aws.ec2",
        "detail-type": "EC2 Spot Instance Interruption Warning",
        "detail": {"instance-id": "i-0123456789abcdef0", "instance-action": "terminate"},
    }
    for event in (foreign, notice):
        boto3.client("sqs").send_message(QueueUrl=queue, MessageBody=json.dumps(event))
    keeper.turn(patient, wait_s=5)
    assert set(keeper.leaving) == {first}
    _until(lambda: keeper.turn(patient, wait_s=0) is None and not keeper.leaving)
    assert groups[first] not in _addresses()
    assert groups[second] in _addresses()
    assert _states()[first] == "Terminating:Proceed"
    assert _states()[second] == "InService"

    _until(lambda: keeper.turn(hasty, wait_s=0) is None and _sizes()["cpu"] == 1)
    assert second not in _states()
