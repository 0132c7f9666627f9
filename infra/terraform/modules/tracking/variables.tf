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
  description = "Whether the database refuses to be destroyed and leaves a last snapshot."
  type        = bool
  default     = true
}

variable "port" {
  description = "Port of the MLflow server."
  type        = number
  default     = 5000
}

variable "artifacts_root" {
  description = "Where artifacts lie, s3://BUCKET"
  type        = string

  validation {
    condition     = startswith(var.artifacts_root, "s3://")
    error_message = "artifacts_root is s3://BUCKET"
  }
}

variable "artifacts_bucket_arn" {
  description = "ARN of that bucket."
  type        = string
}

variable "ami_id" {
  description = "Machine image of the MLflow server: Amazon Linux 2023."
  type        = string
}

variable "instance_type" {
  description = "Machine of the MLflow server."
  type        = string
  default     = "m7i.large"
}

variable "database" {
  nullable    = false
  description = "Size of the database: instance class, disk in GiB and what it may grow to, whether a second zone stands by, days of backups."
  type = object({
    instance_class    = optional(string, "db.m7g.large")
    allocated_gib     = optional(number, 50)
    max_allocated_gib = optional(number, 500)
    multi_az          = optional(bool, true)
    backup_days       = optional(number, 14)
  })
  default = {}

  validation {
    condition     = startswith(var.database.instance_class, "db.")
    error_message = "database.instance_class starts with db., such as db.m7g.large."
  }

  validation {
    condition     = var.database.allocated_gib >= 20 && var.database.max_allocated_gib >= var.database.allocated_gib
    error_message = "database.allocated_gib is at least 20 and max_allocated_gib at least as much."
  }

  validation {
    condition     = var.database.backup_days >= 7 && var.database.backup_days <= 35
    error_message = "database.backup_days is 7 to 35: without backups a lost registry is lost."
  }
}

variable "queue_password" {
  description = "Password of the queue's user, made by the caller; it goes to Secrets Manager and into no state."
  type        = string
  sensitive   = true
  ephemeral   = true

  validation {
    condition     = can(regex("^[A-Za-z0-9]{32,}$", var.queue_password))
    error_message = "queue_password has at least 32 letters and digits, and nothing else."
  }
}
