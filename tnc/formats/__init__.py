"""Number formats and exact bit packing."""

from tnc.formats.integer import SUPPORTED_BITS, IntFormat
from tnc.formats.layout import Layout
from tnc.formats.named import FORMATS, number_format
from tnc.formats.number import NumberFormat, format_from_spec, register_format
from tnc.formats.packing import pack, pack_ternary, packed_length, unpack, unpack_ternary
from tnc.formats.scale import SCALES, FloatScale, ScaleFormat, scale_format
from tnc.formats.table import TableFormat
from tnc.formats.tables import TABLES, table_values
from tnc.formats.trellis import CODES, TrellisFormat

__all__ = [
    "CODES", "FORMATS", "SCALES", "SUPPORTED_BITS", "TABLES", "FloatScale", "IntFormat", "Layout", "NumberFormat",
    "ScaleFormat", "TableFormat", "TrellisFormat", "format_from_spec", "number_format", "pack", "pack_ternary",
    "packed_length", "register_format", "scale_format", "table_values", "unpack", "unpack_ternary",
]  # fmt: skip
