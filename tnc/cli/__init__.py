"""The command line: ``tnc demo | compress | eval | inspect | recipes``."""

from tnc.cli.app import app

__all__ = ["app"]
