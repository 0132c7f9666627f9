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
  description = "Whether a destroy is refused while there is data: buckets keep what they hold and images stay."
  type        = bool
  default     = true
}

variable "noncurrent_days" {
  description = "Days an overwritten or deleted object can still be restored."
  type        = number
  default     = 30

  validation {
    condition     = var.noncurrent_days >= 1 && floor(var.noncurrent_days) == var.noncurrent_days
    error_message = "noncurrent_days is a whole number of days, at least 1."
  }
}

variable "access_log_days" {
  description = "Days that access logs of buckets and the balancer are kept."
  type        = number
  default     = 365

  validation {
    condition     = var.access_log_days >= 30 && floor(var.access_log_days) == var.access_log_days
    error_message = "access_log_days is a whole number of days, at least 30: an incident is seldom noticed sooner."
  }
}
