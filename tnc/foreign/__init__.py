"""Checkpoints that other tools quantized or pruned, read as terms without changing a bit of what they stored."""

from tnc.foreign.base import Base, load_base

__all__ = ["Base", "load_base"]
