"""Quantizers: functions of a weight, its statistics and a number format that return a `Quantized` term."""

from tnc.quant.bound import grid_lower_bound
from tnc.quant.clip import CLIP_RATIOS, fit_grid
from tnc.quant.gptq import GptqResult, gptq, gptq_with_notes
from tnc.quant.grid import Grid
from tnc.quant.rtn import rtn

__all__ = [
    "CLIP_RATIOS",
    "GptqResult",
    "Grid",
    "fit_grid",
    "gptq",
    "gptq_with_notes",
    "grid_lower_bound",
    "rtn",
]
