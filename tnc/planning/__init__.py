"""Planning: choosing sizes for a whole model under one budget."""

from tnc.planning.pooled import PooledLayer, PooledPlan, pooled_ranks

__all__ = ["PooledLayer", "PooledPlan", "pooled_ranks"]
