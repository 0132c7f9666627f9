# Workers: an autoscaling group a pool. The head sets how many there are, since only it knows what
# work waits and which machine is idle; the groups replace what breaks.

resource "aws_launch_template" "pool" {
  for_each = var.pools

  name                   = "liftyard-${var.name}-${each.key}"
  description            = "Worker of pool ${each.key}"
  image_id               = each.value.gpu ? var.gpu_ami_id : var.cpu_ami_id
  instance_type          = each.value.instance_types[0]
  update_default_version = true
  ebs_optimized          = true
  tags                   = var.tags

  user_data = base64encode(templatefile("${path.module}/templates/node.sh.tftpl", merge(local.boot, {
    gpu       = each.value.gpu
    image     = each.value.gpu ? var.gpu_image : var.image
    pool      = each.key
    role      = "worker"
    volume_id = ""
  })))

  iam_instance_profile {
    arn = aws_iam_instance_profile.node["worker"].arn
  }

  network_interfaces {
    associate_public_ip_address = false
    delete_on_termination       = true
    security_groups             = [var.security_group_ids["nodes"]]
  }

  metadata_options {
    http_endpoint = "enabled"
    http_tokens   = "required"
    # The container shares the host's network, so that one hop is enough.
    http_put_response_hop_limit = 1
  }

  monitoring {
    enabled = true
  }

  block_device_mappings {
    device_name = "/dev/xvda"

    ebs {
      volume_type           = "gp3"
      volume_size           = each.value.disk_gib
      encrypted             = true
      kms_key_id            = var.kms_key_arn
      delete_on_termination = true
    }
  }

  dynamic "tag_specifications" {
    for_each = toset(["instance", "volume", "network-interface"])

    content {
      resource_type = tag_specifications.value
      tags          = merge(var.tags, { Name = "liftyard-${var.name}-${each.key}" })
    }
  }
}

resource "aws_autoscaling_group" "pool" {
  for_each = var.pools

  name                    = "liftyard-${var.name}-${each.key}"
  min_size                = each.value.min
  max_size                = each.value.max
  vpc_zone_identifier     = var.subnet_ids
  target_group_arns       = var.serve_target_group_arns
  service_linked_role_arn = aws_iam_service_linked_role.autoscaling.arn

  # A worker without a replica of the model answers the balancer with «unhealthy» and still works.
  health_check_type         = "EC2"
  health_check_grace_period = 300
  wait_for_capacity_timeout = "0"
  termination_policies      = ["OldestLaunchTemplate", "Default"]

  # Evening out the zones would end machines in the middle of their work.
  suspended_processes = ["AZRebalance"]

  # A spot machine likely to be taken is replaced before it is.
  capacity_rebalance = each.value.on_demand_percent < 100

  metrics_granularity = "1Minute"
  enabled_metrics     = ["GroupDesiredCapacity", "GroupInServiceInstances"]

  dynamic "launch_template" {
    for_each = each.value.warm > 0 ? [1] : []

    content {
      id      = aws_launch_template.pool[each.key].id
      version = aws_launch_template.pool[each.key].latest_version
    }
  }

  dynamic "mixed_instances_policy" {
    for_each = each.value.warm > 0 ? [] : [1]

    content {
      instances_distribution {
        on_demand_base_capacity                  = each.value.on_demand_base
        on_demand_percentage_above_base_capacity = each.value.on_demand_percent
        on_demand_allocation_strategy            = "lowest-price"
        spot_allocation_strategy                 = "price-capacity-optimized"
      }

      launch_template {
        launch_template_specification {
          launch_template_id = aws_launch_template.pool[each.key].id
          version            = aws_launch_template.pool[each.key].latest_version
        }

        dynamic "override" {
          for_each = each.value.instance_types

          content {
            instance_type = override.value
          }
        }
      }
    }
  }

  dynamic "warm_pool" {
    for_each = each.value.warm > 0 ? [each.value.warm] : []

    content {
      pool_state                  = "Stopped"
      min_size                    = warm_pool.value
      max_group_prepared_capacity = warm_pool.value

      instance_reuse_policy {
        reuse_on_scale_in = true
      }
    }
  }

  dynamic "tag" {
    for_each = var.tags

    content {
      key                 = tag.key
      value               = tag.value
      propagate_at_launch = false
    }
  }

  depends_on = [aws_kms_grant.autoscaling, aws_iam_role_policy.node, aws_iam_role_policy_attachment.sessions]
}

resource "aws_cloudwatch_metric_alarm" "full" {
  for_each = var.pools

  alarm_name          = "liftyard-${var.name}-${each.key}-full"
  alarm_description   = "Pool ${each.key} has been at its ${each.value.max} machines for two hours: work is waiting. Raise its max, or find what holds them (liftyard status)."
  namespace           = "AWS/AutoScaling"
  metric_name         = "GroupDesiredCapacity"
  dimensions          = { AutoScalingGroupName = aws_autoscaling_group.pool[each.key].name }
  statistic           = "Minimum"
  period              = 3600
  evaluation_periods  = 2
  comparison_operator = "GreaterThanOrEqualToThreshold"
  threshold           = each.value.max
  alarm_actions       = var.alarm_topic_arns
  ok_actions          = var.alarm_topic_arns
  tags                = var.tags
}
