"""The training loop, its tasks and losses."""
