"""The service: a durable log, the engine over it, and HTTP."""
