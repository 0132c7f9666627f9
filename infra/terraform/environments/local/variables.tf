variable "python" {
  description = "Python of the environment's packages; empty takes .venv of the checkout."
  type        = string
  default     = ""
}

variable "home" {
  description = "Folder of tables, models, states and logs, absolute; empty takes .liftyard of the checkout. Destroy leaves tables and models."
  type        = string
  default     = ""

  validation {
    condition     = var.home == "" || startswith(var.home, "/")
    error_message = "home is an absolute path, or empty."
  }
}

variable "token_path" {
  description = "File of Ray's token, made with mode 0600 where there is none; empty takes Ray's own, ~/.ray/auth_token, where every client looks."
  type        = string
  default     = ""

  validation {
    condition     = var.token_path == "" || startswith(var.token_path, "/")
    error_message = "token_path is an absolute path, or empty."
  }
}

variable "workers" {
  description = "Worker nodes besides the head. A change starts or ends workers only."
  type        = number
  default     = 2

  validation {
    condition     = var.workers == floor(var.workers) && var.workers >= 0 && var.workers <= 200
    error_message = "workers is a whole number from 0 to 200."
  }
}

variable "cpus" {
  description = "CPUs that Ray gives out at each node, the head included."
  type        = number
  default     = 1

  validation {
    condition     = var.cpus == floor(var.cpus) && var.cpus >= 1
    error_message = "cpus is a whole number, at least 1."
  }
}

variable "dask_workers" {
  description = "One-CPU workers of the standing Dask lease; 0 has none. They hold their CPUs."
  type        = number
  default     = 1

  validation {
    condition     = var.dask_workers == floor(var.dask_workers) && var.dask_workers >= 0
    error_message = "dask_workers is a whole number, at least 0."
  }
}

variable "ports" {
  description = "Ports on this machine; they must be free and differ."
  type = object({
    ray       = number
    dashboard = number
    dask      = number
    mlflow    = number
    serve     = number
  })
  default = {
    ray       = 26379
    dashboard = 28265
    dask      = 28786
    mlflow    = 25000
    serve     = 28000
  }

  validation {
    condition     = alltrue([for port in values(var.ports) : port >= 1024 && port <= 65535])
    error_message = "Every port is from 1024 to 65535."
  }

  validation {
    condition     = length(distinct(values(var.ports))) == length(values(var.ports))
    error_message = "No two ports are the same."
  }
}
