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
  name = "prod"
}

run "protected_unless_said_otherwise" {
  command = plan

  assert {
    condition     = alltrue([for bucket in aws_s3_bucket.data : !bucket.force_destroy]) && !aws_s3_bucket.logs.force_destroy && !aws_ecr_repository.this.force_delete
    error_message = "A destroy would take data along."
  }

  assert {
    condition     = aws_kms_key.this.enable_key_rotation && aws_kms_key.this.deletion_window_in_days == 30
    error_message = "The key isn't rotated, or is gone too soon."
  }
}

run "a_trial_may_be_destroyed" {
  command = plan

  variables {
    protected = false
  }

  assert {
    condition     = alltrue([for bucket in aws_s3_bucket.data : bucket.force_destroy])
    error_message = "A trial couldn't be taken down."
  }
}

run "nothing_is_public" {
  command = plan

  assert {
    condition = alltrue([
      for block in concat(values(aws_s3_bucket_public_access_block.data), [aws_s3_bucket_public_access_block.logs]) :
      block.block_public_acls && block.block_public_policy && block.ignore_public_acls && block.restrict_public_buckets
    ])
    error_message = "A bucket could be made public."
  }
}

run "tags_of_images_never_move" {
  command = plan

  assert {
    condition     = aws_ecr_repository.this.image_tag_mutability == "IMMUTABLE"
    error_message = "Two nodes could run different images of one tag."
  }
}

run "refuses_logs_of_a_week" {
  command = plan

  variables {
    access_log_days = 7
  }

  expect_failures = [var.access_log_days]
}

run "refuses_a_long_name" {
  command = plan

  variables {
    name = "a-name-too-long-for-a-balancer"
  }

  expect_failures = [var.name]
}
