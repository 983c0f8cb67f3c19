"""Laws of functions ``(weight, stats, format) -> Quantized`` (or an expression with quantized leaves)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from tnc.errors import TNCError, all_finite
from tnc.formats import NumberFormat, TrellisFormat, pack, unpack
from tnc.stats import LayerStats
from tnc.terms import Expression, Product, Quantized, Sum, dense64
from tnc.testing.harness import Law, require, search_laws
from tnc.testing.problems import WeightedProblem
from tnc.testing.strategies import formats, weighted_problems

Quantizer = Callable[[Tensor, LayerStats, NumberFormat], Expression]


@dataclass(frozen=True)
class FormatCase:
    """A problem and a number format that fits its weight."""

    problem: WeightedProblem
    format: NumberFormat

    def __str__(self) -> str:
        weight = self.problem.weight
        return (
            f"Smallest failing case: {self.format}, weight {tuple(weight.shape)} {weight.dtype}\n"
            f"Rebuild it: problem = {self.problem!r}; "
            f"quantizer(problem.weight, problem.stats, tnc.{self.format})"
        )


def check_quantizer(
    quantizer: Quantizer,
    *,
    nearest: bool = False,
    problems: st.SearchStrategy[WeightedProblem] | None = None,
    formats_of: Callable[[int], st.SearchStrategy[NumberFormat]] = formats,
    max_examples: int = 100,
    seed: int | None = 0,
) -> tuple[str, ...]:
    """Check a quantizer on many small problems in number formats of every kind that fit them.

    Args:
        quantizer: ``quantizer(weight, stats, format)``, weight (m, n), returns a `Quantized` term, or an
            expression whose `Quantized` leaves are then checked.
        nearest: whether every entry must be the nearest point of its group's grid (round to nearest).
        problems: domain to search; ``None`` is all of `weighted_problems`.
        formats_of: in_features to the formats that are tried, by default all kinds; `int_formats` for a
            quantizer of integers.
        max_examples: cases tried a law.
        seed: of the search; ``None`` searches elsewhere every time.

    Returns:
        The names of the laws that hold.

    Raises:
        LawError: at the first broken law: its name, what was expected, the smallest failing case.
    """
    laws = (*_LAWS, codes_are_nearest) if nearest else _LAWS
    cases = _cases(weighted_problems() if problems is None else problems, formats_of)
    return search_laws(laws, quantizer, cases, max_examples=max_examples, seed=seed)


@st.composite
def _cases(
    draw: st.DrawFn,
    problems: st.SearchStrategy[WeightedProblem],
    formats_of: Callable[[int], st.SearchStrategy[NumberFormat]],
) -> FormatCase:
    problem = draw(problems)
    return FormatCase(problem, draw(formats_of(problem.weight.shape[1])))


def shape_is_kept(quantizer: Quantizer, case: FormatCase) -> None:
    """The result is an expression of the weight's shape."""
    result = _run(quantizer, case)
    require(isinstance(result, Expression), f"expected an Expression; got {type(result).__name__}")
    expected = tuple(case.problem.weight.shape)
    require(tuple(result.shape) == expected, f"expected shape {expected}; got {tuple(result.shape)}")


def codes_are_in_range(quantizer: Quantizer, case: FormatCase) -> None:
    """Codes and zeros are packed bytes whose padding is zero, and packing them again gives the same bytes."""
    for leaf in _quantized_leaves(_run(quantizer, case)):
        format = leaf.format
        require(leaf.codes.dtype == torch.uint8, f"expected packed uint8 codes; got {leaf.codes.dtype}")
        again = format.pack(format.unpack(leaf.codes, leaf.layout.stored))
        require(torch.equal(again, leaf.codes), f"expected codes of {format.code_bits} bits with zero padding")
        if leaf.zero is None:
            continue
        bits = int(format.code_bits)
        require(leaf.zero.dtype == torch.uint8, f"expected packed uint8 zero; got {leaf.zero.dtype}")
        again = pack(unpack(leaf.zero, bits, leaf.scale.shape[1]), bits)
        require(torch.equal(again, leaf.zero), f"expected zero of {bits} bits with zero padding")


def values_are_finite(quantizer: Quantizer, case: FormatCase) -> None:
    """The decoded matrix is finite."""
    finite = all_finite(dense64(_run(quantizer, case)))
    require(finite, "expected finite decoded values; got NaN or Inf")


def inputs_are_unchanged(quantizer: Quantizer, case: FormatCase) -> None:
    """Weight and second moment are as before."""
    held = {"weight": case.problem.weight, "stats.hessian": case.problem.stats.hessian}
    before = {name: tensor.clone() for name, tensor in held.items()}
    _run(quantizer, case)
    changed = [name for name, copy in before.items() if not torch.equal(copy, held[name])]
    require(not changed, f"expected unchanged inputs; {', '.join(changed)} changed in place")


def storage_is_what_the_format_says(quantizer: Quantizer, case: FormatCase) -> None:
    """Packed codes, scales in the format's bits (16 for ``"half"``), packed zeros when asymmetric: nothing else."""
    for leaf in _quantized_leaves(_run(quantizer, case)):
        require(leaf.format == case.format, f"expected codes in {case.format}; got {leaf.format}")
        expected = case.format.stored_bits(leaf.shape)
        require(
            leaf.storage_bits == expected,
            f"expected {expected} stored bits with {case.format.scales.bits} bits a scale; got {leaf.storage_bits}",
        )


def zero_gives_zero(quantizer: Quantizer, case: FormatCase) -> None:
    """The zero weight is reproduced exactly."""
    result = quantizer(torch.zeros_like(case.problem.weight), case.problem.stats, case.format)
    require(not bool(dense64(result).any()), "expected exact zeros for the case's weight times 0")


def zero_columns_stay_zero(quantizer: Quantizer, case: FormatCase) -> None:
    """Columns of zeros come back as exact zeros where inputs are uncorrelated and the format holds 0."""
    if not case.format.has_exact_zero:
        return
    weight = case.problem.weight.clone()
    weight[:, ::2] = 0
    result = quantizer(weight, _uncorrelated(case.problem.stats), case.format)
    require(
        not bool(dense64(result)[:, ::2].any()),
        "expected exact zeros in the columns set to zero (the even ones, with the diagonal of H)",
    )


def no_worse_than_zero(quantizer: Quantizer, case: FormatCase) -> None:
    """Where inputs are uncorrelated and the format holds 0, rounding costs at most what dropping the weight would."""
    if not case.format.has_exact_zero:
        return
    stats = _uncorrelated(case.problem.stats)
    weight = case.problem.weight.double()
    result = dense64(quantizer(case.problem.weight, stats, case.format))
    share = stats.hessian.diagonal()
    error, whole = float(((weight - result) ** 2 * share).sum()), float((weight**2 * share).sum())
    require(
        error <= whole * (1 + 1e-6),
        f"expected a squared error of at most {whole:.9g}, that of all zeros, in the diagonal of H; got {error:.9g}",
    )


def values_scale_with_the_weight(quantizer: Quantizer, case: FormatCase) -> None:
    """Four times the weight is rounded to four times the values, while scales keep their dtype."""
    weight, stats = case.problem.weight, case.problem.stats
    once, larger = _run(quantizer, case), quantizer(4 * weight, stats, case.format)
    if [t.dtype for t in once.tensors().values()] != [t.dtype for t in larger.tensors().values()]:
        return
    difference = float((dense64(larger) / 4 - dense64(once)).abs().max())
    require(
        difference <= 1e-6 * float(dense64(once).abs().max()),
        f"expected 4 times the values for 4 times the weight; they differ by 4 times {difference:.9g}",
    )


def nonfinite_is_refused(quantizer: Quantizer, case: FormatCase) -> None:
    """A weight with NaN or Inf raises a `TNCError`."""
    for value in (float("nan"), float("inf")):
        weight = case.problem.weight.clone()
        weight[-1, -1] = value
        try:
            quantizer(weight, case.problem.stats, case.format)
        except TNCError:
            continue
        require(False, f"expected a TNCError for a weight whose last entry is {value}; got a result")


def codes_are_nearest(quantizer: Quantizer, case: FormatCase) -> None:
    """Every entry is the nearest of all points of its grid; inside the grid's range, within half a step."""
    weight = case.problem.weight.double()
    for leaf in _quantized_leaves(_run(quantizer, case)):
        if isinstance(leaf.format, TrellisFormat):  # its points are sequences, not entries
            continue
        tiles, error = leaf.layout.tiles(weight), leaf.layout.tiles((weight - dense64(leaf)).abs())
        best = (tiles.unsqueeze(-1) - _points(leaf).unsqueeze(-2)).abs().nan_to_num(torch.inf).amin(-1)
        rounding = 4 * torch.finfo(torch.float32).eps * (2 * tiles.abs() + error)
        require(not bool((error > best + rounding).any()), "expected the nearest point of the grid for every entry")


def _points(leaf: Quantized) -> Tensor:
    """Every number that the codes can stand for, (block rows, groups, codes) float64; NaN where a code has none."""
    codes = torch.arange(leaf.format.levels).expand(*leaf.scale.shape, -1)
    zero = leaf.zeros().double().unsqueeze(-1) if leaf.format.has_zero else None
    return leaf.scales(torch.float64).unsqueeze(-1) * leaf.format.decode(codes, zero, torch.float64)


_LAWS: tuple[Law[Quantizer, FormatCase], ...] = (
    shape_is_kept, codes_are_in_range, values_are_finite, inputs_are_unchanged,
    storage_is_what_the_format_says, zero_gives_zero, zero_columns_stay_zero, no_worse_than_zero,
    values_scale_with_the_weight, nonfinite_is_refused,
)  # fmt: skip


def _run(quantizer: Quantizer, case: FormatCase) -> Expression:
    return quantizer(case.problem.weight, case.problem.stats, case.format)


def _uncorrelated(stats: LayerStats) -> LayerStats:
    return LayerStats.from_hessian(torch.diag(stats.inputs.diagonal), tokens=stats.tokens)


def _quantized_leaves(expression: Expression) -> Iterator[Quantized]:
    if isinstance(expression, Quantized):
        yield expression
    elif isinstance(expression, Sum | Product):
        for term in expression.terms:
            yield from _quantized_leaves(term)
