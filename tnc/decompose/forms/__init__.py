"""Structured forms of a matrix, each by one function ``(weight, size, *, metric, ...) -> term``."""

from tnc.decompose.forms.blast import blast
from tnc.decompose.forms.block_low_rank import block_low_rank, monarch
from tnc.decompose.forms.block_term import block_term
from tnc.decompose.forms.mode_tensors import cp, tensor_ring, tucker
from tnc.decompose.forms.stage import Form, FormStage

__all__ = ["Form", "FormStage", "blast", "block_low_rank", "block_term", "cp", "monarch", "tensor_ring", "tucker"]
