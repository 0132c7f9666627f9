# One key per environment: whoever may not use it reads none of the environment's data, disks,
# logs or secrets, and disabling it closes all of them at once.

data "aws_caller_identity" "current" {}

data "aws_partition" "current" {}

data "aws_region" "current" {}

locals {
  account_id = data.aws_caller_identity.current.account_id
  partition  = data.aws_partition.current.partition
  region     = data.aws_region.current.name
}

data "aws_iam_policy_document" "key" {
  #checkov:skip=CKV_AWS_109: A key policy speaks of its own key only, and without the account's administration the key could never be changed again
  #checkov:skip=CKV_AWS_111: As above: `*` in a key policy is this key
  #checkov:skip=CKV_AWS_356: As above: `*` in a key policy is this key
  statement {
    sid       = "AccountAdministers"
    actions   = ["kms:*"]
    resources = ["*"]

    principals {
      type        = "AWS"
      identifiers = ["arn:${local.partition}:iam::${local.account_id}:root"]
    }
  }

  statement {
    sid       = "LogGroupsOfThisEnvironment"
    actions   = ["kms:Decrypt", "kms:Encrypt", "kms:GenerateDataKey*", "kms:ReEncrypt*", "kms:DescribeKey"]
    resources = ["*"]

    principals {
      type        = "Service"
      identifiers = ["logs.${local.region}.amazonaws.com"]
    }

    condition {
      test     = "ArnLike"
      variable = "kms:EncryptionContext:aws:logs:arn"
      values = [
        "arn:${local.partition}:logs:${local.region}:${local.account_id}:log-group:/liftyard/${var.name}/*",
        "arn:${local.partition}:logs:${local.region}:${local.account_id}:log-group:aws-waf-logs-liftyard-${var.name}",
        "arn:${local.partition}:logs:${local.region}:${local.account_id}:log-group:/aws/rds/instance/liftyard-${var.name}/*",
      ]
    }
  }

  # These services send no source with their calls to a key on every path. Who may publish in their
  # name, and from which account, is held by the policies of the drain queue and the alarm topic.
  statement {
    sid       = "EventsAlarmsAndBudgets"
    actions   = ["kms:Decrypt", "kms:GenerateDataKey*"]
    resources = ["*"]

    principals {
      type        = "Service"
      identifiers = ["events.amazonaws.com", "cloudwatch.amazonaws.com", "budgets.amazonaws.com"]
    }
  }
}

resource "aws_kms_key" "this" {
  description             = "Liftyard ${var.name}: tables, artifacts, images, disks, database, secrets, logs"
  enable_key_rotation     = true
  deletion_window_in_days = var.protected ? 30 : 7
  policy                  = data.aws_iam_policy_document.key.json
  tags                    = var.tags
}

resource "aws_kms_alias" "this" {
  name          = "alias/liftyard-${var.name}"
  target_key_id = aws_kms_key.this.key_id
}
