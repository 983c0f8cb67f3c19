"""Expressions as drop-in modules."""

from tnc.modules.factored_linear import FactoredLinear
from tnc.modules.siblings import Siblings
from tnc.modules.stored import Tie

__all__ = ["FactoredLinear", "Siblings", "Tie"]
