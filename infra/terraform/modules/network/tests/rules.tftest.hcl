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
  availability_zones = ["eu-central-1a", "eu-central-1b", "eu-central-1c"]
  client_cidrs       = ["10.0.0.0/8"]
  kms_key_arn        = "arn:aws:kms:eu-central-1:123456789012:key/0"
}

run "subnets_are_spread_and_private" {
  command = plan

  assert {
    condition     = length(aws_subnet.private) == 3 && length(aws_subnet.public) == 3 && length(aws_nat_gateway.this) == 3
    error_message = "A zone is without a subnet or a gateway."
  }

  assert {
    condition     = alltrue([for subnet in aws_subnet.public : !subnet.map_public_ip_on_launch])
    error_message = "A machine could get a public address by itself."
  }
}

run "one_gateway_if_asked" {
  command = plan

  variables {
    nat_per_zone = false
  }

  assert {
    condition     = length(aws_nat_gateway.this) == 1 && length(aws_route.nat) == 3
    error_message = "Not every zone goes out by the one gateway."
  }
}

run "only_https_of_the_balancer_takes_addresses" {
  command = plan

  assert {
    condition     = alltrue([for rule in aws_vpc_security_group_ingress_rule.call : rule.cidr_ipv4 == null && rule.cidr_ipv6 == null])
    error_message = "A rule between groups names addresses."
  }

  assert {
    condition     = alltrue([for rule in aws_vpc_security_group_ingress_rule.client : rule.from_port == 443 && rule.to_port == 443])
    error_message = "A client reaches more than HTTPS."
  }
}

run "refuses_everyone" {
  command = plan

  variables {
    client_cidrs = ["0.0.0.0/0"]
  }

  expect_failures = [var.client_cidrs]
}

run "refuses_one_zone" {
  command = plan

  variables {
    availability_zones = ["eu-central-1a"]
  }

  expect_failures = [var.availability_zones]
}

run "refuses_a_small_range" {
  command = plan

  variables {
    cidr = "10.60.0.0/24"
  }

  expect_failures = [var.cidr]
}
