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

variable "protected" {
  description = "Whether the balancer refuses to be deleted."
  type        = bool
  default     = true
}

variable "vpc_id" {
  description = "The VPC."
  type        = string
}

variable "internal" {
  description = "Whether the balancer is reached from the VPC and networks joined to it only, or by clients over the internet as well."
  type        = bool
  default     = true
}

variable "subnet_ids" {
  description = "The balancer's subnets in two or more zones: private ones if internal, public ones if not."
  type        = list(string)

  validation {
    condition     = length(var.subnet_ids) >= 2
    error_message = "subnet_ids are at least two subnets in different zones."
  }
}

variable "security_group_id" {
  description = "The balancer's security group."
  type        = string
}

variable "port" {
  description = "Port that Serve listens on, on every node."
  type        = number
  default     = 8000
}

variable "health_path" {
  description = "Path at which Serve's proxy says whether it can answer."
  type        = string
  default     = "/-/healthz"

  validation {
    condition     = startswith(var.health_path, "/")
    error_message = "health_path starts with /."
  }
}

variable "domain_name" {
  description = "Name that clients call, such as decide.example.com; the certificate is issued for it."
  type        = string

  validation {
    condition     = can(regex("^([a-z0-9]([a-z0-9-]*[a-z0-9])?\\.)+[a-z]{2,}$", var.domain_name))
    error_message = "domain_name is a full name in lower case, such as decide.example.com."
  }
}

variable "public_zone_id" {
  description = "The Route 53 public zone that domain_name belongs to: it proves to ACM whose the name is."
  type        = string
}

variable "access_logs_bucket" {
  description = "Bucket that the balancer may write its logs to, under balancer/."
  type        = string
}

variable "kms_key_arn" {
  description = "Key for the firewall's log."
  type        = string
}

variable "requests_per_5_minutes" {
  description = "Requests from one address in five minutes above which the firewall refuses it."
  type        = number
  default     = 30000

  validation {
    condition     = var.requests_per_5_minutes >= 100 && var.requests_per_5_minutes <= 2000000000
    error_message = "requests_per_5_minutes is between 100 and 2,000,000,000: AWS takes no other."
  }
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
