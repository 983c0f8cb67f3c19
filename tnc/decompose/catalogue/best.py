"""`best_at_bits`: a small portfolio at a given number of stored bits, the winner of each layer on held-out tokens."""

from __future__ import annotations

from collections.abc import Iterator

from tnc.decompose.catalogue.quantized import REFINE_SWEEPS
from tnc.decompose.recipes import Recipe, RecipeEntry, register_recipe
from tnc.decompose.sizes import BitsPerWeight, Size
from tnc.decompose.stages import LowRankStage, QuantizeStage
from tnc.decompose.transforms import InputRotation, OutputRotation, Transform
from tnc.errors import RecipeError
from tnc.formats import SUPPORTED_BITS, IntFormat, TrellisFormat

_GROUPS: tuple[int | None, ...] = (32, 64, 128, None)  # finest first: the first that fits the bits is taken
_FACTORS = IntFormat(4)
_ROTATED: tuple[Transform, ...] = (InputRotation(), OutputRotation())
_TRELLIS = (2, 3, 4)
# bits of state beyond those of a code: 5 to 10 % fewer nats than 12 in all, encoded in 1.4 to 3 times as long
_STATES = 12
_ROOM = 0.2  # bits a weight from which factors beside a trellis are tried
_MARGIN = 0.03  # of the predicted nats: choices within it made tnc-llama-27m no better (docs/recipes.md)
_SIGNS = 0.02  # bits a weight that the signs of two rotations may take; what is too much fails the limit


def _base_bits(bits: int, group: int | None) -> float:
    """Bits of codes, 16-bit scale and zero point a weight; rows are taken as long."""
    return bits + (0.0 if group is None else (16 + bits) / group)


def _fitting(limit: float, bits: int) -> list[int | None]:
    """Group sizes whose bits fit, finest first."""
    return [group for group in _GROUPS if _base_bits(bits, group) < limit]


def _candidates(limit: BitsPerWeight) -> Iterator[Recipe]:
    """In order of preference: the widest trellis that fits, rotated; integers, rotated where there is no trellis.

    Each also with 4-bit factors in what is left.
    """
    widths = [bits for bits in SUPPORTED_BITS if _fitting(limit.value, bits)]
    if not widths:
        raise RecipeError(f"best_at_bits({limit}) is below every base; ask for more than {min(SUPPORTED_BITS)} bits.")
    bits = widths[-1]
    coded = bits in _TRELLIS and bits + _SIGNS < limit.value
    if coded:
        stage = QuantizeStage(TrellisFormat(bits, _STATES + bits, path="diagonal"), method="yaqa")
        name = f"rotated trellis{bits}"
        if limit.value - bits > _ROOM:
            factors = LowRankStage(limit, factor_format=_FACTORS)
            yield Recipe(f"{name} + L×R", (stage, factors), transforms=_ROTATED)
        yield Recipe(name, (stage,), transforms=_ROTATED)
    for transforms, prefix in (((), ""),) if coded else ((_ROTATED, "rotated "), ((), "")):
        groups = _fitting(limit.value - (_SIGNS if transforms else 0.0), bits)
        for group in groups[:1]:
            yield _quantized(f"{prefix}int{bits} {_named(group)}", bits, group, transforms)
        for group in groups[1:2]:  # the finest group leaves no room for factors
            yield _compensated(f"{prefix}int{bits} {_named(group)} + L×R", bits, group, limit, transforms)
    yield _quantized(f"int{bits} {_named(None)}", bits, None, ())  # for widths that no group size divides


def _named(group: int | None) -> str:
    return "a row" if group is None else f"g{group}"


def _quantized(name: str, bits: int, group: int | None, transforms: tuple[Transform, ...]) -> Recipe:
    stage = QuantizeStage(IntFormat(bits, group), method="yaqa", refine=REFINE_SWEEPS)
    return Recipe(name, (stage,), transforms=transforms)


def _compensated(
    name: str, bits: int, group: int | None, limit: BitsPerWeight, transforms: tuple[Transform, ...]
) -> Recipe:
    base = QuantizeStage(IntFormat(bits, group), method="yaqa", refine=REFINE_SWEEPS)
    return Recipe(name, (base, LowRankStage(limit, factor_format=_FACTORS)), transforms=transforms)


def _best(*, rank: Size) -> Recipe:
    if not isinstance(rank, BitsPerWeight):
        raise RecipeError(f"best_at_bits(rank={rank!r}) needs BitsPerWeight(b): the bits of every layer.")
    return Recipe("", (), candidates=tuple(_candidates(rank)), limit=rank, margin=_MARGIN)


register_recipe(
    "best_at_bits",
    RecipeEntry(
        "two-sided rounding on a rotated trellis or integers, with 4-bit factors or not: what held-out tokens prefer",
        "arXiv:2505.22988, arXiv:2406.11235, arXiv:2405.18886; MATH.md section 0", ("rank",), _best,
    ),
)  # fmt: skip
