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

variable "cidr" {
  description = "IPv4 range of the VPC, a /16 to /20."
  type        = string
  default     = "10.60.0.0/16"

  validation {
    condition     = can(cidrnetmask(var.cidr)) && tonumber(split("/", var.cidr)[1]) >= 16 && tonumber(split("/", var.cidr)[1]) <= 20
    error_message = "cidr is an IPv4 range between /16 and /20, such as 10.60.0.0/16: each subnet takes a sixteenth of it."
  }
}

variable "availability_zones" {
  description = "Availability zones to spread over, 2 to 6."
  type        = list(string)

  validation {
    condition     = length(distinct(var.availability_zones)) == length(var.availability_zones) && length(var.availability_zones) >= 2 && length(var.availability_zones) <= 6
    error_message = "availability_zones are 2 to 6 different zones: the database and the balancer need two."
  }
}

variable "nat_per_zone" {
  description = "A NAT gateway in each zone (one lost zone then takes no other along), or one for all (cheaper)."
  type        = bool
  default     = true
}

variable "client_cidrs" {
  description = "IPv4 ranges that may call the balancer's port 443, for example the company's offices and other VPCs."
  type        = list(string)
  default     = []

  validation {
    condition     = alltrue([for cidr in var.client_cidrs : can(cidrnetmask(cidr)) && try(tonumber(split("/", cidr)[1]) >= 8, false)])
    error_message = "client_cidrs are IPv4 ranges of /8 or smaller: name who calls; 0.0.0.0/0 would be everyone."
  }
}

variable "kms_key_arn" {
  description = "Key for the flow logs."
  type        = string

  validation {
    condition     = startswith(var.kms_key_arn, "arn:")
    error_message = "kms_key_arn is the ARN of a key, arn:aws:kms:…"
  }
}

variable "log_days" {
  description = "Days that flow logs are kept, one of the numbers CloudWatch allows."
  type        = number
  default     = 365

  validation {
    condition     = contains([30, 60, 90, 120, 150, 180, 365, 400, 545, 731, 1096, 1827, 2192, 2557, 2922, 3288, 3653], var.log_days)
    error_message = "log_days is 30, 60, 90, 120, 150, 180, 365, 400, 545, 731, 1096, 1827, 2192, 2557, 2922, 3288 or 3653."
  }
}

variable "ports" {
  description = "Ports of Ray Serve and of the MLflow server."
  type = object({
    serve    = optional(number, 8000)
    tracking = optional(number, 5000)
  })
  default = {}

  validation {
    condition     = alltrue([for port in values(var.ports) : port >= 1024 && port <= 65535])
    error_message = "ports are between 1024 and 65535: nodes run without the right to lower ones."
  }
}
