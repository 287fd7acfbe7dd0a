"""Deployments and the server that offers them."""
