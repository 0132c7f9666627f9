"""environments/aws applied to an emulated AWS: it applies, it is what it says, and it goes."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from cluster import environment
from infra.image import fleet
from tests.infra.account import Account
from tests.infra.conftest import Terraform

FOLDER = "environments/aws"

# What the emulator needs of the provider; merged into the environment's own block, in the copy.
OVERRIDE = """
provider "aws" {
  skip_credentials_validation = true
  skip_metadata_api_check     = true
  skip_requesting_account_id  = false
  s3_use_path_style           = true
  max_retries                 = 2
}
"""

# The emulator doesn't hold the Deep Learning AMI's parameter; Amazon Linux stands in for it.
VARIABLES: dict[str, object] = {
    "name": "trial",
    "region": "eu-central-1",
    "account_id": "123456789012",
    "availability_zones": ["eu-central-1a", "eu-central-1b"],
    "client_cidrs": ["10.0.0.0/8"],
    "domain_name": "decide.example.com",
    "image_tag": "t1",
    "alarm_emails": ["data-platform@example.com"],
    "budget_usd": 500,
    "protected": False,
    "gpu_ami_parameter": "/aws/service/ami-amazon-linux-latest/al2023-ami-kernel-default-x86_64",
}

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def account(aws: dict[str, str]) -> Account:
    return Account(aws)


@pytest.fixture(scope="module")
def deployed(
    terraform: Terraform, aws: dict[str, str], account: Account
) -> Iterator[tuple[Terraform, dict[str, list[str]]]]:
    """The environment, applied; with what was there before it."""
    zone = account("route53").create_hosted_zone(Name="example.com", CallerReference="test")
    variables = {**VARIABLES, "public_zone_id": zone["HostedZone"]["Id"].split("/")[-1]}
    before = account.inventory()
    folder = terraform.root / FOLDER
    (folder / "emulator_override.tf").write_text(OVERRIDE)
    (folder / "terraform.tfvars.json").write_text(json.dumps(variables))
    here = Terraform(
        root=terraform.root,
        mirror=terraform.mirror,
        environment={**terraform.environment, **aws},
    )
    here.init(FOLDER)
    here.run(FOLDER, "apply", "-auto-approve", "-parallelism=30")
    yield here, before


Deployed = tuple[Terraform, dict[str, list[str]]]


def test_a_second_plan_is_empty(deployed: Deployed) -> None:
    here, _ = deployed
    here.run(FOLDER, "plan", "-parallelism=30", "-out=second")
    plan = json.loads(here.run(FOLDER, "show", "-json", "second"))
    changes = {
        change["address"]: change["change"]["actions"]
        for change in plan["resource_changes"]
        if change["change"]["actions"] not in (["no-op"], ["read"])
    }
    assert len(plan["resource_changes"]) > 150
    assert changes == {}


def test_the_environment_file_is_one(deployed: Deployed, tmp_path: Path) -> None:
    here, _ = deployed
    file = tmp_path / "trial.json"
    file.write_text(here.run(FOLDER, "output", "-json", "environment"))
    found = environment.load(str(file))
    assert found.queue is not None
    queue = urlsplit(found.queue)
    assert (queue.username, queue.password, queue.path) == ("queue", None, "/queue")
    assert queue.query == "sslmode=verify-full"
    assert replace(found, queue=None) == environment.Environment(
        name="trial",
        ray_address="head.trial.liftyard.internal:6379",
        dask_address="tls://head.trial.liftyard.internal:8786",
        dashboard_url="http://head.trial.liftyard.internal:8265",
        tracking_uri="http://tracking.trial.liftyard.internal:5000",
        storage_root="s3://liftyard-trial-123456789012-tables",
        serve_url="https://decide.example.com",
    )


def test_no_bucket_is_public_and_all_are_encrypted(deployed: Deployed, account: Account) -> None:
    s3 = account("s3")
    buckets = [b["Name"] for b in s3.list_buckets()["Buckets"]]
    assert len(buckets) == 3
    for bucket in buckets:
        block = s3.get_public_access_block(Bucket=bucket)["PublicAccessBlockConfiguration"]
        assert set(block.values()) == {True}, bucket
        assert s3.get_bucket_versioning(Bucket=bucket)["Status"] == "Enabled"
        rules = s3.get_bucket_encryption(Bucket=bucket)["ServerSideEncryptionConfiguration"]
        algorithm = rules["Rules"][0]["ApplyServerSideEncryptionByDefault"]["SSEAlgorithm"]
        # Access logs are delivered to buckets with S3's own key only.
        assert algorithm == ("AES256" if bucket.endswith("-logs") else "aws:kms")
        statements = json.loads(s3.get_bucket_policy(Bucket=bucket)["Policy"])["Statement"]
        tls = next(s for s in statements if s["Sid"] == "TlsOnly")
        assert tls["Effect"] == "Deny"
        assert tls["Condition"] == {"Bool": {"aws:SecureTransport": "false"}}
        allowed = [s["Principal"] for s in statements if s["Effect"] == "Allow"]
        assert all(set(principal) == {"Service"} for principal in allowed), bucket


def test_no_port_is_open(deployed: Deployed, account: Account) -> None:
    groups = account("ec2").describe_security_groups()["SecurityGroups"]
    names = {g["GroupId"]: g["GroupName"].removeprefix("liftyard-trial-") for g in groups}
    ours = [g for g in groups if any(t["Key"] == "project" for t in g.get("Tags", []))]
    reached = set()
    for group in ours:
        for rule in group["IpPermissions"]:
            ports = (rule["FromPort"], rule["ToPort"])
            by = [names[pair["GroupId"]] for pair in rule["UserIdGroupPairs"]]
            by += [address["CidrIp"] for address in rule["IpRanges"]]
            assert rule["IpProtocol"] == "tcp"
            assert rule["Ipv6Ranges"] == []
            reached |= {(names[group["GroupId"]], ports, each) for each in by}
    assert reached == {
        ("balancer", (443, 443), "10.0.0.0/8"),
        ("nodes", (8000, 8000), "balancer"),
        ("nodes", (1024, 65535), "nodes"),
        ("tracking", (5000, 5000), "nodes"),
        ("database", (5432, 5432), "tracking"),
        ("database", (5432, 5432), "nodes"),
        ("database", (5432, 5432), "submitters"),
        ("endpoints", (443, 443), "nodes"),
        ("endpoints", (443, 443), "tracking"),
    }


def test_machines_are_private_and_their_disks_encrypted(
    deployed: Deployed, account: Account
) -> None:
    instances = account.instances()
    assert len(instances) == 2
    for instance in instances:
        assert "PublicIpAddress" not in instance
        assert instance["MetadataOptions"]["HttpTokens"] == "required"
    volumes = account("ec2").describe_volumes()["Volumes"]
    assert len(volumes) == 3
    assert all(volume["Encrypted"] for volume in volumes)
    templates = account.templates()
    assert set(templates) == {f"liftyard-trial-{pool}" for pool in ("cpu", "gpu", "gpu-ready")}
    for template in templates.values():
        assert template["MetadataOptions"]["HttpTokens"] == "required"
        assert all(d["Ebs"]["Encrypted"] for d in template["BlockDeviceMappings"])
        assert template["NetworkInterfaces"][0]["AssociatePublicIpAddress"] is False


def test_pools_start_from_nothing_and_mix_spot_and_on_demand(
    deployed: Deployed, account: Account
) -> None:
    client = account("autoscaling")
    found = client.describe_auto_scaling_groups()["AutoScalingGroups"]
    groups = {g["AutoScalingGroupName"]: g for g in found}
    assert {name: (g["MinSize"], g["DesiredCapacity"]) for name, g in groups.items()} == {
        f"liftyard-trial-{pool}": (0, 0) for pool in ("cpu", "gpu", "gpu-ready")
    }
    mixed = groups["liftyard-trial-gpu"]["MixedInstancesPolicy"]
    types = [o["InstanceType"] for o in mixed["LaunchTemplate"]["Overrides"]]
    assert len(types) >= 3
    assert mixed["InstancesDistribution"]["OnDemandPercentageAboveBaseCapacity"] == 0
    warm = client.describe_warm_pool(AutoScalingGroupName="liftyard-trial-gpu-ready")
    assert warm["WarmPoolConfiguration"]["PoolState"] == "Stopped"
    for name in groups:
        hooks = client.describe_lifecycle_hooks(AutoScalingGroupName=name)["LifecycleHooks"]
        transitions = [h["LifecycleTransition"] for h in hooks]
        assert transitions == ["autoscaling:EC2_INSTANCE_TERMINATING"]


def test_the_keeper_reads_its_pools(
    deployed: Deployed, aws: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in aws.items():
        monkeypatch.setenv(name, value)
    settings = fleet.read("/liftyard/trial/fleet")
    assert (settings.drain_s, settings.idle_s) == (600, 600)
    assert [(p.group, p.cpus, p.gpus, p.max, p.warm) for p in settings.pools] == [
        ("liftyard-trial-gpu-ready", 16, 1, 4, 1),
        ("liftyard-trial-cpu", 16, 0, 16, 0),
        ("liftyard-trial-gpu", 16, 1, 8, 0),
    ]


def test_notices_reach_the_drain_queue(deployed: Deployed, account: Account) -> None:
    events = account("events")
    rules = [r["Name"] for r in events.list_rules()["Rules"]]
    assert sorted(rules) == ["liftyard-trial-spot", "liftyard-trial-terminate"]
    targets = {t["Arn"] for r in rules for t in events.list_targets_by_rule(Rule=r)["Targets"]}
    assert targets == {"arn:aws:sqs:eu-central-1:123456789012:liftyard-trial-drain"}
    notice = {
        "Source": "aws.ec2",
        "DetailType": "EC2 Spot Instance Interruption Warning",
        "Detail": json.dumps({"instance-id": "i-0123456789abcdef0", "instance-action": "stop"}),
    }
    assert events.put_events(Entries=[notice])["FailedEntryCount"] == 0
    sqs = account("sqs")
    queue = sqs.get_queue_url(QueueName="liftyard-trial-drain")["QueueUrl"]
    assert (
        "KmsMasterKeyId"
        in sqs.get_queue_attributes(QueueUrl=queue, AttributeNames=["All"])["Attributes"]
    )
    (message,) = sqs.receive_message(QueueUrl=queue, WaitTimeSeconds=5)["Messages"]
    assert json.loads(message["Body"])["detail"]["instance-id"] == "i-0123456789abcdef0"


def test_the_database_is_private_encrypted_and_backed_up(
    deployed: Deployed, account: Account
) -> None:
    (database,) = account("rds").describe_db_instances()["DBInstances"]
    assert database["StorageEncrypted"] is True
    assert database["PubliclyAccessible"] is False
    assert database["BackupRetentionPeriod"] == 14
    assert database["MultiAZ"] is True
    # The password is RDS's own secret, under the environment's key.
    assert database["MasterUserSecret"]["KmsKeyId"] == database["KmsKeyId"]


def test_the_balancer_speaks_tls_behind_a_firewall(deployed: Deployed, account: Account) -> None:
    elb = account("elbv2")
    (balancer,) = elb.describe_load_balancers()["LoadBalancers"]
    assert balancer["Scheme"] == "internal"
    (listener,) = elb.describe_listeners(LoadBalancerArn=balancer["LoadBalancerArn"])["Listeners"]
    assert (listener["Port"], listener["Protocol"]) == (443, "HTTPS")
    assert "TLS13" in listener["SslPolicy"]
    attributes = {
        a["Key"]: a["Value"]
        for a in elb.describe_load_balancer_attributes(LoadBalancerArn=balancer["LoadBalancerArn"])[
            "Attributes"
        ]
    }
    assert attributes["access_logs.s3.enabled"] == "true"
    waf = account("wafv2")
    acl = waf.get_web_acl_for_resource(ResourceArn=balancer["LoadBalancerArn"])["WebACL"]
    statements = [rule["Statement"] for rule in acl["Rules"]]
    assert sum("RateBasedStatement" in s for s in statements) == 1
    assert sum("ManagedRuleGroupStatement" in s for s in statements) == 3
    (health,) = elb.describe_target_groups()["TargetGroups"]
    targets = elb.describe_target_health(TargetGroupArn=health["TargetGroupArn"])
    assert len(targets["TargetHealthDescriptions"]) == 1  # the head; workers join as they come


def test_logs_are_encrypted_and_expire(deployed: Deployed, account: Account) -> None:
    groups = account("logs").describe_log_groups()["logGroups"]
    assert len(groups) == 6
    assert all(g["retentionInDays"] == 365 and g["kmsKeyId"].startswith("arn:") for g in groups)


def test_alarms_and_budget_reach_someone(deployed: Deployed, account: Account) -> None:
    alarms = account("cloudwatch").describe_alarms()["MetricAlarms"]
    assert len(alarms) >= 12
    topics = {topic for alarm in alarms for topic in alarm["AlarmActions"]}
    assert topics == {"arn:aws:sns:eu-central-1:123456789012:liftyard-trial-alarms"}
    budgets = account("budgets")
    (budget,) = budgets.describe_budgets(AccountId="123456789012")["Budgets"]
    assert budget["CostFilters"] == {"TagKeyValue": ["user:environment$trial"]}
    notifications = budgets.describe_notifications_for_budget(
        AccountId="123456789012", BudgetName="liftyard-trial"
    )["Notifications"]
    thresholds = sorted((n["NotificationType"], n["Threshold"]) for n in notifications)
    assert thresholds == [("ACTUAL", 80), ("ACTUAL", 100), ("FORECASTED", 100)]


def test_roles_name_what_they_may_reach(deployed: Deployed, account: Account) -> None:
    iam = account("iam")
    # These take no resource but `*`: they read, or hand out a login.
    unnamed = {
        "autoscaling:DescribeAutoScalingGroups",
        "ec2:DescribeInstances",
        "ecr:GetAuthorizationToken",
    }
    roles = [r["RoleName"] for r in iam.list_roles()["Roles"]]
    checked = 0
    for role in (r for r in roles if r.startswith("liftyard-trial-")):
        for name in iam.list_role_policies(RoleName=role)["PolicyNames"]:
            policy = iam.get_role_policy(RoleName=role, PolicyName=name)["PolicyDocument"]
            for statement in policy["Statement"]:
                checked += 1
                actions = statement["Action"]
                actions = {actions} if isinstance(actions, str) else set(actions)
                assert not any(action.endswith("*") for action in actions), (role, actions)
                if statement["Resource"] == "*":
                    assert actions <= unnamed, (role, actions)
    assert checked > 15


@pytest.mark.parametrize("name", ["ray-token", "queue-password"])
def test_secrets_are_in_no_state(deployed: Deployed, account: Account, name: str) -> None:
    here, _ = deployed
    kept = account("secretsmanager").get_secret_value(SecretId=f"liftyard/trial/{name}")
    assert len(kept["SecretString"]) == 64
    state = (here.root / FOLDER / "terraform.tfstate").read_text()
    assert kept["SecretString"] not in state
    assert all(kept["SecretString"] not in script for script in _boot_scripts(account).values())


def _boot_scripts(account: Account) -> dict[str, str]:
    """What machines run at their first boot, by role."""
    ec2 = account("ec2")
    scripts = {
        next(t["Value"] for t in i["Tags"] if t["Key"] == "Name"): ec2.describe_instance_attribute(
            InstanceId=i["InstanceId"], Attribute="userData"
        )["UserData"]["Value"]
        for i in account.instances()
    }
    scripts |= {name: template["UserData"] for name, template in account.templates().items()}
    return {
        name.removeprefix("liftyard-trial-"): base64.b64decode(text).decode()
        for name, text in scripts.items()
    }


def test_boot_scripts_are_sound(deployed: Deployed, account: Account, tmp_path: Path) -> None:
    scripts = _boot_scripts(account)
    assert set(scripts) == {"head", "tracking", "cpu", "gpu", "gpu-ready"}
    for name, script in scripts.items():
        file = tmp_path / name
        file.write_text(script)
        checked = subprocess.run(["bash", "-n", str(file)], capture_output=True, text=True)
        assert (checked.returncode, checked.stderr) == (0, ""), name
        assert len(script) < 16384, "user data may be 16 KB"
    assert "--gpus all" in scripts["gpu"]
    assert "--gpus all" not in scripts["cpu"]
    # The head hands over what is queued; no worker knows of the queue.
    queue = re.search(r"^LIFTYARD_QUEUE_URL=(.*)$", scripts["head"], re.MULTILINE)
    here, _ = deployed
    assert queue is not None
    assert queue[1] == json.loads(here.run(FOLDER, "output", "-json", "environment"))["queue"]
    units = re.findall(r"^cat >/etc/systemd/system/liftyard-(\S+)\.service", scripts["head"], re.M)
    assert units == ["head", "fleet", "dispatcher"]
    assert "queue" not in scripts["cpu"].lower()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl isn't installed")
def test_nodes_certify_themselves_by_one_authority(
    deployed: Deployed, account: Account, aws: dict[str, str], tmp_path: Path
) -> None:
    """The head makes the authority, a worker uses it; each certificate names its node's address."""
    scripts = _boot_scripts(account)
    tools = tmp_path / "bin"
    tools.mkdir()
    # What of the AWS command line the script uses, over boto3.
    (tools / "aws").write_text(AWS_COMMAND)
    (tools / "aws").chmod(0o755)
    variables = {**os.environ, **aws, "PATH": f"{tools}:{os.environ['PATH']}"}
    for role, address in (("head", "10.60.0.4"), ("cpu", "10.60.0.5")):
        script = scripts[role].partition("<<'SCRIPT'\n")[2].partition("\nSCRIPT\n")[0]
        file = tmp_path / f"{role}.sh"
        file.write_text(script)
        subprocess.run(
            ["bash", str(file), address, str(tmp_path / role)], env=variables, check=True
        )
        folder = tmp_path / role
        held = {"ca.pem", "node.key", "node.pem", "token", *(["pgpass"] if role == "head" else [])}
        assert {p.name for p in folder.iterdir()} == held
        assert all(p.stat().st_mode & 0o777 == 0o600 for p in folder.iterdir())
        for wanted in ("-verify_ip", address), ("-verify_ip", "127.0.0.1"):
            subprocess.run(
                ["openssl", "verify", "-x509_strict", "-CAfile", str(tmp_path / "head" / "ca.pem"),
                 *wanted, str(folder / "node.pem")],
                check=True, capture_output=True,
            )  # fmt: skip
        other = subprocess.run(
            ["openssl", "verify", "-CAfile", str(folder / "ca.pem"), "-verify_ip", "10.60.0.9",
             str(folder / "node.pem")],
            capture_output=True,
        )  # fmt: skip
        assert other.returncode != 0
    assert (tmp_path / "head" / "token").read_text() == (tmp_path / "cpu" / "token").read_text()
    assert "PRIVATE KEY" not in (tmp_path / "cpu" / "ca.pem").read_text()
    password = account("secretsmanager").get_secret_value(SecretId="liftyard/trial/queue-password")
    held_by_head = (tmp_path / "head" / "pgpass").read_text()
    assert held_by_head == f"*:5432:queue:queue:{password['SecretString']}\n"


AWS_COMMAND = f"""#!{sys.executable}
import sys
import boto3
arguments = sys.argv[1:]
options = dict(zip(arguments[2::2], arguments[3::2]))
client = boto3.client("secretsmanager")
if arguments[1] == "get-secret-value":
    try:
        print(client.get_secret_value(SecretId=options["--secret-id"])["SecretString"])
    except client.exceptions.ResourceNotFoundException as error:
        sys.exit(str(error))
else:
    text = open(options["--secret-string"].removeprefix("file://")).read()
    client.put_secret_value(SecretId=options["--secret-id"], SecretString=text)
"""


def test_destroy_leaves_nothing(deployed: Deployed, account: Account) -> None:
    here, before = deployed
    # The second plan has just read back all there is.
    here.run(FOLDER, "destroy", "-auto-approve", "-parallelism=30", "-refresh=false")
    assert here.run(FOLDER, "state", "list") == ""
    assert account.inventory() == before
