# Liftyard on AWS: the modules, composed. Read from top to bottom, it is the order they are made in.

locals {
  tags  = merge(var.tags, { project = "liftyard", environment = var.name })
  image = "${module.storage.repository_url}:${var.image_tag}"
}

data "aws_ssm_parameter" "ami" {
  for_each = { cpu = var.cpu_ami_parameter, gpu = var.gpu_ami_parameter }

  name = each.value
}

module "storage" {
  source = "../../modules/storage"

  name      = var.name
  tags      = local.tags
  protected = var.protected
}

module "network" {
  source = "../../modules/network"

  name               = var.name
  tags               = local.tags
  cidr               = var.cidr
  availability_zones = var.availability_zones
  nat_per_zone       = var.nat_per_zone
  client_cidrs       = var.client_cidrs
  kms_key_arn        = module.storage.kms_key_arn
  log_days           = var.log_days
}

# Made at each run and used at the first: Terraform keeps them in neither plan nor state.
ephemeral "aws_secretsmanager_random_password" "this" {
  for_each = toset(["queue", "token"])

  password_length     = 64
  exclude_punctuation = true
}

module "tracking" {
  source = "../../modules/tracking"

  name                 = var.name
  tags                 = local.tags
  protected            = var.protected
  subnet_ids           = module.network.private_subnet_ids
  security_group_ids   = module.network.security_group_ids
  zone_id              = module.network.zone_id
  zone_name            = module.network.zone_name
  kms_key_arn          = module.storage.kms_key_arn
  port                 = module.network.ports.tracking
  artifacts_root       = module.storage.artifacts_root
  artifacts_bucket_arn = module.storage.bucket_arns["artifacts"]
  ami_id               = data.aws_ssm_parameter.ami["cpu"].insecure_value
  image                = "${local.image}-cpu"
  repository_arn       = module.storage.repository_arn
  database             = var.database
  queue_password       = ephemeral.aws_secretsmanager_random_password.this["queue"].random_password
  alarm_topic_arns     = [aws_sns_topic.alarms.arn]
  log_days             = var.log_days
}

module "serving" {
  source = "../../modules/serving"

  name                   = var.name
  tags                   = local.tags
  protected              = var.protected
  vpc_id                 = module.network.vpc_id
  internal               = var.internal
  subnet_ids             = var.internal ? module.network.private_subnet_ids : module.network.public_subnet_ids
  security_group_id      = module.network.security_group_ids["balancer"]
  port                   = module.network.ports.serve
  domain_name            = var.domain_name
  public_zone_id         = var.public_zone_id
  access_logs_bucket     = module.storage.access_logs_bucket
  kms_key_arn            = module.storage.kms_key_arn
  requests_per_5_minutes = var.requests_per_5_minutes
  alarm_topic_arns       = [aws_sns_topic.alarms.arn]
  log_days               = var.log_days
}

module "cluster" {
  source = "../../modules/cluster"

  name                    = var.name
  tags                    = local.tags
  protected               = var.protected
  subnet_ids              = module.network.private_subnet_ids
  security_group_ids      = module.network.security_group_ids
  zone_id                 = module.network.zone_id
  zone_name               = module.network.zone_name
  kms_key_arn             = module.storage.kms_key_arn
  ports                   = { serve = module.network.ports.serve }
  storage_root            = module.storage.storage_root
  tables_bucket_arn       = module.storage.bucket_arns["tables"]
  tracking_uri            = module.tracking.tracking_uri
  serve_target_group_arns = [module.serving.target_group_arn]
  cpu_ami_id              = data.aws_ssm_parameter.ami["cpu"].insecure_value
  queue_url               = module.tracking.queue_url
  queue_secret_arn        = module.tracking.queue_secret_arn
  token                   = ephemeral.aws_secretsmanager_random_password.this["token"].random_password
  gpu_ami_id              = data.aws_ssm_parameter.ami["gpu"].insecure_value
  image                   = "${local.image}-cpu"
  gpu_image               = "${local.image}-cuda"
  repository_arn          = module.storage.repository_arn
  head                    = var.head
  pools                   = var.pools
  alarm_topic_arns        = [aws_sns_topic.alarms.arn]
  log_days                = var.log_days
}
