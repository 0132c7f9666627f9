# The way in: a balancer with TLS, before it a firewall, behind it Serve on every node.

resource "aws_acm_certificate" "this" {
  domain_name       = var.domain_name
  validation_method = "DNS"
  tags              = var.tags

  lifecycle {
    create_before_destroy = true
  }
}

resource "aws_route53_record" "proof" {
  # The certificate has one name, so one record proves it.
  zone_id         = var.public_zone_id
  name            = one(aws_acm_certificate.this.domain_validation_options).resource_record_name
  type            = one(aws_acm_certificate.this.domain_validation_options).resource_record_type
  records         = [one(aws_acm_certificate.this.domain_validation_options).resource_record_value]
  ttl             = 300
  allow_overwrite = true
}

resource "aws_acm_certificate_validation" "this" {
  certificate_arn         = aws_acm_certificate.this.arn
  validation_record_fqdns = [aws_route53_record.proof.fqdn]
}

resource "aws_lb" "this" {
  #checkov:skip=CKV_AWS_150: Refusing deletion is on by default (protected); a trial environment may do without
  name               = "liftyard-${var.name}"
  load_balancer_type = "application"
  internal           = var.internal
  subnets            = var.subnet_ids
  security_groups    = [var.security_group_id]

  drop_invalid_header_fields = true
  desync_mitigation_mode     = "strictest"
  enable_deletion_protection = var.protected
  idle_timeout               = 120
  tags                       = var.tags

  access_logs {
    bucket  = var.access_logs_bucket
    prefix  = "balancer"
    enabled = true
  }
}

resource "aws_lb_target_group" "serve" {
  #checkov:skip=CKV_AWS_378: TLS ends at the balancer; from there to Serve, requests stay in the VPC, where only the balancer and nodes reach the port
  name                          = "liftyard-${var.name}-serve"
  vpc_id                        = var.vpc_id
  port                          = var.port
  protocol                      = "HTTP"
  target_type                   = "instance"
  load_balancing_algorithm_type = "least_outstanding_requests"
  # A batch that is being scored is finished before its machine goes.
  deregistration_delay = 60
  tags                 = var.tags

  health_check {
    path                = var.health_path
    matcher             = "200"
    interval            = 10
    timeout             = 5
    healthy_threshold   = 2
    unhealthy_threshold = 2
  }
}

resource "aws_lb_listener" "https" {
  load_balancer_arn = aws_lb.this.arn
  port              = 443
  protocol          = "HTTPS"
  ssl_policy        = "ELBSecurityPolicy-TLS13-1-2-2021-06"
  certificate_arn   = aws_acm_certificate_validation.this.certificate_arn
  tags              = var.tags

  default_action {
    type             = "forward"
    target_group_arn = aws_lb_target_group.serve.arn
  }
}

resource "aws_route53_record" "this" {
  zone_id = var.public_zone_id
  name    = var.domain_name
  type    = "A"

  alias {
    name                   = aws_lb.this.dns_name
    zone_id                = aws_lb.this.zone_id
    evaluate_target_health = true
  }
}

# --- firewall ---

locals {
  # Amazon's own rule groups, in the order they are asked.
  managed_rules = {
    AWSManagedRulesAmazonIpReputationList = 1
    AWSManagedRulesKnownBadInputsRuleSet  = 2
    AWSManagedRulesCommonRuleSet          = 3
  }

  # Rules that would refuse what the API is for; they count and don't block.
  count_only = {
    # Batches (Arrow IPC) are larger than the 8 KiB this rule takes for an attack.
    AWSManagedRulesCommonRuleSet = ["SizeRestrictions_BODY"]
  }
}

resource "aws_wafv2_web_acl" "this" {
  #checkov:skip=CKV_AWS_192: AWSManagedRulesKnownBadInputsRuleSet, which refuses Log4j lookups, is in managed_rules; the scanner doesn't follow a dynamic block
  name        = "liftyard-${var.name}"
  description = "Rate limit and managed rules before the balancer of Liftyard ${var.name}"
  scope       = "REGIONAL"
  tags        = var.tags

  default_action {
    allow {}
  }

  rule {
    name     = "rate"
    priority = 0

    action {
      block {
        custom_response {
          response_code = 429
        }
      }
    }

    statement {
      rate_based_statement {
        limit              = var.requests_per_5_minutes
        aggregate_key_type = "IP"
      }
    }

    visibility_config {
      metric_name                = "liftyard-${var.name}-rate"
      cloudwatch_metrics_enabled = true
      sampled_requests_enabled   = false
    }
  }

  dynamic "rule" {
    for_each = local.managed_rules

    content {
      name     = rule.key
      priority = rule.value

      override_action {
        none {}
      }

      statement {
        managed_rule_group_statement {
          vendor_name = "AWS"
          name        = rule.key

          dynamic "rule_action_override" {
            for_each = lookup(local.count_only, rule.key, [])

            content {
              name = rule_action_override.value

              action_to_use {
                count {}
              }
            }
          }
        }
      }

      visibility_config {
        metric_name                = "liftyard-${var.name}-${rule.key}"
        cloudwatch_metrics_enabled = true
        sampled_requests_enabled   = false
      }
    }
  }

  visibility_config {
    metric_name                = "liftyard-${var.name}"
    cloudwatch_metrics_enabled = true
    # Samples would keep parts of customers' rows.
    sampled_requests_enabled = false
  }
}

resource "aws_wafv2_web_acl_association" "this" {
  resource_arn = aws_lb.this.arn
  web_acl_arn  = aws_wafv2_web_acl.this.arn
}

resource "aws_cloudwatch_log_group" "firewall" {
  # The firewall writes to groups whose name starts with aws-waf-logs- only.
  name              = "aws-waf-logs-liftyard-${var.name}"
  retention_in_days = var.log_days
  kms_key_id        = var.kms_key_arn
  tags              = var.tags
}

resource "aws_wafv2_web_acl_logging_configuration" "this" {
  resource_arn            = aws_wafv2_web_acl.this.arn
  log_destination_configs = [aws_cloudwatch_log_group.firewall.arn]

  # Credentials don't belong in a log.
  redacted_fields {
    single_header {
      name = "authorization"
    }
  }

  # Requests let through are in the balancer's log.
  logging_filter {
    default_behavior = "DROP"

    filter {
      behavior    = "KEEP"
      requirement = "MEETS_ANY"

      condition {
        action_condition {
          action = "BLOCK"
        }
      }

      condition {
        action_condition {
          action = "COUNT"
        }
      }
    }
  }
}

# --- alarms ---

resource "aws_cloudwatch_metric_alarm" "errors" {
  alarm_name          = "liftyard-${var.name}-errors"
  alarm_description   = "More than 1 % of requests got a 5xx answer in five minutes. See Serve's log (log group /liftyard/${var.name}/nodes) and whether a model was just promoted."
  comparison_operator = "GreaterThanThreshold"
  threshold           = 1
  evaluation_periods  = 1
  treat_missing_data  = "notBreaching"
  alarm_actions       = var.alarm_topic_arns
  ok_actions          = var.alarm_topic_arns
  tags                = var.tags

  metric_query {
    id          = "percent"
    expression  = "100 * (FILL(targets, 0) + FILL(balancer, 0)) / requests"
    label       = "Requests that got a 5xx answer, percent"
    return_data = true
  }

  dynamic "metric_query" {
    for_each = {
      targets  = "HTTPCode_Target_5XX_Count"
      balancer = "HTTPCode_ELB_5XX_Count"
      requests = "RequestCount"
    }

    content {
      id = metric_query.key

      metric {
        namespace   = "AWS/ApplicationELB"
        metric_name = metric_query.value
        dimensions  = { LoadBalancer = aws_lb.this.arn_suffix }
        stat        = "Sum"
        period      = 300
      }
    }
  }
}

resource "aws_cloudwatch_metric_alarm" "slow" {
  alarm_name          = "liftyard-${var.name}-slow"
  alarm_description   = "One request in a hundred has taken longer than a second for 15 minutes. More replicas, or a larger pool."
  namespace           = "AWS/ApplicationELB"
  metric_name         = "TargetResponseTime"
  dimensions          = { LoadBalancer = aws_lb.this.arn_suffix }
  extended_statistic  = "p99"
  period              = 300
  evaluation_periods  = 3
  comparison_operator = "GreaterThanThreshold"
  threshold           = 1
  treat_missing_data  = "notBreaching"
  alarm_actions       = var.alarm_topic_arns
  ok_actions          = var.alarm_topic_arns
  tags                = var.tags
}

resource "aws_cloudwatch_metric_alarm" "no_target" {
  alarm_name          = "liftyard-${var.name}-no-target"
  alarm_description   = "No node answers the balancer: every request fails. Look at liftyard status and at Serve's log on the head."
  namespace           = "AWS/ApplicationELB"
  metric_name         = "HealthyHostCount"
  dimensions          = { LoadBalancer = aws_lb.this.arn_suffix, TargetGroup = aws_lb_target_group.serve.arn_suffix }
  statistic           = "Maximum"
  period              = 60
  evaluation_periods  = 3
  comparison_operator = "LessThanThreshold"
  threshold           = 1
  treat_missing_data  = "breaching"
  alarm_actions       = var.alarm_topic_arns
  ok_actions          = var.alarm_topic_arns
  tags                = var.tags
}
