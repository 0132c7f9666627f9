variable "name" {
  description = "Name of the environment, as in `liftyard run … --env NAME`."
  type        = string

  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{1,14}[a-z0-9]$", var.name))
    error_message = "name is 3 to 16 lower-case letters, digits and hyphens, starting with a letter and not ending with a hyphen."
  }
}

variable "region" {
  description = "AWS region."
  type        = string
}

variable "account_id" {
  description = "The AWS account this environment belongs to; an apply with another's credentials is refused. null takes any."
  type        = string
  default     = null

  validation {
    condition     = var.account_id == null || can(regex("^[0-9]{12}$", var.account_id))
    error_message = "account_id is 12 digits, or null."
  }
}

variable "availability_zones" {
  description = "Two to six zones of the region; the head and the MLflow server are in the first."
  type        = list(string)

  validation {
    condition     = alltrue([for zone in var.availability_zones : startswith(zone, var.region)])
    error_message = "availability_zones are zones of the region, such as eu-central-1a."
  }
}

variable "protected" {
  description = "Whether the environment refuses to lose data: no destroy of a bucket with objects, of the database, of the balancer. false is for trials."
  type        = bool
  default     = true
}

variable "tags" {
  description = "Further tags of every resource; project and environment are set already."
  type        = map(string)
  default     = {}

  validation {
    condition     = length(setintersection(keys(var.tags), ["project", "environment"])) == 0
    error_message = "tags project and environment are set by the environment itself."
  }
}

variable "cidr" {
  description = "IPv4 range of the VPC, /16 to /20, that meets none of the networks to be joined to it."
  type        = string
  default     = "10.60.0.0/16"
}

variable "nat_per_zone" {
  description = "A NAT gateway in each zone, or one for all."
  type        = bool
  default     = true
}

variable "client_cidrs" {
  description = "IPv4 ranges that may ask for decisions. Everyone (0.0.0.0/0) is refused."
  type        = list(string)
}

variable "internal" {
  description = "Whether the balancer is inside the VPC only."
  type        = bool
  default     = true
}

variable "domain_name" {
  description = "Name that clients call."
  type        = string
}

variable "public_zone_id" {
  description = "Route 53 public zone of domain_name."
  type        = string
}

variable "image_tag" {
  description = "Tag of the images in the environment's repository: TAG-cpu and TAG-cuda (infra/image/)."
  type        = string

  validation {
    condition     = can(regex("^[A-Za-z0-9_][A-Za-z0-9_.-]{0,100}$", var.image_tag)) && var.image_tag != "latest"
    error_message = "image_tag is a tag other than latest, such as a commit's short hash."
  }
}

variable "cpu_ami_parameter" {
  description = "Public parameter that holds the machine image of the head, the MLflow server and CPU workers."
  type        = string
  default     = "/aws/service/ami-amazon-linux-latest/al2023-ami-kernel-default-x86_64"
}

variable "gpu_ami_parameter" {
  description = "Public parameter that holds the machine image of GPU workers."
  type        = string
  default     = "/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-amazon-linux-2023/latest/ami-id"
}

variable "head" {
  description = "The head's machine and disk; see modules/cluster."
  type = object({
    instance_type = optional(string)
    disk_gib      = optional(number)
  })
  default = {}
}

variable "pools" {
  description = "Pools of workers by name; see modules/cluster. null takes its default: CPU, GPU, and GPU with a warm machine."
  type = map(object({
    gpu               = optional(bool)
    instance_types    = list(string)
    min               = optional(number)
    max               = number
    on_demand_base    = optional(number)
    on_demand_percent = optional(number)
    warm              = optional(number)
    disk_gib          = optional(number)
  }))
  default = null
}

variable "database" {
  description = "Size of the database; see modules/tracking."
  type = object({
    instance_class    = optional(string)
    allocated_gib     = optional(number)
    max_allocated_gib = optional(number)
    multi_az          = optional(bool)
    backup_days       = optional(number)
  })
  default = {}
}

variable "requests_per_5_minutes" {
  description = "Requests from one address in five minutes above which the firewall refuses it."
  type        = number
  default     = 30000
}

variable "log_days" {
  description = "Days that logs are kept."
  type        = number
  default     = 365
}

variable "alarm_emails" {
  description = "Who is written to by alarms and the budget; each confirms once, by a link."
  type        = list(string)

  validation {
    condition     = alltrue([for email in var.alarm_emails : can(regex("^[^@ ]+@[^@ ]+\\.[^@ ]+$", email))])
    error_message = "alarm_emails are e-mail addresses."
  }
}

variable "budget_usd" {
  description = "What the environment may cost a month, in US dollars; alarms at 80 % and 100 % spent, and when the month is forecast to end above. null sets no budget."
  type        = number

  validation {
    condition     = var.budget_usd == null || try(var.budget_usd > 0, false)
    error_message = "budget_usd is above 0, or null."
  }
}
