"""The Python client of the service."""

from everlong.client.client import Client, ServiceError, UnreachableError

__all__ = ["Client", "ServiceError", "UnreachableError"]
