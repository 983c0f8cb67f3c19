"""`Quantized`: packed integer codes with group scales and zeros."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import linear

from tnc.errors import ShapeError
from tnc.formats import IntFormat, pack, packed_length, unpack
from tnc.terms.base import Expression, Spec, register, wide


@register
@dataclass(frozen=True, eq=False)
class Quantized(Expression):
    """``scale * (code - zero)`` for groups of consecutive input columns (MATH.md section 2).

    Attributes:
        codes: (out_features, packed_length(in_features, bits)) uint8.
        scale: (out_features, groups), a 16-bit or wider float dtype.
        zero: (out_features, packed_length(groups, bits)) uint8, or ``None`` when symmetric.
        format: the number format.
        in_features: columns of the matrix (the packed rows may be padded).
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    format: IntFormat
    in_features: int
    kind: ClassVar[str] = "quantized"

    def __post_init__(self) -> None:
        rows, columns = self.shape
        groups = columns // self.format.group_of(columns)
        expected = {
            "codes": (rows, packed_length(columns, self.format.bits)),
            "scale": (rows, groups),
            "zero": None if self.format.symmetric else (rows, packed_length(groups, self.format.bits)),
        }
        for name, shape in expected.items():
            tensor: Tensor | None = getattr(self, name)
            if (None if tensor is None else tuple(tensor.shape)) != shape:
                raise ShapeError(
                    f"Quantized {name} has shape {None if tensor is None else tuple(tensor.shape)}; expected {shape} "
                    f"for a weight {self.shape} in {self.format}."
                )

    @classmethod
    def from_codes(cls, codes: Tensor, scale: Tensor, zero: Tensor | None, format: IntFormat) -> Quantized:
        """Pack codes (out, in) and zeros (out, groups) of integer values; ``zero`` is ignored when symmetric."""
        packed_zero = None if format.symmetric or zero is None else pack(zero, format.bits)
        return cls(pack(codes, format.bits), scale, packed_zero, format, codes.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.codes.shape[0], self.in_features

    def integer_codes(self) -> Tensor:
        """(out_features, in_features) uint8."""
        return unpack(self.codes, self.format.bits, self.shape[1])

    def zeros(self) -> Tensor:
        """Zero points (out_features, groups), in the dtype of ``scale``."""
        if self.zero is None:
            return self.scale.new_full(self.scale.shape, self.format.levels // 2)
        return unpack(self.zero, self.format.bits, self.scale.shape[1]).to(self.scale.dtype)

    def to_dense(self) -> Tensor:
        """The dequantized matrix, at least float32."""
        dtype = wide(self.scale)
        codes = self.integer_codes().to(dtype).reshape(self.shape[0], self.scale.shape[1], -1)
        dense = self.scale.to(dtype).unsqueeze(-1) * (codes - self.zeros().to(dtype).unsqueeze(-1))
        return dense.reshape(self.shape)

    def linear(self, x: Tensor) -> Tensor:
        """``x @ to_dense().T``; the weight is rounded once to the dtype of ``x``."""
        return linear(x, self.to_dense().to(x.dtype))

    def tensors(self) -> dict[str, Tensor]:
        """``codes``, ``scale`` and, unless symmetric, ``zero``."""
        stored = {"codes": self.codes, "scale": self.scale}
        return stored if self.zero is None else {**stored, "zero": self.zero}

    def spec(self) -> Spec:
        """Kind, shape and number format."""
        return {"kind": self.kind, "shape": list(self.shape), "format": {"type": "int", **asdict(self.format)}}

    @classmethod
    def from_parts(cls, spec: Spec, tensors: Mapping[str, Tensor]) -> Quantized:
        """Inverse of (`spec`, `tensors`)."""
        fields = {k: v for k, v in spec["format"].items() if k != "type"}
        return cls(tensors["codes"], tensors["scale"], tensors.get("zero"), IntFormat(**fields), spec["shape"][1])
