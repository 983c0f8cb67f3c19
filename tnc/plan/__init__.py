"""Planning: choosing sizes for a whole model under one budget."""

from tnc.plan.pooled import PooledLayer, PooledPlan, pooled_ranks

__all__ = ["PooledLayer", "PooledPlan", "pooled_ranks"]
