"""Planning: choosing every size of a whole model under one budget, with a certificate."""

from tnc.planning.base import Base
from tnc.planning.budget import (
    Budget,
    Bytes,
    Latency,
    Nats,
    PerplexityIncrease,
    Speedup,
    describe_budget,
    parse_budget,
)
from tnc.planning.constraints import SERVED_RANKS, AllowedBases, AllowedRanks, Constraint, KeepDense, LargestError
from tnc.planning.curve_table import CurveTable
from tnc.planning.curves import ErrorCurve, LayerCurves, Option, measure_curves
from tnc.planning.latency import LatencyTable, Timing
from tnc.planning.plan import LayerPlan, Plan, edit, shortfalls
from tnc.planning.pooled import Chosen, PooledBonds, PooledLayer, PooledPlan, pooled_ranks
from tnc.planning.portfolio import Choice, Portfolio
from tnc.planning.problem import Problem
from tnc.planning.rules import Clock, Rules
from tnc.planning.shared_curves import input_groups, measure_groups, measure_layers
from tnc.planning.solve import plan_curves, plan_of

__all__ = [
    "SERVED_RANKS", "AllowedBases", "AllowedRanks", "Base", "Budget", "Bytes", "Choice", "Chosen", "Clock",
    "Constraint", "CurveTable", "ErrorCurve", "KeepDense", "LargestError", "Latency", "LatencyTable", "LayerCurves",
    "LayerPlan", "Nats", "Option", "PerplexityIncrease", "Plan", "PooledBonds", "PooledLayer", "PooledPlan",
    "Portfolio", "Problem", "Rules", "Speedup", "Timing", "describe_budget", "edit", "input_groups",
    "measure_curves", "measure_groups", "measure_layers", "parse_budget", "plan_curves", "plan_of",
    "pooled_ranks",
    "shortfalls",
]  # fmt: skip
