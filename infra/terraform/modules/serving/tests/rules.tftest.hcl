# The module's rules, held at the plan, without an account.

mock_provider "aws" {
  mock_data "aws_iam_policy_document" {
    defaults = { json = "{\"Version\":\"2012-10-17\",\"Statement\":[]}" }
  }
  mock_data "aws_caller_identity" {
    defaults = { account_id = "123456789012" }
  }
  mock_data "aws_partition" {
    defaults = { partition = "aws" }
  }
  mock_data "aws_region" {
    defaults = { name = "eu-central-1" }
  }
}

variables {
  name               = "prod"
  vpc_id             = "vpc-1"
  subnet_ids         = ["subnet-1", "subnet-2"]
  security_group_id  = "sg-1"
  domain_name        = "decide.example.com"
  public_zone_id     = "Z1"
  access_logs_bucket = "logs"
  kms_key_arn        = "arn:aws:kms:eu-central-1:123456789012:key/0"
}

run "the_balancer_is_inside_and_kept" {
  command = plan

  assert {
    condition     = aws_lb.this.internal && aws_lb.this.enable_deletion_protection && aws_lb.this.drop_invalid_header_fields
    error_message = "The balancer is on the internet, or may be deleted."
  }

  assert {
    condition     = aws_lb.this.access_logs[0].enabled
    error_message = "Nobody would know who called."
  }
}

run "tls_1_2_at_least" {
  command = plan

  assert {
    condition     = aws_lb_listener.https.protocol == "HTTPS" && aws_lb_listener.https.ssl_policy == "ELBSecurityPolicy-TLS13-1-2-2021-06"
    error_message = "The balancer speaks less than TLS 1.2."
  }
}

run "the_firewall_limits_and_keeps_no_rows" {
  command = plan

  assert {
    condition     = length(aws_wafv2_web_acl.this.rule) == 4
    error_message = "A rule of the firewall is missing."
  }

  assert {
    condition     = !aws_wafv2_web_acl.this.visibility_config[0].sampled_requests_enabled
    error_message = "Samples keep parts of customers' rows."
  }
}

run "refuses_a_limit_aws_wouldnt_take" {
  command = plan

  variables {
    requests_per_5_minutes = 10
  }

  expect_failures = [var.requests_per_5_minutes]
}

run "refuses_a_name_that_is_no_domain" {
  command = plan

  variables {
    domain_name = "decide"
  }

  expect_failures = [var.domain_name]
}
