"""Whole models: loading, walking, calibrating, compressing and evaluating them."""
