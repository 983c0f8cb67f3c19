"""The command line: ``tnc demo | compress | eval | inspect | forms | draw | recipes``."""

from tnc.cli.app import app

__all__ = ["app"]
