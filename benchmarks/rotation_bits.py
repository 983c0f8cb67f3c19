"""Bits that rotated inputs save at equal held-out error, from files of `benchmarks.rotations` of three widths.

    python -m benchmarks.rotation_bits results/rotations-2.json results/rotations-3.json results/rotations-4.json

What a rotated layer would store at the error of the plain one of the middle width, log-linear between its own widths,
signs counted. A line is a kind of layer: what is saved, bits a weight, mean (smallest to largest).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.results import read

_Layers = Mapping[str, tuple[float, float]]  # bits and held-out error of every layer


def layers_of(file: Mapping[str, Any], method: str, side: str) -> _Layers:
    """Of one row of a file."""
    row = next(row for row in file["rows"] if (row["method"], row["side"]) == (method, side))
    return {name: (float(bits), float(error)) for name, (bits, error, _) in row["layers"].items()}


def saved(plain: _Layers, rotated: Sequence[_Layers], weights: Mapping[str, int]) -> dict[str, float]:
    """Bits a weight of every layer: of ``plain`` less what the rotated ones need for its error."""
    found = {}
    for name, (bits, error) in plain.items():
        sizes, errors = zip(*sorted(each[name] for each in rotated), strict=True)  # errors fall
        needed = np.interp(-np.log(error), -np.log(errors), sizes)
        found[name] = (bits - float(needed)) / weights[name]
    return found


def main() -> None:
    """Parse the arguments and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs=3, help="narrowest first")
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--side", default="inputs rotated")
    arguments = parser.parse_args()
    files = [read(path) for path in arguments.files]
    sides = [layers_of(file, arguments.method, arguments.side) for file in files]
    plain = layers_of(files[1], arguments.method, "plain")
    found = saved(plain, sides, files[1]["weights"])
    for kind in dict.fromkeys(name.rpartition(".")[2] for name in found):
        each = [bits for name, bits in found.items() if name.rpartition(".")[2] == kind]
        print(f"{kind:<10} {len(each):3} layers  {statistics.mean(each):.3f} ({min(each):.3f} to {max(each):.3f})")


if __name__ == "__main__":
    main()
