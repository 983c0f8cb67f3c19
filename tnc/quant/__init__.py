"""Quantizers: functions of a weight, its statistics and a format that return a `Quantized` term, by name."""

from tnc.quant.affine_levels import AffineLevels
from tnc.quant.bound import grid_lower_bound
from tnc.quant.clip import CLIP_RATIOS, fit_grid
from tnc.quant.gptq import gptq, gptq_with_notes
from tnc.quant.grid import Grid
from tnc.quant.hqq import hqq
from tnc.quant.learned import autoround, learned_clipping
from tnc.quant.order import ORDERS
from tnc.quant.refine import refine
from tnc.quant.registry import QUANTIZERS, QuantizerEntry, QuantizerResult, quantizer, register_quantizer
from tnc.quant.rtn import rtn
from tnc.quant.table_levels import TableLevels
from tnc.quant.trellis import TrellisLevels
from tnc.quant.yaqa import yaqa

__all__ = [
    "CLIP_RATIOS", "ORDERS", "QUANTIZERS", "AffineLevels", "Grid", "QuantizerEntry", "QuantizerResult", "TableLevels",
    "TrellisLevels", "autoround", "fit_grid", "gptq", "gptq_with_notes", "grid_lower_bound", "hqq", "learned_clipping",
    "quantizer", "refine", "register_quantizer", "rtn", "yaqa",
]  # fmt: skip
