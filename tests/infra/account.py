"""What is in an AWS account, read through boto3."""

from typing import Any

import boto3


class Account:
    """The emulated account, read through boto3."""

    def __init__(self, variables: dict[str, str]) -> None:
        self._session = boto3.Session(
            aws_access_key_id=variables["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=variables["AWS_SECRET_ACCESS_KEY"],
            region_name=variables["AWS_DEFAULT_REGION"],
        )
        self._endpoint = variables["AWS_ENDPOINT_URL"]

    def __call__(self, service: str) -> Any:
        return self._session.client(service, endpoint_url=self._endpoint)

    def templates(self) -> dict[str, Any]:
        """Latest data of the launch templates by name."""
        ec2 = self("ec2")
        found = ec2.describe_launch_templates()["LaunchTemplates"]
        return {
            t["LaunchTemplateName"]: ec2.describe_launch_template_versions(
                LaunchTemplateId=t["LaunchTemplateId"], Versions=["$Latest"]
            )["LaunchTemplateVersions"][0]["LaunchTemplateData"]
            for t in found
        }

    def instances(self) -> list[Any]:
        """Instances that haven't ended."""
        reservations = self("ec2").describe_instances()["Reservations"]
        found = [i for r in reservations for i in r["Instances"]]
        return [i for i in found if i["State"]["Name"] != "terminated"]

    def inventory(self) -> dict[str, list[str]]:
        """Names of everything that an environment is made of."""
        ec2, elb, iam, logs = self("ec2"), self("elbv2"), self("iam"), self("logs")
        zones = self("route53").list_hosted_zones()["HostedZones"]
        kms = self("kms")
        keys = [kms.describe_key(KeyId=k["KeyId"])["KeyMetadata"] for k in kms.list_keys()["Keys"]]
        found = {
            "instances": [i["InstanceId"] for i in self.instances()],
            "volumes": [v["VolumeId"] for v in ec2.describe_volumes()["Volumes"]],
            "vpcs": [v["VpcId"] for v in ec2.describe_vpcs()["Vpcs"]],
            "subnets": [s["SubnetId"] for s in ec2.describe_subnets()["Subnets"]],
            "groups": [g["GroupId"] for g in ec2.describe_security_groups()["SecurityGroups"]],
            "addresses": [a["AllocationId"] for a in ec2.describe_addresses()["Addresses"]],
            "endpoints": [
                e["VpcEndpointId"]
                for e in ec2.describe_vpc_endpoints()["VpcEndpoints"]
                if e["State"] != "deleted"
            ],
            "gateways": [
                n["NatGatewayId"]
                for n in ec2.describe_nat_gateways()["NatGateways"]
                if n["State"] != "deleted"
            ],
            "templates": list(self.templates()),
            "pools": [
                g["AutoScalingGroupName"]
                for g in self("autoscaling").describe_auto_scaling_groups()["AutoScalingGroups"]
            ],
            "balancers": [
                b["LoadBalancerName"] for b in elb.describe_load_balancers()["LoadBalancers"]
            ],
            "targets": [t["TargetGroupName"] for t in elb.describe_target_groups()["TargetGroups"]],
            "firewalls": [
                a["Name"] for a in self("wafv2").list_web_acls(Scope="REGIONAL")["WebACLs"]
            ],
            "certificates": [
                c["DomainName"] for c in self("acm").list_certificates()["CertificateSummaryList"]
            ],
            "databases": [
                d["DBInstanceIdentifier"]
                for d in self("rds").describe_db_instances()["DBInstances"]
            ],
            "buckets": [b["Name"] for b in self("s3").list_buckets()["Buckets"]],
            "repositories": [
                r["repositoryName"] for r in self("ecr").describe_repositories()["repositories"]
            ],
            "queues": self("sqs").list_queues().get("QueueUrls", []),
            "topics": [t["TopicArn"] for t in self("sns").list_topics()["Topics"]],
            "secrets": [s["Name"] for s in self("secretsmanager").list_secrets()["SecretList"]],
            "log groups": [g["logGroupName"] for g in logs.describe_log_groups()["logGroups"]],
            "alarms": [
                a["AlarmName"] for a in self("cloudwatch").describe_alarms()["MetricAlarms"]
            ],
            "rules": [r["Name"] for r in self("events").list_rules()["Rules"]],
            "budgets": [
                b["BudgetName"]
                for b in self("budgets").describe_budgets(AccountId="123456789012")["Budgets"]
            ],
            "roles": [r["RoleName"] for r in iam.list_roles()["Roles"]],
            "profiles": [
                p["InstanceProfileName"] for p in iam.list_instance_profiles()["InstanceProfiles"]
            ],
            "zones": [f"{z['Name']} {z['ResourceRecordSetCount']}" for z in zones],
            # AWS keeps a key for a week at least, disabled.
            "keys": [k["KeyId"] for k in keys if k["KeyState"] != "PendingDeletion"],
        }
        return {kind: sorted(names) for kind, names in found.items()}
