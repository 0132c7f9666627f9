output "vpc_id" {
  description = "The VPC."
  value       = aws_vpc.this.id
}

output "private_subnet_ids" {
  description = "Private subnets, one a zone, once they have their routes."
  value       = [for zone in var.availability_zones : aws_route_table_association.private[zone].subnet_id]
}

output "public_subnet_ids" {
  description = "Public subnets, one a zone, once they have their routes."
  value       = [for zone in var.availability_zones : aws_route_table_association.public[zone].subnet_id]
}

output "security_group_ids" {
  description = "Security groups by name: balancer, nodes, tracking, database, endpoints, submitters."
  value       = { for name, group in aws_security_group.this : name => group.id }
}

output "zone_id" {
  description = "The private DNS zone."
  value       = aws_route53_zone.internal.zone_id
}

output "zone_name" {
  description = "The private DNS zone's name, under which nodes are found."
  value       = aws_route53_zone.internal.name
}

output "ports" {
  description = "Ports of Serve and MLflow, with defaults filled in."
  value       = var.ports
}
