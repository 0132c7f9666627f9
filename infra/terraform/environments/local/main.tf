# A cluster of processes on this machine: the nodes boot by the same program as machines of a cloud
# (cluster/bootstrap.py), each at a loopback address of its own, and are kept running by
# cluster/keeper.py. Destroy provisioners see only `self`, so each resource keeps its own commands.

locals {
  root   = abspath("${path.module}/../../../..")
  python = var.python == "" ? "${local.root}/.venv/bin/python" : var.python
  home   = var.home == "" ? "${local.root}/.liftyard" : var.home
  states = "${local.home}/services"
  token  = var.token_path == "" ? pathexpand("~/.ray/auth_token") : var.token_path
  keeper = "'${local.python}' -m cluster.keeper"

  # Sockets' paths may have about 100 characters, so not below home.
  scratch      = "/tmp/liftyard-${substr(terraform_data.identity.id, 0, 8)}"
  head_address = "127.0.0.2"

  every_node = {
    LIFTYARD_HEAD_HOST                     = local.head_address
    LIFTYARD_RAY_PORT                      = tostring(var.ports.ray)
    LIFTYARD_CPUS                          = tostring(var.cpus)
    LIFTYARD_GPUS                          = "0"
    MLFLOW_TRACKING_URI                    = local.tracking_uri
    RAY_AUTH_MODE                          = "token"
    RAY_AUTH_TOKEN_PATH                    = local.token
    RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO     = "0"
    RAY_gcs_rpc_server_reconnect_timeout_s = "10"
  }

  tracking_uri = "http://127.0.0.1:${var.ports.mlflow}"
  queue        = "sqlite:///${local.home}/queues/terraform.sqlite"
}

# Another apply of the same files elsewhere gets folders of its own.
resource "terraform_data" "identity" {}

resource "terraform_data" "token" {
  input = local.token

  provisioner "local-exec" {
    command     = "'${local.python}' -c 'from cluster.session import authenticate; authenticate(make=True)'"
    working_dir = local.root
    environment = { RAY_AUTH_MODE = "token", RAY_AUTH_TOKEN_PATH = local.token }
  }
}

resource "terraform_data" "tracking" {
  input = {
    root = local.root
    up   = "${local.keeper} up --states '${local.states}' --name tracking --ready http:${local.tracking_uri}/health -- '${local.python}' -m mlflow server --host 127.0.0.1 --port ${var.ports.mlflow} --workers 1 --backend-store-uri 'sqlite:///${local.home}/mlflow.db' --artifacts-destination '${local.home}/artifacts'"
    down = "${local.keeper} down --states '${local.states}' --name tracking"
  }
  triggers_replace = [var.ports.mlflow, local.home, local.python]

  provisioner "local-exec" {
    command     = self.input.up
    working_dir = self.input.root
  }

  provisioner "local-exec" {
    when        = destroy
    command     = self.input.down
    working_dir = self.input.root
  }
}

resource "terraform_data" "head" {
  input = {
    root = local.root
    up   = "${local.keeper} up --states '${local.states}' --name head --limit 180 --ready 'log:head ${local.head_address}: ready' --ready http:http://127.0.0.1:${var.ports.dashboard}/api/version%{if var.dask_workers > 0} --ready tcp:${local.head_address}:${var.ports.dask}%{endif} -- '${local.python}' -m cluster.bootstrap head"
    down = "${local.keeper} down --states '${local.states}' --name head && rm -rf '${local.scratch}'"
    environment = merge(local.every_node, {
      LIFTYARD_NODE_ADDRESS   = local.head_address
      LIFTYARD_DASHBOARD_HOST = "127.0.0.1"
      LIFTYARD_DASHBOARD_PORT = tostring(var.ports.dashboard)
      LIFTYARD_DASK_PORT      = tostring(var.ports.dask)
      LIFTYARD_DASK_WORKERS   = tostring(var.dask_workers)
      LIFTYARD_STATE_DIR      = "${local.states}/node-head"
      LIFTYARD_SCRATCH        = "${local.scratch}/head"
    })
  }
  triggers_replace = [var.ports, var.cpus, var.dask_workers, local.home, local.python, local.token]
  depends_on       = [terraform_data.token]

  provisioner "local-exec" {
    command     = self.input.up
    working_dir = self.input.root
    environment = self.input.environment
  }

  provisioner "local-exec" {
    when        = destroy
    command     = self.input.down
    working_dir = self.input.root
  }
}

resource "terraform_data" "worker" {
  count = var.workers

  input = {
    root = local.root
    up   = "${local.keeper} up --states '${local.states}' --name worker-${count.index} --limit 180 --ready 'log:worker 127.0.0.${count.index + 3}: ready' -- '${local.python}' -m cluster.bootstrap worker"
    down = "${local.keeper} down --states '${local.states}' --name worker-${count.index} && rm -rf '${local.scratch}/worker-${count.index}'"
    environment = merge(local.every_node, {
      LIFTYARD_NODE_ADDRESS = "127.0.0.${count.index + 3}"
      LIFTYARD_STATE_DIR    = "${local.states}/node-worker-${count.index}"
      LIFTYARD_SCRATCH      = "${local.scratch}/worker-${count.index}"
    })
  }

  depends_on = [terraform_data.head]

  lifecycle {
    # A head that was made anew is another cluster.
    replace_triggered_by = [terraform_data.head.id]
  }

  provisioner "local-exec" {
    command     = self.input.up
    working_dir = self.input.root
    environment = self.input.environment
  }

  provisioner "local-exec" {
    when        = destroy
    command     = self.input.down
    working_dir = self.input.root
  }
}

# Hands queued jobs to the head; one that restarts gets them again.
resource "terraform_data" "dispatcher" {
  input = {
    root = local.root
    up   = "${local.keeper} up --states '${local.states}' --name dispatcher --ready 'log:dispatcher: hands over' -- '${local.python}' -m jobs.dispatch '--queue=${local.queue}' --dashboard=http://127.0.0.1:${var.ports.dashboard}"
    down = "${local.keeper} down --states '${local.states}' --name dispatcher"
    environment = {
      RAY_AUTH_MODE       = "token"
      RAY_AUTH_TOKEN_PATH = local.token
    }
  }
  triggers_replace = [var.ports.dashboard, local.home, local.python, local.token]
  depends_on       = [terraform_data.head]

  provisioner "local-exec" {
    command     = self.input.up
    working_dir = self.input.root
    environment = self.input.environment
  }

  provisioner "local-exec" {
    when        = destroy
    command     = self.input.down
    working_dir = self.input.root
  }
}

# Serve listens when the registry has a first champion; until then its process waits for one.
resource "terraform_data" "serve" {
  input = {
    root = local.root
    up   = "${local.keeper} up --states '${local.states}' --name serve --limit 120 --ready 'log:serve: (waits|serves)' -- '${local.python}' '${abspath(path.module)}/serve.py' --address ${local.head_address}:${var.ports.ray} --tracking ${local.tracking_uri} --port ${var.ports.serve}"
    down = "${local.keeper} down --states '${local.states}' --name serve"
    environment = {
      RAY_AUTH_MODE       = "token"
      RAY_AUTH_TOKEN_PATH = local.token
    }
  }
  depends_on = [terraform_data.tracking, terraform_data.head]

  lifecycle {
    replace_triggered_by = [terraform_data.head.id, terraform_data.tracking.id]
  }

  provisioner "local-exec" {
    command     = self.input.up
    working_dir = self.input.root
    environment = self.input.environment
  }

  provisioner "local-exec" {
    when        = destroy
    command     = self.input.down
    working_dir = self.input.root
  }
}
