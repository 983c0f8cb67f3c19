"""Tensor-network diagrams of expressions: what is connected to what, and how fast every bond decays."""

from tnc.drawing.diagram import Bond, Diagram, Leg, Node, Panel, diagram
from tnc.drawing.paint import draw

__all__ = ["Bond", "Diagram", "Leg", "Node", "Panel", "diagram", "draw"]
