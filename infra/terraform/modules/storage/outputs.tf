output "kms_key_arn" {
  description = "The environment's key."
  value       = aws_kms_key.this.arn
}

output "bucket_arns" {
  description = "ARNs of the buckets `tables` and `artifacts`."
  value       = { for name, bucket in aws_s3_bucket.data : name => bucket.arn }
}

output "storage_root" {
  description = "Where the tables lie, s3://…"
  value       = "s3://${aws_s3_bucket.data["tables"].id}"
}

output "artifacts_root" {
  description = "Where MLflow's artifacts lie, s3://…"
  value       = "s3://${aws_s3_bucket.data["artifacts"].id}"
}

output "access_logs_bucket" {
  description = "Name of the bucket for access logs, ready to be written to by a balancer under `balancer/`."
  # By way of the policy, so that a balancer isn't made before it may write here.
  value = aws_s3_bucket_policy.logs.bucket
}

output "repository_url" {
  description = "Where the image is pushed to and pulled from."
  value       = aws_ecr_repository.this.repository_url
}

output "repository_arn" {
  description = "ARN of the image repository."
  value       = aws_ecr_repository.this.arn
}
