"""Every tiled kernel has a problem to tune, and launches on it."""

import pytest
import torch

pytest.importorskip("triton")

from kernels.triton_cases import DEVICE

from tnc.kernels import tuning_problems
from tnc.kernels.tuned import table
from tnc.kernels.tuning import tune


def test_every_kernel_of_the_shipped_table_is_tuned():
    problems = list(tuning_problems.problems(torch.device("cpu"), 4096, 4096))
    shipped = {row["kernel"] for row in table("h200")["rows"]}
    assert {problem.kernel for problem in problems} == shipped - {"experts_tile", "experts_vector"}


QUICK = ("mpo2", "mpo3", "rebuild_mpo2", "trellis_tile", "rebuild_trellis")  # in the interpreter


def test_problems_launch():
    device = torch.device(DEVICE)
    problems = [p for p in tuning_problems.problems(device, 48, 27) if DEVICE == "cuda" or p.kernel in QUICK]
    first = list({problem.kernel: problem for problem in problems}.values())
    found = tune(first, device, lambda call: float(call().isfinite().all()), seconds=0)
    assert all(each.row["microseconds"] == 1.0 and each.timed == 1 for each in found)
