# Who may talk to whom. Every rule is one line of the tables below; there are no others.
#
# Whoever reaches a Ray, Dask or MLflow port can run code or read models, so those ports answer
# nodes only. People come in by the balancer, or by a session of Systems Manager. Machines in the group
# `submitters` may queue jobs, and no more.

locals {
  groups = {
    balancer  = "Balancer: HTTPS from named clients, on to Serve"
    nodes     = "Ray and Dask nodes: among themselves, and Serve to the balancer"
    tracking  = "MLflow server: from nodes only"
    database  = "PostgreSQL: from the MLflow server, and for the queue from nodes and submitters"
    endpoints = "AWS services inside the VPC: from nodes and the MLflow server"
    # Nothing here is in it.
    submitters = "Machines that may queue jobs"
  }

  # Who is called, by whom (a group), on which ports.
  calls = {
    "balancer-serve"      = { to = "nodes", by = "balancer", from_port = var.ports.serve, to_port = var.ports.serve, what = "Serve" }
    "nodes-nodes"         = { to = "nodes", by = "nodes", from_port = 1024, to_port = 65535, what = "Ray and Dask" }
    "nodes-tracking"      = { to = "tracking", by = "nodes", from_port = var.ports.tracking, to_port = var.ports.tracking, what = "MLflow" }
    "tracking-database"   = { to = "database", by = "tracking", from_port = 5432, to_port = 5432, what = "PostgreSQL" }
    "nodes-database"      = { to = "database", by = "nodes", from_port = 5432, to_port = 5432, what = "The queue" }
    "submitters-database" = { to = "database", by = "submitters", from_port = 5432, to_port = 5432, what = "The queue" }
    "nodes-endpoints"     = { to = "endpoints", by = "nodes", from_port = 443, to_port = 443, what = "AWS services" }
    "tracking-endpoints"  = { to = "endpoints", by = "tracking", from_port = 443, to_port = 443, what = "AWS services" }
  }

  # Package registries, and AWS services without an endpoint here.
  https_out = toset(["nodes", "tracking"])
}

resource "aws_security_group" "this" {
  #checkov:skip=CKV2_AWS_5: Attached by the modules that make the machines
  for_each = local.groups

  name                   = "liftyard-${var.name}-${each.key}"
  description            = each.value
  vpc_id                 = aws_vpc.this.id
  revoke_rules_on_delete = true
  tags                   = merge(var.tags, { Name = "liftyard-${var.name}-${each.key}" })
}

resource "aws_vpc_security_group_ingress_rule" "call" {
  for_each = local.calls

  security_group_id            = aws_security_group.this[each.value.to].id
  referenced_security_group_id = aws_security_group.this[each.value.by].id
  description                  = "${each.value.what} from ${each.value.by}"
  ip_protocol                  = "tcp"
  from_port                    = each.value.from_port
  to_port                      = each.value.to_port
  tags                         = var.tags
}

resource "aws_vpc_security_group_egress_rule" "call" {
  for_each = local.calls

  security_group_id            = aws_security_group.this[each.value.by].id
  referenced_security_group_id = aws_security_group.this[each.value.to].id
  description                  = "${each.value.what} at ${each.value.to}"
  ip_protocol                  = "tcp"
  from_port                    = each.value.from_port
  to_port                      = each.value.to_port
  tags                         = var.tags
}

resource "aws_vpc_security_group_ingress_rule" "client" {
  for_each = toset(var.client_cidrs)

  security_group_id = aws_security_group.this["balancer"].id
  cidr_ipv4         = each.key
  description       = "HTTPS from a named client"
  ip_protocol       = "tcp"
  from_port         = 443
  to_port           = 443
  tags              = var.tags
}

resource "aws_vpc_security_group_egress_rule" "https" {
  for_each = local.https_out

  security_group_id = aws_security_group.this[each.key].id
  cidr_ipv4         = "0.0.0.0/0"
  description       = "HTTPS to S3, AWS services and package registries"
  ip_protocol       = "tcp"
  from_port         = 443
  to_port           = 443
  tags              = var.tags
}
