"""Number formats and exact bit packing."""

from tnc.formats.number import SUPPORTED_BITS, IntFormat
from tnc.formats.packing import pack, packed_length, unpack

__all__ = ["SUPPORTED_BITS", "IntFormat", "pack", "packed_length", "unpack"]
