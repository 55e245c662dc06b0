"""``python -m everlong``: the command line."""

from everlong.cli import app

app()
