# A machine that is to go says so first: spot notices, rebalance recommendations and the groups' own
# terminations come to a queue; the head drains the node in Ray and then lets it go.

resource "aws_autoscaling_lifecycle_hook" "drain" {
  for_each = var.pools

  name                   = "drain"
  autoscaling_group_name = aws_autoscaling_group.pool[each.key].name
  lifecycle_transition   = "autoscaling:EC2_INSTANCE_TERMINATING"
  # The head lets the machine go after drain_s at the latest; the minute is for its last turn.
  heartbeat_timeout = var.drain_s + 60
  # If the head is away, the machine goes all the same.
  default_result = "CONTINUE"
}

locals {
  going = {
    spot = {
      description = "Spot machines that AWS takes or is likely to take"
      pattern = {
        source      = ["aws.ec2"]
        detail-type = ["EC2 Spot Instance Interruption Warning", "EC2 Instance Rebalance Recommendation"]
      }
    }
    terminate = {
      description = "Machines that their group ends"
      pattern = {
        source      = ["aws.autoscaling"]
        detail-type = ["EC2 Instance-terminate Lifecycle Action"]
        detail      = { AutoScalingGroupName = [for name in keys(var.pools) : "liftyard-${var.name}-${name}"] }
      }
    }
  }
}

resource "aws_cloudwatch_event_rule" "going" {
  for_each = local.going

  name          = "liftyard-${var.name}-${each.key}"
  description   = each.value.description
  event_pattern = jsonencode(each.value.pattern)
  tags          = var.tags
}

resource "aws_cloudwatch_event_target" "going" {
  for_each = local.going

  rule = aws_cloudwatch_event_rule.going[each.key].name
  arn  = aws_sqs_queue.drain.arn
}

resource "aws_sqs_queue" "drain" {
  name                       = "liftyard-${var.name}-drain"
  kms_master_key_id          = var.kms_key_arn
  message_retention_seconds  = max(var.drain_s, 600)
  visibility_timeout_seconds = 30
  receive_wait_time_seconds  = 20
  tags                       = var.tags
}

resource "aws_sqs_queue_redrive_policy" "drain" {
  queue_url = aws_sqs_queue.drain.id

  redrive_policy = jsonencode({
    deadLetterTargetArn = aws_sqs_queue.undrained.arn
    maxReceiveCount     = 5
  })
}

resource "aws_sqs_queue" "undrained" {
  name                      = "liftyard-${var.name}-undrained"
  kms_master_key_id         = var.kms_key_arn
  message_retention_seconds = 14 * 24 * 3600
  tags                      = var.tags
}

data "aws_iam_policy_document" "drain" {
  statement {
    sid       = "Events"
    actions   = ["sqs:SendMessage"]
    resources = [aws_sqs_queue.drain.arn]

    principals {
      type        = "Service"
      identifiers = ["events.amazonaws.com"]
    }

    condition {
      test     = "ArnEquals"
      variable = "aws:SourceArn"
      values   = [for rule in aws_cloudwatch_event_rule.going : rule.arn]
    }
  }

  statement {
    sid       = "TlsOnly"
    effect    = "Deny"
    actions   = ["sqs:*"]
    resources = [aws_sqs_queue.drain.arn]

    principals {
      type        = "AWS"
      identifiers = ["*"]
    }

    condition {
      test     = "Bool"
      variable = "aws:SecureTransport"
      values   = ["false"]
    }
  }
}

resource "aws_sqs_queue_policy" "drain" {
  queue_url = aws_sqs_queue.drain.id
  policy    = data.aws_iam_policy_document.drain.json
}

resource "aws_cloudwatch_metric_alarm" "undrained" {
  alarm_name          = "liftyard-${var.name}-undrained"
  alarm_description   = "Machines went without their work being moved first: the head couldn't drain them. Their tasks are run again by Ray; see the head's log, stream fleet."
  namespace           = "AWS/SQS"
  metric_name         = "ApproximateNumberOfMessagesVisible"
  dimensions          = { QueueName = aws_sqs_queue.undrained.name }
  statistic           = "Maximum"
  period              = 300
  evaluation_periods  = 1
  comparison_operator = "GreaterThanThreshold"
  threshold           = 0
  alarm_actions       = var.alarm_topic_arns
  ok_actions          = var.alarm_topic_arns
  tags                = var.tags
}

resource "aws_cloudwatch_metric_alarm" "drain_late" {
  alarm_name          = "liftyard-${var.name}-drain-late"
  alarm_description   = "A notice that a machine will go has waited for more than a minute: the head isn't reading them. Look at the unit liftyard-fleet on the head."
  namespace           = "AWS/SQS"
  metric_name         = "ApproximateAgeOfOldestMessage"
  dimensions          = { QueueName = aws_sqs_queue.drain.name }
  statistic           = "Maximum"
  period              = 60
  evaluation_periods  = 2
  comparison_operator = "GreaterThanThreshold"
  threshold           = 60
  alarm_actions       = var.alarm_topic_arns
  ok_actions          = var.alarm_topic_arns
  tags                = var.tags
}
