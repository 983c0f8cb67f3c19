"""``python -m tnc``: the command line."""

from tnc.cli import app

app()
