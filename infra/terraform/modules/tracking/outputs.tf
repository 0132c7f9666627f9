output "tracking_uri" {
  description = "The MLflow server's address, answered inside the VPC."
  value       = "http://${local.host}:${var.port}"
}

output "database_arn" {
  description = "ARN of the database."
  value       = aws_db_instance.this.arn
}

output "database_secret_arn" {
  description = "Secret with the database's user and password, kept by RDS."
  value       = local.secret_arn
}

output "queue_url" {
  description = "The queue's address in PostgreSQL, without its password."
  value       = "postgresql://queue@${aws_db_instance.this.address}:5432/queue?sslmode=verify-full"
}

output "queue_secret_arn" {
  description = "Secret with the password of the queue's user."
  value       = aws_secretsmanager_secret.queue.arn
}
