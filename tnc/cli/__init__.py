"""The command line: ``tnc demo | plan | compress | eval | inspect | forms | draw | sensitivity | bench | recipes``."""

from tnc.cli.app import app

__all__ = ["app"]
