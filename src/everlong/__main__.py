"""``python -m everlong``: the command line."""

from everlong.cli.app import app

app()
