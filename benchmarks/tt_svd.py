"""TT-SVD beside TensorLy's: CPU seconds of one thread, peak memory and error, each way in a process of its own.

    python -m benchmarks.tt_svd 4096 4096 --cores 3 --rank 64
    python -m benchmarks.tt_svd 4096 4096 --cores 2 --eps 0.1     # a decaying two-site spectrum; TensorLy gets the rank

CPU seconds, not wall time: they hold on a machine that others use too. Memory is the peak of the resident set above
what the process held when the clock started; the peak of building the problem is forgotten first (Linux only).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from tensorly.decomposition import tensor_train_matrix

from benchmarks.cases.mpo import decaying, gaussian
from tnc.networks import from_tensorly, site_modes, tt_svd
from tnc.terms import dense64


def measure(arguments: argparse.Namespace) -> dict[str, object]:
    """One way, in this process."""
    torch.set_num_threads(1)
    shape = (arguments.rows, arguments.columns)
    outs, ins = site_modes(shape, arguments.cores)
    weight = gaussian(*shape) if arguments.eps is None else decaying(arguments.rows, (outs[0], ins[0]))
    array = weight.numpy().reshape(*outs, *ins)
    ranks = [1, *json.loads(arguments.ranks), 1] if arguments.ranks else None
    Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is resident now
    before, start = _peak(), time.process_time()
    if arguments.way == "tensorly":
        mpo = from_tensorly(tensor_train_matrix(array, ranks))
    else:
        mpo = tt_svd(weight, outs, ins, max_rank=arguments.rank, eps=arguments.eps)
    seconds = time.process_time() - start
    peak = _peak() - before
    error = float((weight.double() - dense64(mpo)).norm() / weight.double().norm())
    return {"way": arguments.way, "cpu_seconds": seconds, "extra_mb": peak / 1024, "error": error, "ranks": mpo.ranks}


def _peak() -> int:
    """Peak of the resident set, KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def main() -> None:
    """Run tnc, then TensorLy at the bond dimensions that came out, and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=int)
    parser.add_argument("columns", type=int)
    parser.add_argument("--cores", type=int, default=3)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--eps", type=float)
    parser.add_argument("--way", choices=("tnc", "tensorly"), help="measure one way in this process")
    parser.add_argument("--ranks", help="inner bond dimensions for tensorly, as JSON")
    arguments = parser.parse_args()
    if arguments.way:
        print(json.dumps(measure(arguments)))
        return
    ours = _elsewhere([*sys.argv[1:], "--way", "tnc"])
    theirs = _elsewhere([*sys.argv[1:], "--way", "tensorly", "--ranks", json.dumps(ours["ranks"][1:-1])])
    print(f"{arguments.rows}x{arguments.columns}, ranks {ours['ranks']}")
    for row in (ours, theirs):
        print("  {way:<9} {cpu_seconds:8.2f} CPU s  {extra_mb:7.0f} MB  error {error:.6f}".format(**row))
    ratio, error = theirs["cpu_seconds"] / ours["cpu_seconds"], ours["error"] / theirs["error"]
    print(f"  {ratio:.1f}x faster, error {error:.6f} times theirs", flush=True)


def _elsewhere(arguments: list[str]) -> dict[str, object]:
    command = [sys.executable, "-m", "benchmarks.tt_svd", *arguments]
    row: dict[str, object] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return row


if __name__ == "__main__":
    main()
