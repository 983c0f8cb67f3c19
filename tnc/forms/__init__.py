"""Which form fits a layer: every form at equal bits, with its error, its cost and its predicted time."""

from tnc.forms.compare import Comparison, FormRow, compare_forms
from tnc.forms.contenders import Contender, contenders
from tnc.forms.cost import REFERENCE_MACHINE, Cost, Machine, cost_of, measure_machine

__all__ = [
    "REFERENCE_MACHINE", "Comparison", "Contender", "Cost", "FormRow", "Machine", "compare_forms", "contenders",
    "cost_of", "measure_machine",
]  # fmt: skip
