"""Runs moto's server with the gaps filled that an apply of environments/aws meets.

`python tests/infra/emulator.py PORT`. Each gap of moto 5.2 is one function here, named for what is
missing; with them a second plan has to be empty, without exceptions. When moto fills one itself,
`test_terraform_aws.py` goes on passing with the function removed.
"""

import json
import sys
import threading
from typing import Any

from moto.autoscaling.models import LifecycleHook
from moto.autoscaling.responses import AutoScalingResponse
from moto.budgets.responses import BudgetsResponse
from moto.core.responses import ActionResult
from moto.ec2.exceptions import (
    InvalidPermissionNotFoundError,
    InvalidSecurityGroupRuleIdNotFoundError,
)
from moto.ec2.models import EC2Backend
from moto.ec2.models.security_groups import SecurityGroupRule
from moto.ec2.responses.monitoring import Monitoring
from moto.rds.models import DBInstance, DBParameterGroup, RDSBackend
from moto.route53.responses import Route53
from moto.server import main
from moto.sqs.models import Queue


def monitor_instances(self: Monitoring) -> ActionResult:
    """MonitorInstances isn't there; what RunInstances was asked for is already in the instance."""
    ids = self._get_param("InstanceIds", [])
    return ActionResult(
        {
            "InstanceMonitorings": [
                {"InstanceId": i, "Monitoring": {"State": "enabled"}} for i in ids
            ]
        }
    )


def describe_subscribers_for_notification(self: BudgetsResponse) -> str:
    """DescribeSubscribersForNotification isn't there; the subscribers are stored all the same."""
    account = self._get_param("AccountId")
    budget = self.backend.budgets[account][self._get_param("BudgetName")]
    asked = _comparable(self._get_param("Notification"))
    found = [n.subscribers for n in budget.notifications if _comparable(n.details) == asked]
    return json.dumps({"Subscribers": found[0] if found else []})


def list_tags_for_resource(self: BudgetsResponse) -> str:
    """ListTagsForResource isn't there; our budget has no tags."""
    return json.dumps({"ResourceTags": []})


def delete_notification(self: BudgetsResponse) -> str:
    """A notification is deleted whether or not its state is named."""
    budget = self.backend.budgets[self._get_param("AccountId")][self._get_param("BudgetName")]
    gone = _comparable(self._get_param("Notification"))
    budget.notifications = [n for n in budget.notifications if _comparable(n.details) != gone]
    return json.dumps({})


def _comparable(notification: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in notification.items() if k != "NotificationState"}


def create_private_zone(original: Any) -> Any:
    """A hosted zone with a VPC is private, without HostedZoneConfig saying so."""

    def create_hosted_zone(self: Route53) -> ActionResult:
        get = self._get_bool_param
        has_vpc = self._get_param("VPC.VPCId") is not None
        self._get_bool_param = lambda name, default=None: (
            has_vpc if name == "HostedZoneConfig.PrivateZone" else get(name, default)
        )
        result: ActionResult = original(self)
        return result

    return create_hosted_zone


def keep_source(original: Any) -> Any:
    """Parameters that a user set are read back as such."""

    def update_parameters(self: DBParameterGroup, new_parameters: Any) -> None:
        original(self, [{**parameter, "Source": "user"} for parameter in new_parameters])

    return update_parameters


def keep_performance_insights(original: Any) -> Any:
    """A database's performance insights are read back."""

    def __init__(self: DBInstance, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.performance_insights_enabled = kwargs.get("enable_performance_insights", False)
        self.performance_insights_kms_key_id = kwargs.get("performance_insights_kms_key_id")
        self.performance_insights_retention_period = 7

    return __init__


def answer_again(original: Any) -> Any:
    """A creation that the provider repeats, its answer having been late, is answered as before."""
    answered: dict[str, tuple[dict[str, Any], DBInstance]] = {}

    def create_db_instance(self: RDSBackend, db_kwargs: dict[str, Any]) -> DBInstance:
        name, asked = db_kwargs["db_instance_identifier"], dict(db_kwargs)
        if name in self.databases and answered[name][0] == asked:
            return answered[name][1]
        made: DBInstance = original(self, db_kwargs)
        answered[name] = asked, made
        return made

    return create_db_instance


def keep_role(original: Any) -> Any:
    """A group's own service-linked role is read back."""

    def create_auto_scaling_group(self: AutoScalingResponse) -> ActionResult:
        result: ActionResult = original(self)
        role = self._get_param("ServiceLinkedRoleARN")
        if role:
            name = self._get_param("AutoScalingGroupName")
            self.autoscaling_backend.autoscaling_groups[name].service_linked_role_arn = role
        return result

    return create_auto_scaling_group


def no_invented_target(original: Any) -> Any:
    """A lifecycle hook without a target is read back without one; moto names a queue of its own."""

    def __init__(self: LifecycleHook, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.role_arn = self.notification_target_arn = None

    return __init__


def complete_lifecycle_action(self: AutoScalingResponse) -> ActionResult:
    """CompleteLifecycleAction isn't there; the machine goes on to AWS's next state."""
    group = self.autoscaling_backend.autoscaling_groups[self._get_param("AutoScalingGroupName")]
    for state in group.instance_states:
        if state.instance.id == self._get_param("InstanceId"):
            state.lifecycle_state = "Terminating:Proceed"
    return ActionResult({})


def own_tags_apart(original: Any) -> Any:
    """A launch template's own tags aren't read back as tags of what it launches."""

    def create_launch_template(
        self: EC2Backend, name: str, description: str, template_data: Any, tag_spec: Any
    ) -> Any:
        given = template_data.get("TagSpecifications", [])
        launched = [tags for tags in given if tags["ResourceType"] != "launch-template"]
        data = {**template_data, "TagSpecifications": launched}
        return original(self, name, description, data, tag_spec)

    return create_launch_template


def compact_redrive(original: Any) -> Any:
    """A queue's redrive policy is read back without white space, as it was given."""

    def attributes(self: Queue) -> dict[str, Any]:
        result: dict[str, Any] = original.fget(self)
        if self.redrive_policy:
            result["RedrivePolicy"] = json.dumps(self.redrive_policy, separators=(",", ":"))
        return result

    return property(attributes)


def keep_policy(original: Any) -> Any:
    """A queue keeps its policy while another attribute is set; the provider waits for both."""

    def _set_attributes(self: Queue, attributes: dict[str, Any], now: float | None = None) -> None:
        with _QUEUES:
            kept = getattr(self, "_policy_json", None)
            original(self, attributes, now)
            if kept is not None and "Policy" not in attributes:
                self._policy_json = kept

    return _set_attributes


_QUEUES = threading.RLock()  # a queue's policy and redrive policy are set at the same time


def rule_is_gone(original: Any) -> Any:
    """Revoking a rule by an id that is gone is answered so, as a retried request meets it."""

    def revoke(*args: Any, **kwargs: Any) -> Any:
        with _RULES:
            try:
                return original(*args, **kwargs)
            except InvalidPermissionNotFoundError:
                ids = kwargs.get("security_rule_ids")
                if ids:
                    raise InvalidSecurityGroupRuleIdNotFoundError(ids[0]) from None
                raise

    return revoke


_RULES = threading.RLock()  # moto rewrites a group's list of rules, from many threads


def rule_description(self: SecurityGroupRule) -> str | None:
    """The description of a rule that names a group is read back as that of one with addresses."""
    return self.ip_range.get("Description") or self.source_group.get("Description")


if __name__ == "__main__":
    Monitoring.monitor_instances = monitor_instances
    BudgetsResponse.describe_subscribers_for_notification = describe_subscribers_for_notification
    BudgetsResponse.list_tags_for_resource = list_tags_for_resource
    BudgetsResponse.delete_notification = delete_notification
    Route53.create_hosted_zone = create_private_zone(Route53.create_hosted_zone)
    AutoScalingResponse.create_auto_scaling_group = keep_role(
        AutoScalingResponse.create_auto_scaling_group
    )
    AutoScalingResponse.complete_lifecycle_action = complete_lifecycle_action
    LifecycleHook.__init__ = no_invented_target(LifecycleHook.__init__)
    EC2Backend.create_launch_template = own_tags_apart(EC2Backend.create_launch_template)
    Queue.attributes = compact_redrive(Queue.attributes)
    Queue._set_attributes = keep_policy(Queue._set_attributes)
    DBParameterGroup.update_parameters = keep_source(DBParameterGroup.update_parameters)
    RDSBackend.create_db_instance = answer_again(RDSBackend.create_db_instance)
    DBInstance.__init__ = keep_performance_insights(DBInstance.__init__)
    EC2Backend.revoke_security_group_ingress = rule_is_gone(
        EC2Backend.revoke_security_group_ingress
    )
    EC2Backend.revoke_security_group_egress = rule_is_gone(EC2Backend.revoke_security_group_egress)
    SecurityGroupRule.description = property(rule_description)
    main(["-H", "127.0.0.1", "-p", sys.argv[1]])
