# The MLflow server: one machine with a name that stays. It keeps nothing: runs are in the database
# and artifacts in the bucket, so that a new machine goes on where the old one ended.

data "aws_partition" "current" {}

data "aws_region" "current" {}

locals {
  partition = data.aws_partition.current.partition
  region    = data.aws_region.current.name
  host      = "tracking.${var.zone_name}"
}

resource "aws_cloudwatch_log_group" "this" {
  name              = "/liftyard/${var.name}/tracking"
  retention_in_days = var.log_days
  kms_key_id        = var.kms_key_arn
  tags              = var.tags
}

data "aws_iam_policy_document" "assume" {
  statement {
    actions = ["sts:AssumeRole"]

    principals {
      type        = "Service"
      identifiers = ["ec2.amazonaws.com"]
    }
  }
}

data "aws_iam_policy_document" "this" {
  #checkov:skip=CKV_AWS_356: ecr:GetAuthorizationToken takes no resource but `*`
  statement {
    sid       = "Artifacts"
    actions   = ["s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"]
    resources = ["${var.artifacts_bucket_arn}/*"]
  }

  statement {
    sid       = "ListArtifacts"
    actions   = ["s3:ListBucket", "s3:GetBucketLocation"]
    resources = [var.artifacts_bucket_arn]
  }

  statement {
    sid       = "DatabasePasswords"
    actions   = ["secretsmanager:GetSecretValue"]
    resources = [local.secret_arn, aws_secretsmanager_secret.queue.arn]
  }

  statement {
    sid       = "KeyByWayOfThese"
    actions   = ["kms:Decrypt", "kms:GenerateDataKey"]
    resources = [var.kms_key_arn]

    condition {
      test     = "StringEquals"
      variable = "kms:ViaService"
      values   = ["s3.${local.region}.amazonaws.com", "secretsmanager.${local.region}.amazonaws.com"]
    }
  }

  statement {
    sid       = "ImageLogin"
    actions   = ["ecr:GetAuthorizationToken"]
    resources = ["*"]
  }

  statement {
    sid       = "Image"
    actions   = ["ecr:BatchCheckLayerAvailability", "ecr:BatchGetImage", "ecr:GetDownloadUrlForLayer"]
    resources = [var.repository_arn]
  }

  statement {
    sid       = "Logs"
    actions   = ["logs:CreateLogStream", "logs:PutLogEvents"]
    resources = ["${aws_cloudwatch_log_group.this.arn}:*"]
  }
}

resource "aws_iam_role" "this" {
  name               = "liftyard-${var.name}-tracking"
  assume_role_policy = data.aws_iam_policy_document.assume.json
  tags               = var.tags
}

resource "aws_iam_role_policy" "this" {
  name   = "tracking"
  role   = aws_iam_role.this.id
  policy = data.aws_iam_policy_document.this.json
}

# Sessions in place of SSH: no key pair, no open port, every session in the trail.
resource "aws_iam_role_policy_attachment" "sessions" {
  role       = aws_iam_role.this.name
  policy_arn = "arn:${local.partition}:iam::aws:policy/AmazonSSMManagedInstanceCore"
}

resource "aws_iam_instance_profile" "this" {
  name = "liftyard-${var.name}-tracking"
  role = aws_iam_role.this.name
  tags = var.tags
}

locals {
  secret_arn = aws_db_instance.this.master_user_secret[0].secret_arn
}

resource "aws_instance" "this" {
  ami                    = var.ami_id
  instance_type          = var.instance_type
  subnet_id              = var.subnet_ids[0]
  vpc_security_group_ids = [var.security_group_ids["tracking"]]
  iam_instance_profile   = aws_iam_instance_profile.this.name
  ebs_optimized          = true
  monitoring             = true
  tags                   = merge(var.tags, { Name = "liftyard-${var.name}-tracking" })

  user_data_replace_on_change = true
  user_data = templatefile("${path.module}/templates/tracking.sh.tftpl", {
    artifacts_root   = var.artifacts_root
    database_host    = aws_db_instance.this.address
    host             = local.host
    image            = var.image
    log_group        = aws_cloudwatch_log_group.this.name
    port             = var.port
    queue_secret_arn = aws_secretsmanager_secret.queue.arn
    region           = local.region
    secret_arn       = local.secret_arn
  })

  metadata_options {
    http_endpoint = "enabled"
    http_tokens   = "required"
    # The container shares the host's network, so that one hop is enough.
    http_put_response_hop_limit = 1
  }

  root_block_device {
    volume_type = "gp3"
    volume_size = 50
    encrypted   = true
    kms_key_id  = var.kms_key_arn
    tags        = var.tags
  }

  lifecycle {
    # A newer image of the system mustn't end the server in an apply about something else; take it
    # by `terraform apply -replace=module.tracking.aws_instance.this`.
    ignore_changes = [ami]
  }

  depends_on = [aws_iam_role_policy.this, aws_iam_role_policy_attachment.sessions]
}

resource "aws_route53_record" "this" {
  zone_id = var.zone_id
  name    = local.host
  type    = "A"
  ttl     = 30
  records = [aws_instance.this.private_ip]
}

resource "aws_cloudwatch_metric_alarm" "down" {
  alarm_name          = "liftyard-${var.name}-tracking-down"
  alarm_description   = "The MLflow server's machine fails its checks. EC2 moves it to other hardware by itself; if this stays, replace it: terraform apply -replace=module.tracking.aws_instance.this"
  namespace           = "AWS/EC2"
  metric_name         = "StatusCheckFailed"
  dimensions          = { InstanceId = aws_instance.this.id }
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
