"""Run timed cases: every answer is checked before its clock starts.

python -m benchmarks.run --list
python -m benchmarks.run compensate-2048 compensate-4096
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy
import scipy
import torch

import benchmarks.cases  # noqa: F401  registers the cases
from benchmarks.registry import CASES, Case, Problem, Way
from benchmarks.results import write


def machine() -> dict[str, Any]:
    """Versions, processor and commit that belong to every figure."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "commit": commit.stdout.strip(), "torch": torch.__version__, "numpy": numpy.__version__,
        "scipy": scipy.__version__, "python": platform.python_version(), "processor": _processor(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }  # fmt: skip


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def _seconds(way: Way) -> tuple[float, Any]:
    start = time.perf_counter()
    result = way()
    return time.perf_counter() - start, result


def run_case(each: Case) -> list[dict[str, Any]]:
    """Rows of one case: a way, its errors, and its times if the errors are within the limits."""
    problem = each.build()
    rows = []
    for name, way in problem.ways.items():
        first, result = _seconds(way)
        errors = problem.errors(result)
        wrong = [key for key, limit in problem.limit.items() if not errors[key] <= limit]
        times = [] if wrong else _times(problem, name, way, first)
        rows.append({"case": each.name, "way": name, "errors": errors, "wrong": wrong, "seconds": times})
    return rows


def _times(problem: Problem, name: str, way: Way, first: float) -> list[float]:
    if name in problem.once:
        return [first]
    return [_seconds(way)[0] for _ in range(problem.repeats)]


def _print(each: Case, rows: list[dict[str, Any]]) -> None:
    print(f"\n{each.name}: {each.summary}")
    baseline = statistics.median(rows[0]["seconds"]) if rows[0]["seconds"] else None
    for row in rows:
        errors = ", ".join(f"{key} {value:.3g}" for key, value in row["errors"].items())
        if row["wrong"]:
            print(f"  {row['way']:<28} no time: {', '.join(row['wrong'])} out of limits ({errors})")
            continue
        median = statistics.median(row["seconds"])
        ratio = f"{baseline / median:7.1f}x" if baseline else ""
        spread = f"{min(row['seconds']):.4g}..{max(row['seconds']):.4g}"
        print(f"  {row['way']:<28} {median:10.4g} s {ratio}  ({spread}; {errors})")


def main() -> None:
    """Parse the arguments, run, print, and write the rows as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="names of cases; none runs all")
    parser.add_argument("--list", action="store_true", help="list the cases")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks.json"))
    arguments = parser.parse_args()
    if arguments.list:
        for each in CASES.values():
            print(f"{each.name:<24} {each.summary}")
        return
    unknown = [name for name in arguments.cases if name not in CASES]
    if unknown:
        parser.error(f"unknown cases {', '.join(unknown)}; expected some of {', '.join(CASES)}")
    found = machine()
    print(json.dumps(found))
    rows = []
    for name in arguments.cases or CASES:
        rows += (new := run_case(CASES[name]))
        _print(CASES[name], new)
    write(arguments.out, {"machine": found, "rows": rows})


if __name__ == "__main__":
    main()
