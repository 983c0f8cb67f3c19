"""Every launch of a Triton kernel goes to the device of its tensors, whatever the current one is."""

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import tnc.kernels
from tnc.errors import BackendError
from tnc.kernels import launch

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


def test_captured_launches_never_share_counters_and_launches_between_them_make_room(monkeypatch):
    capturing, zeros = [False], torch.zeros
    monkeypatch.setattr(launch, "_ARENA", 256)
    monkeypatch.setattr(torch, "zeros", lambda *size, dtype, device: zeros(*size, dtype=dtype))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    held, taken = launch.Counters(torch.device("cuda")), []
    for _ in range(4):  # graphs, each after a run of the model
        capturing[0] = False
        held.take(40)
        capturing[0] = True
        taken += [held.take(40), held.take(40)]
    places = {part.data_ptr() + 4 * k for part in taken for k in range(part.numel())}
    assert len(places) == sum(part.numel() for part in taken) == 8 * 40
    with pytest.raises(BackendError, match="outside of a capture"):
        for _ in range(4):
            held.take(40)
