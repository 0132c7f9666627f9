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
  mock_data "aws_subnet" {
    defaults = { availability_zone = "eu-central-1a" }
  }
  mock_data "aws_ec2_instance_type" {
    defaults = { default_vcpus = 16 }
  }
  mock_resource "aws_secretsmanager_secret" {
    defaults = { arn = "arn:aws:secretsmanager:eu-central-1:123456789012:secret:mock" }
  }
}

variables {
  name               = "prod"
  queue_url          = "postgresql://queue@db:5432/queue"
  queue_secret_arn   = "arn:aws:secretsmanager:eu-central-1:123456789012:secret:queue"
  token              = "0123456789abcdef0123456789abcdef"
  subnet_ids         = ["subnet-1", "subnet-2"]
  security_group_ids = { nodes = "sg-1" }
  zone_id            = "Z1"
  zone_name          = "prod.liftyard.internal"
  kms_key_arn        = "arn:aws:kms:eu-central-1:123456789012:key/0"
  image              = "123456789012.dkr.ecr.eu-central-1.amazonaws.com/liftyard-prod:1a2b3c4-cpu"
  gpu_image          = "123456789012.dkr.ecr.eu-central-1.amazonaws.com/liftyard-prod:1a2b3c4-cuda"
  repository_arn     = "arn:aws:ecr:eu-central-1:123456789012:repository/liftyard-prod"
  storage_root       = "s3://tables"
  tables_bucket_arn  = "arn:aws:s3:::tables"
  tracking_uri       = "http://tracking.prod.liftyard.internal:5000"
  cpu_ami_id         = "ami-1"
  gpu_ami_id         = "ami-2"
}

run "every_machine_is_closed" {
  command = plan

  assert {
    condition = alltrue([
      for options in concat([for template in aws_launch_template.pool : template.metadata_options[0]], [aws_instance.head.metadata_options[0]]) :
      options.http_tokens == "required" && options.http_put_response_hop_limit == 1
    ])
    error_message = "A machine takes requests for its credentials without a token."
  }

  assert {
    condition = alltrue([
      for template in aws_launch_template.pool :
      template.block_device_mappings[0].ebs[0].encrypted == "true" && template.network_interfaces[0].associate_public_ip_address == "false"
    ])
    error_message = "A worker's disk isn't encrypted, or it has a public address."
  }

  assert {
    condition     = aws_instance.head.root_block_device[0].encrypted && aws_ebs_volume.head.encrypted
    error_message = "A disk of the head isn't encrypted."
  }
}

run "the_head_is_kept" {
  command = plan

  assert {
    condition     = aws_instance.head.disable_api_termination && aws_ebs_volume.head.final_snapshot
    error_message = "The head and its queue could be lost by one call."
  }
}

run "pools_start_from_nothing" {
  command = plan

  assert {
    condition     = alltrue([for group in aws_autoscaling_group.pool : group.min_size == 0])
    error_message = "A pool costs money while nothing runs."
  }

  assert {
    condition     = alltrue([for group in aws_autoscaling_group.pool : contains(group.suspended_processes, "AZRebalance")])
    error_message = "Evening out the zones would end machines at work."
  }
}

run "gpu_pools_take_the_gpu_image" {
  command = plan

  assert {
    condition     = aws_launch_template.pool["gpu"].image_id == "ami-2" && aws_launch_template.pool["cpu"].image_id == "ami-1"
    error_message = "A GPU worker has no driver, or a CPU worker has one."
  }
}

run "a_warm_pool_is_on_demand" {
  command = plan

  assert {
    condition     = length(aws_autoscaling_group.pool["gpu-ready"].mixed_instances_policy) == 0 && length(aws_autoscaling_group.pool["gpu-ready"].warm_pool) == 1
    error_message = "EC2 keeps no mixed machines ready."
  }

  assert {
    condition     = length(aws_autoscaling_group.pool["gpu"].mixed_instances_policy) == 1 && aws_autoscaling_group.pool["gpu"].capacity_rebalance
    error_message = "The GPU pool isn't a mix of spot and on-demand."
  }
}

run "workers_are_drained_before_they_go" {
  command = plan

  assert {
    condition     = alltrue([for hook in aws_autoscaling_lifecycle_hook.drain : hook.lifecycle_transition == "autoscaling:EC2_INSTANCE_TERMINATING" && hook.heartbeat_timeout == 660])
    error_message = "A worker would go in the middle of its work."
  }
}

run "refuses_warm_spot_machines" {
  command = plan

  variables {
    pools = { fast = { instance_types = ["m7i.large"], max = 2, warm = 1 } }
  }

  expect_failures = [var.pools]
}

run "refuses_spot_of_one_type" {
  command = plan

  variables {
    pools = { cheap = { gpu = true, instance_types = ["g6.xlarge"], max = 2 } }
  }

  expect_failures = [var.pools]
}

run "refuses_a_gpu_pool_without_gpus" {
  command = plan

  variables {
    pools = { wrong = { gpu = true, instance_types = ["m7i.large"], max = 2, on_demand_percent = 100 } }
  }

  expect_failures = [var.pools]
}

run "refuses_more_than_the_most" {
  command = plan

  variables {
    pools = { wrong = { instance_types = ["m7i.large"], min = 3, max = 2, on_demand_percent = 100 } }
  }

  expect_failures = [var.pools]
}

run "refuses_two_services_on_one_port" {
  command = plan

  variables {
    ports = { ray = 8000 }
  }

  expect_failures = [var.ports]
}

run "refuses_a_password_in_the_queues_address" {
  command = plan

  variables {
    queue_url = "postgresql://queue:secret@db:5432/queue"
  }

  expect_failures = [var.queue_url]
}
