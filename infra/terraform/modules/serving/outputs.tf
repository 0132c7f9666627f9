output "serve_url" {
  description = "Where decisions are asked for."
  value       = "https://${var.domain_name}"
}

output "target_group_arn" {
  description = "Target group that nodes join."
  value       = aws_lb_target_group.serve.arn
}

output "balancer_arn" {
  description = "ARN of the balancer."
  value       = aws_lb.this.arn
}
