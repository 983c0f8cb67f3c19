"""Every launch of a Triton kernel goes to the device of its tensors, whatever the current one is."""

import ast
from pathlib import Path

import tnc.kernels

FILES = sorted(Path(tnc.kernels.__file__).parent.glob("*.py"))


def launches(function):
    """Whether a function holds ``kernel[grid](..., num_warps=...)``."""
    calls = [node for node in ast.walk(function) if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)]
    return any(keyword.arg == "num_warps" for call in calls for keyword in call.keywords)


def test_every_launch_is_on_its_device():
    found = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and launches(node):
                found.append(node.name)
                assert "on_its_device" in map(ast.unparse, node.decorator_list), f"{path.name}: {node.name}"
    assert len(found) >= 15, found
