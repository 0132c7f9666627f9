# PostgreSQL: a database for MLflow (runs, metrics and the model registry), and one for the queue, with
# a user of its own, that `infra/image/queue_database.py` makes on the MLflow machine.

resource "aws_db_subnet_group" "this" {
  name       = "liftyard-${var.name}"
  subnet_ids = var.subnet_ids
  tags       = var.tags
}

resource "aws_db_parameter_group" "this" {
  name   = "liftyard-${var.name}-17"
  family = "postgres17"
  tags   = var.tags

  parameter {
    name  = "rds.force_ssl"
    value = "1"
  }

  # Slower than a second is worth knowing of; the text of every statement isn't.
  parameter {
    name  = "log_min_duration_statement"
    value = "1000"
  }

  parameter {
    name  = "log_statement"
    value = "ddl"
  }

  lifecycle {
    create_before_destroy = true
  }
}

# The database writes to groups of this name; made here, they are encrypted and expire.
resource "aws_cloudwatch_log_group" "database" {
  for_each = toset(["postgresql", "upgrade"])

  name              = "/aws/rds/instance/liftyard-${var.name}/${each.key}"
  retention_in_days = var.log_days
  kms_key_id        = var.kms_key_arn
  tags              = var.tags
}

data "aws_iam_policy_document" "monitoring_assume" {
  statement {
    actions = ["sts:AssumeRole"]

    principals {
      type        = "Service"
      identifiers = ["monitoring.rds.amazonaws.com"]
    }
  }
}

resource "aws_iam_role" "monitoring" {
  name               = "liftyard-${var.name}-database-monitoring"
  assume_role_policy = data.aws_iam_policy_document.monitoring_assume.json
  tags               = var.tags
}

resource "aws_iam_role_policy_attachment" "monitoring" {
  role       = aws_iam_role.monitoring.name
  policy_arn = "arn:${local.partition}:iam::aws:policy/service-role/AmazonRDSEnhancedMonitoringRole"
}

resource "aws_db_instance" "this" {
  #checkov:skip=CKV_AWS_133: Backups are kept for database.backup_days, 7 to 35; the scanner doesn't follow a default inside an object
  #checkov:skip=CKV_AWS_157: A second zone is on by default (database.multi_az); a trial environment may do without
  #checkov:skip=CKV_AWS_293: Refusing deletion is on by default (protected); a trial environment may do without
  identifier     = "liftyard-${var.name}"
  engine         = "postgres"
  engine_version = "17"
  instance_class = var.database.instance_class
  db_name        = "mlflow"
  username       = "mlflow"
  port           = 5432

  # RDS makes the password, keeps it as a secret and changes it every week.
  manage_master_user_password         = true
  master_user_secret_kms_key_id       = var.kms_key_arn
  iam_database_authentication_enabled = true

  storage_type          = "gp3"
  allocated_storage     = var.database.allocated_gib
  max_allocated_storage = var.database.max_allocated_gib
  storage_encrypted     = true
  kms_key_id            = var.kms_key_arn

  multi_az               = var.database.multi_az
  publicly_accessible    = false
  db_subnet_group_name   = aws_db_subnet_group.this.name
  vpc_security_group_ids = [var.security_group_ids["database"]]
  parameter_group_name   = aws_db_parameter_group.this.name

  backup_retention_period   = var.database.backup_days
  backup_window             = "02:00-03:00"
  maintenance_window        = "sun:03:30-sun:04:30"
  copy_tags_to_snapshot     = true
  delete_automated_backups  = !var.protected
  deletion_protection       = var.protected
  skip_final_snapshot       = !var.protected
  final_snapshot_identifier = "liftyard-${var.name}-last"

  auto_minor_version_upgrade      = true
  monitoring_interval             = 60
  monitoring_role_arn             = aws_iam_role.monitoring.arn
  performance_insights_enabled    = true
  performance_insights_kms_key_id = var.kms_key_arn
  enabled_cloudwatch_logs_exports = ["postgresql", "upgrade"]

  tags = var.tags

  depends_on = [aws_cloudwatch_log_group.database, aws_iam_role_policy_attachment.monitoring]
}

resource "aws_cloudwatch_metric_alarm" "database_disk" {
  alarm_name          = "liftyard-${var.name}-database-disk"
  alarm_description   = "Less than 5 GiB of the database's disk is free. Raise database.max_allocated_gib, or delete old runs (mlflow gc)."
  namespace           = "AWS/RDS"
  metric_name         = "FreeStorageSpace"
  dimensions          = { DBInstanceIdentifier = aws_db_instance.this.identifier }
  statistic           = "Minimum"
  period              = 300
  evaluation_periods  = 3
  comparison_operator = "LessThanThreshold"
  threshold           = 5 * 1024 * 1024 * 1024
  alarm_actions       = var.alarm_topic_arns
  ok_actions          = var.alarm_topic_arns
  tags                = var.tags
}

resource "aws_cloudwatch_metric_alarm" "database_cpu" {
  alarm_name          = "liftyard-${var.name}-database-cpu"
  alarm_description   = "The database has been above 85 % of its CPU for 15 minutes. Look for slow statements in its log, or take a larger database.instance_class."
  namespace           = "AWS/RDS"
  metric_name         = "CPUUtilization"
  dimensions          = { DBInstanceIdentifier = aws_db_instance.this.identifier }
  statistic           = "Average"
  period              = 300
  evaluation_periods  = 3
  comparison_operator = "GreaterThanThreshold"
  threshold           = 85
  alarm_actions       = var.alarm_topic_arns
  ok_actions          = var.alarm_topic_arns
  tags                = var.tags
}

# The queue's user reaches the queue and nothing else. Written and forgotten, as Ray's token is.
resource "aws_secretsmanager_secret" "queue" {
  #checkov:skip=CKV2_AWS_57: A new password is taken as the MLflow server and then the head start: replace the secret in a quiet hour
  name                    = "liftyard/${var.name}/queue-password"
  description             = "Password of the queue's user in PostgreSQL: whoever holds it runs code on the cluster"
  kms_key_id              = var.kms_key_arn
  recovery_window_in_days = var.protected ? 30 : 0
  tags                    = var.tags
}

resource "aws_secretsmanager_secret_version" "queue" {
  secret_id                = aws_secretsmanager_secret.queue.id
  secret_string_wo         = var.queue_password
  secret_string_wo_version = 1
}
