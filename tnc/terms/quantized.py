"""`Quantized`: packed codes with the scales of their blocks, in any number format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from tnc.errors import FormatError, ShapeError
from tnc.formats import Layout, NumberFormat, format_from_spec, pack, packed_length, unpack
from tnc.terms.base import Expression, Spec, register, wide


@register
@dataclass(frozen=True, eq=False)
class Quantized(Expression):
    """``scale * level`` with the level that a code names (MATH.md section 2); ``code - zero`` for integers.

    Attributes:
        codes: (out_features, bytes of a row) uint8, packed as the format says, padding columns included.
        scale: (block rows, groups): (out_features, groups) in most formats; a float dtype, or bytes under a
            second level.
        zero: (out_features, packed groups) uint8, or ``None`` for formats without stored zero points.
        format: the number format.
        in_features: columns of the matrix (the packed rows may be padded).
        outer: second-level float scales, or ``None`` for formats with one level.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    format: NumberFormat
    in_features: int
    outer: Tensor | None = None
    kind: ClassVar[str] = "quantized"

    def __post_init__(self) -> None:
        layout, format = self.layout, self.format
        down, across = layout.blocks
        expected = {
            "codes": (self.shape[0], format.packed_length(layout.stored)),
            "scale": (down, across),
            "zero": (down, packed_length(across, int(format.code_bits))) if format.has_zero else None,
            "outer": format.scales.outer_shape((down, across)),
        }
        for name, shape in expected.items():
            tensor: Tensor | None = getattr(self, name)
            if (None if tensor is None else tuple(tensor.shape)) != shape:
                raise ShapeError(
                    f"Quantized {name} has shape {None if tensor is None else tuple(tensor.shape)}; expected {shape} "
                    f"for a weight {self.shape} in {self.format}."
                )

    @classmethod
    def from_codes(
        cls, codes: Tensor, scale: Tensor, zero: Tensor | None, format: NumberFormat, outer: Tensor | None = None
    ) -> Quantized:
        """Pack codes (out, in) and zeros (out, groups) of integer values.

        Args:
            codes: (out_features, in_features), without padding columns.
            scale: (block rows, groups) as stored.
            zero: (out_features, groups); ignored by formats without stored zero points.
            format: number format.
            outer: second-level scales of formats that have them.
        """
        rows, columns = codes.shape
        packed_zero = pack(zero, int(format.code_bits)) if format.has_zero and zero is not None else None
        stored = pad(codes, (0, format.layout((rows, columns)).stored - columns))
        return cls(format.pack(stored), scale, packed_zero, format, columns, outer)

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.codes.shape[0], self.in_features

    @property
    def layout(self) -> Layout:
        """Which entries share a scale."""
        return self.format.layout(self.shape)

    def integer_codes(self) -> Tensor:
        """(out_features, in_features) uint8."""
        return self._stored_codes()[:, : self.in_features]

    def scales(self, dtype: torch.dtype | None = None) -> Tensor:
        """Real scales (block rows, groups), both levels multiplied; at least float32 by default."""
        kind, outer = self.format.scales, self.outer
        spread = None if outer is None else kind.spread(outer, self.layout.blocks)
        return kind.load(self.scale, spread, self._dtype() if dtype is None else dtype)

    def zeros(self) -> Tensor:
        """Zero points of integer formats (out_features, groups), in the dtype of ``scale`` where that is a float.

        Raises:
            FormatError: for formats that have none.
        """
        dtype = self.scale.dtype if self.scale.is_floating_point() else torch.float32
        if self.zero is not None:
            return unpack(self.zero, int(self.format.code_bits), self.scale.shape[1]).to(dtype)
        if self.format.middle is None:
            raise FormatError(f"{self.format.describe()} has no zero points; expected an integer format.")
        return torch.full_like(self.scale, self.format.middle, dtype=dtype)

    def to_dense(self) -> Tensor:
        """The dequantized matrix, at least float32."""
        dtype, layout, codes = self._dtype(), self.layout, self._stored_codes()
        if self.format.group_rows != 1:
            return self.format.decode(codes, None, dtype) * layout.spread(self.scales(dtype))
        grouped = codes.reshape(*layout.blocks, layout.columns)
        zero = self.zeros().unsqueeze(-1) if self.format.has_zero else None
        dense = self.scales(dtype).unsqueeze(-1) * self.format.decode(grouped, zero, dtype)
        return dense.reshape(codes.shape)[:, : self.in_features]

    def linear(self, x: Tensor) -> Tensor:
        """``x @ to_dense().T``; the weight is rounded once to the dtype of ``x``."""
        return linear(x, self.to_dense().to(x.dtype))

    def tensors(self) -> dict[str, Tensor]:
        """``codes``, ``scale`` and, where the format has them, ``zero`` and ``outer``."""
        optional = {"zero": self.zero, "outer": self.outer}
        stored = {"codes": self.codes, "scale": self.scale}
        return {**stored, **{name: tensor for name, tensor in optional.items() if tensor is not None}}

    def spec(self) -> Spec:
        """Kind, shape and number format."""
        return {"kind": self.kind, "shape": list(self.shape), "format": self.format.spec()}

    @classmethod
    def from_parts(cls, spec: Spec, tensors: Mapping[str, Tensor]) -> Quantized:
        """Inverse of (`spec`, `tensors`)."""
        format = format_from_spec(spec["format"])
        return cls(
            tensors["codes"], tensors["scale"], tensors.get("zero"), format, spec["shape"][1], tensors.get("outer")
        )

    def _dtype(self) -> torch.dtype:
        """At least float32; float64 where only bytes are stored, which `cast` cannot widen."""
        floats = [t for t in (self.scale, self.outer) if t is not None and t.is_floating_point()]
        return wide(*floats) if floats else torch.float64

    def _stored_codes(self) -> Tensor:
        return self.format.unpack(self.codes, self.layout.stored)
