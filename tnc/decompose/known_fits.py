"""What decompositions of one layer by several recipes have in common, computed once.

Candidates of a recipe often begin alike: the same change of basis, and in it the same quantized base, alone and with
factors on what it leaves over. In the first sweep a fit depends on the stages before it only, so what is fitted for
one candidate is what the next one would fit.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tnc.decompose.stages import Fitted, Stage, Target
from tnc.decompose.transforms import Transform, Transformed, apply_transforms
from tnc.stats import LayerStats


class KnownFits:
    """The inner problem of the transforms that were asked for last, and the fits of first sweeps in it.

    Args:
        weight: (m, n) of the layer.
        stats: its statistics on the device of the weight, or ``None``.
    """

    @classmethod
    def of(cls, weight: Tensor, stats: LayerStats | None) -> KnownFits:
        """Nothing yet, of a layer whose statistics may be elsewhere."""
        return cls(weight, None if stats is None else stats.to(weight.device))

    def __init__(self, weight: Tensor, stats: LayerStats | None) -> None:
        self.weight = weight
        self.stats = stats
        self._inner: tuple[tuple[Transform, ...], Transformed] | None = None
        self._fits: list[tuple[tuple[Stage, ...], int, Fitted]] = []

    def inner(self, transforms: Sequence[Transform]) -> Transformed:
        """The problem behind the transforms; other transforms drop what is known of those before."""
        asked = tuple(transforms)
        if self._inner is None or self._inner[0] != asked:
            self._inner, self._fits = None, []  # frees the old before the new is made
            self._inner = asked, apply_transforms(self.weight, asked, self.stats)
        return self._inner[1]

    def fit(self, stages: Sequence[Stage], target: Target) -> Fitted:
        """The fit of the last of ``stages`` after the others, in the first sweep of the last inner problem."""
        asked = tuple(stages), target.spent_bits
        for *key, found in self._fits:
            if tuple(key) == asked:
                return found
        found = asked[0][-1].fit(target)
        self._fits.append((*asked, found))
        return found
