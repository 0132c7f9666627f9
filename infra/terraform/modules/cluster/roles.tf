# What the head and the workers may do. Nothing here names `*` where AWS lets it name a resource.

data "aws_iam_policy_document" "assume" {
  statement {
    actions = ["sts:AssumeRole"]

    principals {
      type        = "Service"
      identifiers = ["ec2.amazonaws.com"]
    }
  }
}

data "aws_iam_policy_document" "worker" {
  #checkov:skip=CKV_AWS_356: ecr:GetAuthorizationToken takes no resource but `*`
  statement {
    sid       = "Tables"
    actions   = ["s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"]
    resources = ["${var.tables_bucket_arn}/*"]
  }

  statement {
    sid       = "ListTables"
    actions   = ["s3:ListBucket", "s3:GetBucketLocation"]
    resources = [var.tables_bucket_arn]
  }

  statement {
    sid       = "TokenAndAuthority"
    actions   = ["secretsmanager:GetSecretValue"]
    resources = [aws_secretsmanager_secret.token.arn, aws_secretsmanager_secret.ca.arn]
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

data "aws_iam_policy_document" "head" {
  #checkov:skip=CKV_AWS_356: Describing groups and instances takes no resource but `*`; it reads only
  source_policy_documents = [data.aws_iam_policy_document.worker.json]

  statement {
    sid       = "MakeAuthority"
    actions   = ["secretsmanager:PutSecretValue"]
    resources = [aws_secretsmanager_secret.ca.arn]
  }

  statement {
    sid       = "QueuePassword"
    actions   = ["secretsmanager:GetSecretValue"]
    resources = [var.queue_secret_arn]
  }

  statement {
    sid     = "Workers"
    actions = ["autoscaling:CompleteLifecycleAction", "autoscaling:SetDesiredCapacity", "autoscaling:TerminateInstanceInAutoScalingGroup"]
    resources = [
      for name in keys(var.pools) :
      "arn:${local.partition}:autoscaling:${local.region}:${local.account_id}:autoScalingGroup:*:autoScalingGroupName/liftyard-${var.name}-${name}"
    ]
  }

  statement {
    sid       = "FindWorkers"
    actions   = ["autoscaling:DescribeAutoScalingGroups", "ec2:DescribeInstances"]
    resources = ["*"]
  }

  statement {
    sid       = "Pools"
    actions   = ["ssm:GetParameter"]
    resources = [aws_ssm_parameter.fleet.arn]
  }

  statement {
    sid       = "Drain"
    actions   = ["sqs:ReceiveMessage", "sqs:DeleteMessage"]
    resources = [aws_sqs_queue.drain.arn]
  }

  statement {
    sid       = "KeyOfTheQueue"
    actions   = ["kms:Decrypt"]
    resources = [var.kms_key_arn]

    condition {
      test     = "StringEquals"
      variable = "kms:ViaService"
      values   = ["sqs.${local.region}.amazonaws.com"]
    }
  }
}

locals {
  roles = {
    head   = data.aws_iam_policy_document.head.json
    worker = data.aws_iam_policy_document.worker.json
  }
}

resource "aws_iam_role" "node" {
  for_each = toset(["head", "worker"])

  name               = "liftyard-${var.name}-${each.key}"
  assume_role_policy = data.aws_iam_policy_document.assume.json
  tags               = var.tags
}

resource "aws_iam_role_policy" "node" {
  for_each = toset(["head", "worker"])

  name   = each.key
  role   = aws_iam_role.node[each.key].id
  policy = local.roles[each.key]
}

# Sessions in place of SSH: no key pair, no open port, every session in the trail.
resource "aws_iam_role_policy_attachment" "sessions" {
  for_each = toset(["head", "worker"])

  role       = aws_iam_role.node[each.key].name
  policy_arn = "arn:${local.partition}:iam::aws:policy/AmazonSSMManagedInstanceCore"
}

resource "aws_iam_instance_profile" "node" {
  for_each = toset(["head", "worker"])

  name = "liftyard-${var.name}-${each.key}"
  role = aws_iam_role.node[each.key].name
  tags = var.tags
}

# Autoscaling starts machines whose disks are under the environment's key: its role needs the key.
resource "aws_iam_service_linked_role" "autoscaling" {
  aws_service_name = "autoscaling.amazonaws.com"
  custom_suffix    = "liftyard-${var.name}"
  description      = "Starts and ends the workers of Liftyard ${var.name}"
  tags             = var.tags
}

resource "aws_kms_grant" "autoscaling" {
  name              = "liftyard-${var.name}-autoscaling"
  key_id            = var.kms_key_arn
  grantee_principal = aws_iam_service_linked_role.autoscaling.arn
  operations = [
    "CreateGrant", "Decrypt", "DescribeKey", "Encrypt", "GenerateDataKey",
    "GenerateDataKeyWithoutPlaintext", "ReEncryptFrom", "ReEncryptTo",
  ]
}
