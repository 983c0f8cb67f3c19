"""What a planner may choose from, as data: bases, ranks, formats of the low-rank factors.

A layer's `Choice` is one base, one rank and one factor format. Bases are stages, so that any quantizer or form of the
library can be an entry; the portfolio of a plan travels in its file and is rebuilt from there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from tnc.decompose import (
    DenseStage,
    FactorFormats,
    LowRankStage,
    MpoStage,
    QuantizeStage,
    Recipe,
    Stage,
    Transform,
)
from tnc.errors import BudgetError
from tnc.formats import IntFormat, NumberFormat
from tnc.planning.base import (
    Base,
    base_from_json,
    base_to_json,
    format_from_json,
    format_to_json,
    named_base,
)

DENSE = "dense"
NONE = "none"
PLAIN = "16"  # factors in the dtype of the model


@dataclass(frozen=True, slots=True)
class Choice:
    """What one layer becomes.

    Attributes:
        base: a name of the portfolio's bases; ``"none"`` is a low-rank term alone.
        rank: of the low-rank term; 0 is none.
        factors: a name of the portfolio's factor formats.
        shared: whether the right factor is one tensor for all layers that see this layer's input.
    """

    base: str
    rank: int = 0
    factors: str = PLAIN
    shared: bool = False

    def describe(self) -> str:
        """For example ``int3-g64 + rank 16 @ 8``, or ``int3-g64 + shared rank 16 @ 8``."""
        term = f"{'shared ' if self.shared else ''}rank {self.rank} @ {self.factors}"
        if self.base == NONE:
            return term
        return self.base if self.rank == 0 else f"{self.base} + {term}"


@dataclass(frozen=True)
class Portfolio:
    """Bases × ranks × factor formats.

    Attributes:
        bases: by name.
        factors: number format of the low-rank factors by name; ``None`` is the dtype of the model.
        rank_step: ranks are multiples of it.
        max_rank: no larger one is tried; ranks that store as much as the dense layer never are.
        factor_ranks: the ranks tried with rounded factors, each of which is a fit of its own.
        shared: whether one right factor for the layers that see one input is tried too, on bases without transforms:
            with plain factors at every rank, with rounded ones at ``factor_ranks``.
    """

    bases: Mapping[str, Base]
    factors: Mapping[str, NumberFormat | None] = field(default_factory=lambda: {PLAIN: None})
    rank_step: int = 8
    max_rank: int = 512
    factor_ranks: tuple[int, ...] = (8, 16, 32, 64)
    shared: bool = False

    def __post_init__(self) -> None:
        if not self.bases or not self.factors or self.rank_step < 1 or self.max_rank < 0:
            raise BudgetError(
                f"a portfolio of {len(self.bases)} bases, {len(self.factors)} factor formats, rank_step="
                f"{self.rank_step} and max_rank={self.max_rank} offers nothing; use Portfolio.default()."
            )

    @classmethod
    def default(
        cls, *, group_sizes: tuple[int | None, ...] = (64, None), factor_bits: tuple[int, ...] = (16, 8, 4),
        method: str = "gptq", refine: int = 0, transforms: tuple[Transform, ...] = (), formats: tuple[str, ...] = (),
        shared: bool = True,
    ) -> Portfolio:  # fmt: skip
        """Dense, int8, int4, int3 and int2 bases, low rank on them and alone, factors of 16, 8 and 4 bits.

        Args:
            group_sizes: input columns that share a scale, each an own base; ``None`` is one group a row, which fits
                every layer. A group size that does not divide a layer's width is left out for that layer.
            factor_bits: 16 is the dtype of the model, others are integer formats with one group a row.
            method: of the integer bases, a name of `tnc.quant.QUANTIZERS`.
            refine: sweeps of refinement of the integer bases.
            transforms: around the integer bases below 8 bits and their low-rank terms.
            formats: names of `tnc.formats.FORMATS` that are bases besides, each with its own group size. Trellises
                are made for near Gaussian entries and are rotated on both sides, and with ``method="yaqa"`` rounded in
                ``G ⊗ H``; the others are as the integer bases.
            shared: whether layers that see one input may share a right factor.

        Raises:
            FormatError: for an unknown format name.
        """
        bases = {DENSE: Base(DenseStage(), compensated=False), NONE: Base(None)}
        for bits in (8, 4, 3, 2):
            around, sweeps = (transforms, refine) if bits < 8 else ((), 0)
            for group in group_sizes:
                name = f"int{bits}-row" if group is None else f"int{bits}-g{group}"
                stage = QuantizeStage(IntFormat(bits, group_size=group), method=method, refine=sweeps)
                bases[name] = Base(stage, compensated=bits < 8, transforms=around)
        for name in formats:
            bases[name] = named_base(name, method, refine, transforms)
        factors = {str(b): None if b == int(PLAIN) else IntFormat(b) for b in factor_bits}
        return cls(bases, factors, shared=shared)

    @property
    def rounded(self) -> dict[str, FactorFormats]:
        """The factor formats that round, by name: all but that of the model's dtype."""
        return {name: FactorFormats.of(each) for name, each in self.factors.items() if each is not None}

    @property
    def factor_names(self) -> tuple[str, ...]:
        """What choices may name: the factor formats, and the plain one, which a choice without factors has anyway."""
        return tuple(dict.fromkeys((*self.factors, PLAIN)))

    def plain_ranks(self, most: int) -> range:
        """Ranks tried with factors in the model's dtype, up to ``most``; none where the portfolio has no such ones."""
        largest = min(most, self.max_rank) if PLAIN in self.factors else 0
        return range(self.rank_step, largest + 1, self.rank_step)

    def ranks_within(self, formats: FactorFormats, shape: tuple[int, int], most: int, room: int) -> list[int]:
        """Ranks tried with rounded factors of a matrix ``shape``, up to ``most``, that take less than ``room`` bits."""
        ranks = [k for k in self.factor_ranks if k <= min(most, self.max_rank) and formats.fits(k)]
        return [k for k in ranks if formats.stored_bits(shape, k) < room]

    def stages(self, choice: Choice, dtype: torch.dtype | None = None) -> tuple[Stage, ...]:
        """The stages that make a choice.

        Args:
            choice: with names of this portfolio.
            dtype: of dense layers and plain factors; ``None`` is that of the weight.

        Raises:
            BudgetError: for a base or factor format that the portfolio does not have; lists those it has.
        """
        self.check(choice)
        stage = self.bases[choice.base].stage
        if isinstance(stage, DenseStage | MpoStage) and stage.dtype is None:
            stage = replace(stage, dtype=dtype)
        stages: tuple[Stage, ...] = () if stage is None else (stage,)
        if choice.rank or not stages:
            formats = self.factors[choice.factors] if choice.rank else None
            stages = (*stages, LowRankStage(choice.rank, dtype=dtype, factor_format=formats))
        return stages

    def recipe(self, choice: Choice, dtype: torch.dtype | None = None) -> Recipe:
        """The choice as a recipe; arguments and errors as `stages`."""
        stages = self.stages(choice, dtype)
        around = self.bases[choice.base].transforms
        return Recipe(choice.describe(), stages, transforms=around, shared_inputs=choice.shared)

    def check(self, choice: Choice) -> None:
        """Raise `BudgetError` unless the portfolio has the names of a choice, and what is shared can be."""
        factors = self.factors if choice.rank else self.factor_names
        for kind, name, known in (("base", choice.base, self.bases), ("factor format", choice.factors, factors)):
            if name not in known:
                raise BudgetError(
                    f"{kind} {name!r} is not in the portfolio of this plan; expected one of {', '.join(known)}."
                )
        if choice.shared and (not choice.rank or self.bases[choice.base].transforms):
            raise BudgetError(
                f"{choice.describe()} cannot share a right factor: that takes a rank of at least 1 and a base without "
                "transforms, which differ by layer. Set shared to false."
            )

    def to_json(self) -> dict[str, Any]:
        """JSON-able description.

        Raises:
            BudgetError: for a base whose stage has no description in files.
        """
        return {
            "bases": {name: base_to_json(name, base) for name, base in self.bases.items()},
            "factors": {name: format_to_json(each) for name, each in self.factors.items()},
            "rank_step": self.rank_step, "max_rank": self.max_rank, "factor_ranks": list(self.factor_ranks),
            "shared": self.shared,
        }  # fmt: skip

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Portfolio:
        """Inverse of `to_json`.

        Raises:
            BudgetError: for a description that this version does not know; names the entry.
        """
        bases = {name: base_from_json(name, each) for name, each in fields["bases"].items()}
        factors = {name: format_from_json(name, each) for name, each in fields["factors"].items()}
        sizes = int(fields["rank_step"]), int(fields["max_rank"]), tuple(fields["factor_ranks"])
        return cls(bases, factors, *sizes, shared=bool(fields.get("shared", False)))
