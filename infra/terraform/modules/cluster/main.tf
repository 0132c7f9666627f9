# The head: one machine with a name that stays, and a disk of its own that outlives it.

data "aws_caller_identity" "current" {}

data "aws_partition" "current" {}

data "aws_region" "current" {}

data "aws_ec2_instance_type" "worker" {
  for_each = toset(flatten([for pool in values(var.pools) : pool.instance_types]))

  instance_type = each.key
}

locals {
  account_id = data.aws_caller_identity.current.account_id
  partition  = data.aws_partition.current.partition
  region     = data.aws_region.current.name
  head_host  = "head.${var.zone_name}"

  # What the first boot of every node needs to know.
  boot = {
    ca_secret_arn    = aws_secretsmanager_secret.ca.arn
    drain_queue_url  = aws_sqs_queue.drain.url
    fleet_parameter  = "/liftyard/${var.name}/fleet"
    head_host        = local.head_host
    log_group        = aws_cloudwatch_log_group.this.name
    name             = var.name
    ports            = var.ports
    queue_secret_arn = var.queue_secret_arn
    queue_url        = var.queue_url
    region           = local.region
    storage_root     = var.storage_root
    token_secret_arn = aws_secretsmanager_secret.token.arn
    tracking_uri     = var.tracking_uri
  }
}

# What the fleet's keeper starts machines from. It reads this at each turn, so that another size of a
# pool changes nothing about the head's machine.
resource "aws_ssm_parameter" "fleet" {
  #checkov:skip=CKV2_AWS_34: Names and sizes of groups are no secret
  #checkov:skip=CKV_AWS_337: Names and sizes of groups are no secret
  name        = local.boot.fleet_parameter
  description = "Pools of workers, and how long they are drained and may idle"
  type        = "String"
  tags        = var.tags

  value = jsonencode({
    drain_s = var.drain_s
    idle_s  = var.idle_s

    # The group, what its smallest machine offers, how many at most, how many kept ready.
    pools = {
      for name, pool in var.pools : name => {
        group = "liftyard-${var.name}-${name}"
        cpus  = min([for type in pool.instance_types : data.aws_ec2_instance_type.worker[type].default_vcpus]...)
        gpus  = pool.gpu ? min([for type in pool.instance_types : sum(concat([0], tolist(data.aws_ec2_instance_type.worker[type].gpus)[*].count))]...) : 0
        max   = pool.max
        warm  = pool.warm
      }
    }
  })
}

resource "aws_cloudwatch_log_group" "this" {
  name              = "/liftyard/${var.name}/nodes"
  retention_in_days = var.log_days
  kms_key_id        = var.kms_key_arn
  tags              = var.tags
}

resource "aws_ebs_volume" "head" {
  #checkov:skip=CKV2_AWS_9: Tables, models and runs are in the bucket and the database; the disk holds the queue, and leaves a snapshot when it's destroyed
  availability_zone = data.aws_subnet.head.availability_zone
  size              = var.head.disk_gib
  type              = "gp3"
  encrypted         = true
  kms_key_id        = var.kms_key_arn
  final_snapshot    = var.protected
  tags              = merge(var.tags, { Name = "liftyard-${var.name}-head" })
}

data "aws_subnet" "head" {
  id = var.subnet_ids[0]
}

resource "aws_instance" "head" {
  ami                     = var.cpu_ami_id
  instance_type           = var.head.instance_type
  subnet_id               = var.subnet_ids[0]
  vpc_security_group_ids  = [var.security_group_ids["nodes"]]
  iam_instance_profile    = aws_iam_instance_profile.node["head"].name
  disable_api_termination = var.protected
  ebs_optimized           = true
  monitoring              = true
  tags                    = merge(var.tags, { Name = "liftyard-${var.name}-head" })

  user_data_replace_on_change = true
  user_data = templatefile("${path.module}/templates/node.sh.tftpl", merge(local.boot, {
    gpu       = false
    image     = var.image
    pool      = "head"
    role      = "head"
    volume_id = aws_ebs_volume.head.id
  }))

  metadata_options {
    http_endpoint = "enabled"
    http_tokens   = "required"
    # The container shares the host's network, so that one hop is enough.
    http_put_response_hop_limit = 1
  }

  root_block_device {
    volume_type = "gp3"
    volume_size = 100
    encrypted   = true
    kms_key_id  = var.kms_key_arn
    tags        = var.tags
  }

  lifecycle {
    # A newer image of the system mustn't end the head in an apply about something else; take it by
    # `terraform apply -replace=module.cluster.aws_instance.head`.
    ignore_changes = [ami]
  }

  depends_on = [aws_iam_role_policy.node, aws_iam_role_policy_attachment.sessions]
}

resource "aws_volume_attachment" "head" {
  device_name                    = "/dev/sdf"
  instance_id                    = aws_instance.head.id
  volume_id                      = aws_ebs_volume.head.id
  stop_instance_before_detaching = true
}

resource "aws_route53_record" "head" {
  zone_id = var.zone_id
  name    = local.head_host
  type    = "A"
  ttl     = 30
  records = [aws_instance.head.private_ip]
}

resource "aws_lb_target_group_attachment" "head" {
  count = length(var.serve_target_group_arns)

  target_group_arn = var.serve_target_group_arns[count.index]
  target_id        = aws_instance.head.id
}

resource "aws_cloudwatch_metric_alarm" "head_down" {
  alarm_name          = "liftyard-${var.name}-head-down"
  alarm_description   = "The head's machine fails its checks. EC2 moves it to other hardware by itself; if this stays, replace it (its disk goes along): terraform apply -replace=module.cluster.aws_instance.head"
  namespace           = "AWS/EC2"
  metric_name         = "StatusCheckFailed"
  dimensions          = { InstanceId = aws_instance.head.id }
  statistic           = "Maximum"
  period              = 60
  evaluation_periods  = 3
  comparison_operator = "GreaterThanThreshold"
  threshold           = 0
  treat_missing_data  = "breaching"
  alarm_actions       = var.alarm_topic_arns
  ok_actions          = var.alarm_topic_arns
  tags                = var.tags
}

# --- secrets ---

# Whoever holds the token runs code on the cluster. It is written and forgotten: it's neither in the
# plan nor in the state. A new one is taken by replacing the secret and then the nodes.
resource "aws_secretsmanager_secret" "token" {
  #checkov:skip=CKV2_AWS_57: Ray reads its token once, at start: changing it is a restart of the cluster, for a quiet hour
  name                    = "liftyard/${var.name}/ray-token"
  description             = "Ray's token: whoever holds it runs code on the cluster"
  kms_key_id              = var.kms_key_arn
  recovery_window_in_days = var.protected ? 30 : 0
  tags                    = var.tags
}

resource "aws_secretsmanager_secret_version" "token" {
  secret_id                = aws_secretsmanager_secret.token.id
  secret_string_wo         = var.token
  secret_string_wo_version = 1
}

# The head fills this at its first boot, and each node issues itself a certificate from it.
resource "aws_secretsmanager_secret" "ca" {
  #checkov:skip=CKV2_AWS_57: A new authority is a restart of the cluster: delete the secret's value, then replace the nodes
  name                    = "liftyard/${var.name}/certificate-authority"
  description             = "The cluster's own certificate authority, for TLS between nodes"
  kms_key_id              = var.kms_key_arn
  recovery_window_in_days = var.protected ? 30 : 0
  tags                    = var.tags
}
