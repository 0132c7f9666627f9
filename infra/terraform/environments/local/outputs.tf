output "environment" {
  description = "The environment file: terraform output -json environment > .liftyard/environments/NAME.json"
  value = {
    ray_address   = "${local.head_address}:${var.ports.ray}"
    dask_address  = var.dask_workers > 0 ? "tcp://${local.head_address}:${var.ports.dask}" : null
    dashboard_url = "http://127.0.0.1:${var.ports.dashboard}"
    tracking_uri  = local.tracking_uri
    storage_root  = "${local.home}/tables"
    serve_url     = "http://127.0.0.1:${var.ports.serve}"
    queue         = local.queue
  }
  depends_on = [terraform_data.worker, terraform_data.serve, terraform_data.dispatcher]
}

output "services" {
  description = "Folder of the services' states and logs."
  value       = local.states
}
