"""Describes how a weight is quantized: number format, bits and scales. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Number(Enum):
    """Number format of a quantized weight."""

    int = "int"
    float8 = "float8"  # e4m3: one sign, four exponent and three mantissa bits


class Activation(Enum):
    """Number format to which a layer's input is rounded at run time, with one scale a token."""

    none = "none"
    int8 = "int8"
    float8 = "float8"


@dataclass(frozen=True)
class Scheme:
    """Quantization of one weight matrix (outputs, inputs).

    Attributes:
        number: Number format of the codes.
        bits: Bits of a code.
        group_size: Number of consecutive inputs that share a scale; None: all inputs of a row.
        symmetric: True if code 0 stands for the value 0; otherwise each group has a zero point.
        activation: Number format to which the layer's input is rounded.
    """

    number: Number = Number.int
    bits: int = 8
    group_size: int | None = None
    symmetric: bool = True
    activation: Activation = Activation.none

    def groups(self, num_inputs: int) -> int:
        """Returns the number of scales of a row."""
        return 1 if self.group_size is None else num_inputs // self.group_size

    def bytes_of(self, num_outputs: int, num_inputs: int, scale_bytes: int) -> float:
        """Returns the bytes of a packed matrix, including scales and zero points."""
        scales = num_outputs * self.groups(num_inputs)
        zero_points = 0.0 if self.symmetric else scales * self.bits / 8
        return num_outputs * num_inputs * self.bits / 8 + scales * scale_bytes + zero_points

    def describe(self) -> dict[str, object]:
        """Returns the scheme as JSON types."""
        return {
            "number": self.number.value,
            "bits": self.bits,
            "group_size": self.group_size,
            "symmetric": self.symmetric,
            "activation": self.activation.value,
        }

    @classmethod
    def parse(cls, described: dict[str, object]) -> Scheme:
        """Returns the scheme that `describe` wrote."""
        bits, group_size = described["bits"], described["group_size"]
        assert isinstance(bits, int) and isinstance(group_size, int | None)
        return cls(
            Number(described["number"]),
            bits,
            group_size,
            bool(described["symmetric"]),
            Activation(described["activation"]),
        )
