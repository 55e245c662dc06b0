"""The protocol: routes, keys, limits, metrics, and the console."""
