"""How a weight is written down: in which numbers, and with how many scales. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Number(Enum):
    """What a quantized weight is made of."""

    int = "int"
    float8 = "float8"  # e4m3, one sign, four exponent and three mantissa bits


class Activation(Enum):
    """In which numbers a layer's input is rounded when the model runs: a scale a token."""

    none = "none"
    int8 = "int8"
    float8 = "float8"


@dataclass(frozen=True)
class Scheme:
    """Of one weight matrix (out, in).

    Attributes:
        number: Of what the codes are.
        bits: Of a code.
        group_size: Consecutive inputs that share a scale; None: all of a row.
        symmetric: Zero is in the middle of the codes; otherwise a zero point a group says where.
        activation: Of the layer's input.
    """

    number: Number = Number.int
    bits: int = 8
    group_size: int | None = None
    symmetric: bool = True
    activation: Activation = Activation.none

    def groups(self, num_inputs: int) -> int:
        """Scales of a row."""
        return 1 if self.group_size is None else num_inputs // self.group_size

    def bytes_of(self, num_outputs: int, num_inputs: int, scale_bytes: int) -> float:
        """Size of a packed matrix, its scales and zero points counted."""
        scales = num_outputs * self.groups(num_inputs)
        zero_points = 0.0 if self.symmetric else scales * self.bits / 8
        return num_outputs * num_inputs * self.bits / 8 + scales * scale_bytes + zero_points

    def describe(self) -> dict[str, object]:
        """JSON types only."""
        return {
            "number": self.number.value,
            "bits": self.bits,
            "group_size": self.group_size,
            "symmetric": self.symmetric,
            "activation": self.activation.value,
        }

    @classmethod
    def parse(cls, described: dict[str, object]) -> Scheme:
        """What `describe` wrote."""
        bits, group_size = described["bits"], described["group_size"]
        assert isinstance(bits, int) and isinstance(group_size, int | None)
        return cls(
            Number(described["number"]),
            bits,
            group_size,
            bool(described["symmetric"]),
            Activation(described["activation"]),
        )
