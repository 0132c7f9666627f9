output "ray_address" {
  description = "The head's address, host:port, answered inside the VPC."
  value       = "${local.head_host}:${var.ports.ray}"
}

output "dask_address" {
  description = "The standing Dask scheduler's address."
  value       = "tls://${local.head_host}:${var.ports.dask}"
}

output "dashboard_url" {
  description = "Ray's dashboard."
  value       = "http://${local.head_host}:${var.ports.dashboard}"
}

output "head_instance_id" {
  description = "The head's machine, for a session: aws ssm start-session --target ID"
  value       = aws_instance.head.id
}

output "autoscaling_groups" {
  description = "Autoscaling groups by pool."
  value       = { for name, group in aws_autoscaling_group.pool : name => group.name }
}

output "token_secret_arn" {
  description = "Secret with Ray's token."
  value       = aws_secretsmanager_secret.token.arn
}

output "drain_queue_url" {
  description = "Queue of machines that are to go."
  value       = aws_sqs_queue.drain.url
}
