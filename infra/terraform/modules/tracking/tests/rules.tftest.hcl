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
  name                 = "prod"
  subnet_ids           = ["subnet-1", "subnet-2"]
  security_group_ids   = { tracking = "sg-1", database = "sg-2" }
  zone_id              = "Z1"
  zone_name            = "prod.liftyard.internal"
  kms_key_arn          = "arn:aws:kms:eu-central-1:123456789012:key/0"
  image                = "123456789012.dkr.ecr.eu-central-1.amazonaws.com/liftyard-prod:1a2b3c4-cpu"
  repository_arn       = "arn:aws:ecr:eu-central-1:123456789012:repository/liftyard-prod"
  artifacts_root       = "s3://artifacts"
  artifacts_bucket_arn = "arn:aws:s3:::artifacts"
  ami_id               = "ami-1"
  queue_password       = "0123456789abcdef0123456789abcdef"
}

run "the_database_is_kept" {
  command = plan

  assert {
    condition     = aws_db_instance.this.deletion_protection && !aws_db_instance.this.skip_final_snapshot && !aws_db_instance.this.delete_automated_backups
    error_message = "The model registry could be lost by a destroy."
  }

  assert {
    condition     = aws_db_instance.this.backup_retention_period >= 7 && aws_db_instance.this.multi_az
    error_message = "The database has no backups, or no second zone."
  }
}

run "the_database_is_closed" {
  command = plan

  assert {
    condition     = aws_db_instance.this.storage_encrypted && !aws_db_instance.this.publicly_accessible && aws_db_instance.this.manage_master_user_password
    error_message = "The database is open, not encrypted, or has a password in the state."
  }

  assert {
    condition     = contains([for parameter in aws_db_parameter_group.this.parameter : "${parameter.name}=${parameter.value}"], "rds.force_ssl=1")
    error_message = "The database takes connections without TLS."
  }
}

run "the_server_takes_sessions_of_imdsv2_only" {
  command = plan

  assert {
    condition     = aws_instance.this.metadata_options[0].http_tokens == "required" && aws_instance.this.root_block_device[0].encrypted
    error_message = "IMDSv2 isn't required, or the disk isn't encrypted."
  }
}

run "a_trial_may_be_destroyed" {
  command = plan

  variables {
    protected = false
  }

  assert {
    condition     = !aws_db_instance.this.deletion_protection && aws_db_instance.this.skip_final_snapshot
    error_message = "A trial couldn't be taken down."
  }
}

run "refuses_to_be_without_backups" {
  command = plan

  variables {
    database = { backup_days = 0 }
  }

  expect_failures = [var.database]
}

run "refuses_an_image_that_moves" {
  command = plan

  variables {
    image = "123456789012.dkr.ecr.eu-central-1.amazonaws.com/liftyard-prod:latest"
  }

  expect_failures = [var.image]
}

run "refuses_a_queue_password_that_is_short" {
  command = plan

  variables {
    queue_password = "0123"
  }

  expect_failures = [var.queue_password]
}
