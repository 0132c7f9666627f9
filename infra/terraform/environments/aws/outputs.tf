output "environment" {
  description = "The environment file: terraform output -json environment > .liftyard/environments/NAME.json"
  value = {
    ray_address   = module.cluster.ray_address
    dask_address  = module.cluster.dask_address
    dashboard_url = module.cluster.dashboard_url
    tracking_uri  = module.tracking.tracking_uri
    storage_root  = module.storage.storage_root
    serve_url     = module.serving.serve_url
    queue         = module.tracking.queue_url
  }
}

output "repository_url" {
  description = "Where the image is pushed to."
  value       = module.storage.repository_url
}

output "head_instance_id" {
  description = "The head's machine, for a session: aws ssm start-session --target ID"
  value       = module.cluster.head_instance_id
}

output "autoscaling_groups" {
  description = "Autoscaling groups by pool."
  value       = module.cluster.autoscaling_groups
}

output "token_secret_arn" {
  description = "Secret with Ray's token."
  value       = module.cluster.token_secret_arn
}

output "queue_secret_arn" {
  description = "Secret with the password of the queue's user."
  value       = module.tracking.queue_secret_arn
}

output "submitters_security_group_id" {
  description = "Security group of machines that may queue jobs."
  value       = module.network.security_group_ids["submitters"]
}
