variable "name" {
  description = "Name of the environment; resources are called liftyard-NAME-…"
  type        = string

  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{1,14}[a-z0-9]$", var.name))
    error_message = "name is 3 to 16 lower-case letters, digits and hyphens, starting with a letter and not ending with a hyphen: longer ones don't fit a balancer's name."
  }
}

variable "tags" {
  description = "Tags of every resource. The tag `environment` is what the budget counts by."
  type        = map(string)
  default     = {}
}

variable "subnet_ids" {
  description = "Private subnets, at least two, in different zones."
  type        = list(string)

  validation {
    condition     = length(var.subnet_ids) >= 2
    error_message = "subnet_ids are at least two subnets in different zones."
  }
}

variable "security_group_ids" {
  description = "The network module's security groups by name."
  type        = map(string)
}

variable "zone_id" {
  description = "The private DNS zone."
  type        = string
}

variable "zone_name" {
  description = "The private DNS zone's name."
  type        = string
}

variable "kms_key_arn" {
  description = "The environment's key."
  type        = string

  validation {
    condition     = startswith(var.kms_key_arn, "arn:")
    error_message = "kms_key_arn is the ARN of a key, arn:aws:kms:…"
  }
}

variable "image" {
  description = "The container image, with a tag or digest that never moves."
  type        = string

  validation {
    condition     = can(regex("(:[A-Za-z0-9_.-]+|@sha256:[0-9a-f]{64})$", var.image)) && !endswith(var.image, ":latest")
    error_message = "image ends with a tag other than latest, or with @sha256:…, so that every node runs the same one."
  }
}

variable "repository_arn" {
  description = "ARN of the repository that the image is pulled from."
  type        = string
}

variable "alarm_topic_arns" {
  description = "Topics that alarms are sent to."
  type        = list(string)
  default     = []
}

variable "log_days" {
  description = "Days that logs are kept, one of the numbers CloudWatch allows."
  type        = number
  default     = 365

  validation {
    condition     = contains([30, 60, 90, 120, 150, 180, 365, 400, 545, 731, 1096, 1827, 2192, 2557, 2922, 3288, 3653], var.log_days)
    error_message = "log_days is 30, 60, 90, 120, 150, 180, 365, 400, 545, 731, 1096, 1827, 2192, 2557, 2922, 3288 or 3653."
  }
}

variable "protected" {
  description = "Whether the head refuses to be terminated, its disk leaves a last snapshot and secrets can be restored for 30 days."
  type        = bool
  default     = true
}

variable "token" {
  description = "Ray's token, made by the caller; it goes to Secrets Manager and into no state."
  type        = string
  sensitive   = true
  ephemeral   = true

  validation {
    condition     = length(var.token) >= 32
    error_message = "token has at least 32 characters."
  }
}

variable "queue_url" {
  description = "The queue's address in PostgreSQL, without its password."
  type        = string

  validation {
    condition     = startswith(var.queue_url, "postgresql://") && !can(regex("//[^@/]*:[^@/]*@", var.queue_url))
    error_message = "queue_url begins with postgresql:// and has no password."
  }
}

variable "queue_secret_arn" {
  description = "Secret with the password of the queue's user."
  type        = string
}

variable "storage_root" {
  description = "Where the tables lie, s3://BUCKET"
  type        = string

  validation {
    condition     = startswith(var.storage_root, "s3://")
    error_message = "storage_root is s3://BUCKET"
  }
}

variable "tables_bucket_arn" {
  description = "ARN of that bucket."
  type        = string
}

variable "tracking_uri" {
  description = "The MLflow server's address."
  type        = string
}

variable "serve_target_group_arns" {
  description = "The balancer's target groups, which every node joins: Serve answers on each."
  type        = list(string)
  default     = []
}

variable "cpu_ami_id" {
  description = "Machine image of the head and of CPU workers: Amazon Linux 2023."
  type        = string
}

variable "gpu_ami_id" {
  description = "Machine image of GPU workers: one with NVIDIA's driver and container toolkit, such as the Deep Learning Base AMI."
  type        = string
}

variable "gpu_image" {
  description = "The container image of GPU workers, with a tag or digest that never moves."
  type        = string

  validation {
    condition     = can(regex("(:[A-Za-z0-9_.-]+|@sha256:[0-9a-f]{64})$", var.gpu_image)) && !endswith(var.gpu_image, ":latest")
    error_message = "gpu_image ends with a tag other than latest, or with @sha256:…, so that every node runs the same one."
  }
}

variable "head" {
  nullable    = false
  description = "The head's machine and the disk, in GiB, of its queue and journals."
  type = object({
    instance_type = optional(string, "m7i.2xlarge")
    disk_gib      = optional(number, 100)
  })
  default = {}

  validation {
    condition     = var.head.disk_gib >= 10
    error_message = "head.disk_gib is at least 10."
  }
}

variable "pools" {
  nullable    = false
  description = <<-TEXT
    Autoscaling groups of workers by name. `instance_types` are tried in the order of price and
    free capacity; `min` may be 0: a pool starts from nothing when work waits. The first
    `on_demand_base` machines and `on_demand_percent` of those above are on-demand, the others
    spot. `warm` machines stand by, stopped: they cost their disks and are there in a minute.
  TEXT

  type = map(object({
    gpu               = optional(bool, false)
    instance_types    = list(string)
    min               = optional(number, 0)
    max               = number
    on_demand_base    = optional(number, 0)
    on_demand_percent = optional(number, 0)
    warm              = optional(number, 0)
    disk_gib          = optional(number, 200)
  }))

  default = {
    cpu = {
      instance_types = ["m7i.4xlarge", "m7a.4xlarge", "m6i.4xlarge", "m6a.4xlarge"]
      on_demand_base = 1
      max            = 16
    }
    gpu = {
      gpu            = true
      instance_types = ["g6.4xlarge", "g5.4xlarge", "g6e.4xlarge", "g6.8xlarge", "g5.8xlarge"]
      max            = 8
    }
    gpu-ready = {
      gpu               = true
      instance_types    = ["g6.4xlarge"]
      on_demand_percent = 100
      warm              = 1
      max               = 4
    }
  }

  validation {
    condition     = alltrue([for name in keys(var.pools) : can(regex("^[a-z][a-z0-9-]{0,19}$", name)) && !contains(["head", "tracking"], name)])
    error_message = "A pool's name is 1 to 20 lower-case letters, digits and hyphens, starts with a letter, and isn't head or tracking."
  }

  validation {
    condition     = alltrue([for pool in values(var.pools) : pool.min >= 0 && pool.max >= 1 && pool.min <= pool.max])
    error_message = "A pool has 0 ≤ min ≤ max and max ≥ 1."
  }

  validation {
    condition     = alltrue([for pool in values(var.pools) : length(pool.instance_types) >= 1 && length(pool.instance_types) == length(distinct(pool.instance_types))])
    error_message = "A pool's instance_types are one or more different types."
  }

  validation {
    condition     = alltrue([for pool in values(var.pools) : alltrue([for type in pool.instance_types : can(regex("^(g|p)[0-9]", type)) == pool.gpu])])
    error_message = "A pool with gpu = true has types with NVIDIA GPUs only (g… and p…), one without has none of them."
  }

  validation {
    condition     = alltrue([for pool in values(var.pools) : pool.on_demand_base >= 0 && pool.on_demand_percent >= 0 && pool.on_demand_percent <= 100])
    error_message = "on_demand_base is at least 0 and on_demand_percent between 0 and 100."
  }

  validation {
    condition     = alltrue([for pool in values(var.pools) : pool.warm == 0 || (length(pool.instance_types) == 1 && pool.on_demand_percent == 100)])
    error_message = "A pool with warm machines has one instance type and on_demand_percent = 100: EC2 keeps no spot machines ready, nor a mix of types."
  }

  validation {
    condition     = alltrue([for pool in values(var.pools) : pool.warm >= 0 && pool.warm <= pool.max])
    error_message = "warm is between 0 and max."
  }

  validation {
    condition     = alltrue([for pool in values(var.pools) : pool.on_demand_percent == 100 || length(pool.instance_types) >= 3])
    error_message = "A pool with spot machines names at least three instance types: with fewer, one type running short empties the pool."
  }
}

variable "ports" {
  description = "Ports of Ray (GCS), its dashboard, the standing Dask scheduler, and Serve."
  type = object({
    ray       = optional(number, 6379)
    dashboard = optional(number, 8265)
    dask      = optional(number, 8786)
    serve     = optional(number, 8000)
  })
  default = {}

  validation {
    condition     = alltrue([for port in values(var.ports) : port >= 1024 && port <= 65535]) && length(distinct(values(var.ports))) == 4
    error_message = "ports are four different ones between 1024 and 65535."
  }
}

variable "drain_s" {
  description = "Seconds that a worker has for moving its work and objects when its group takes it away. Spot machines have AWS's two minutes, whatever is set here."
  type        = number
  default     = 600

  validation {
    condition     = var.drain_s >= 120 && var.drain_s <= 7200
    error_message = "drain_s is between 120 and 7200."
  }
}

variable "idle_s" {
  description = "Seconds after which an idle worker is given back."
  type        = number
  default     = 600

  validation {
    condition     = var.idle_s >= 60
    error_message = "idle_s is at least 60: a machine takes longer than that to start."
  }
}
