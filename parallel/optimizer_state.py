"""Describes what an optimizer keeps for each parameter.

Strategies, checkpoints, a resume and the estimates of memory go by this description, so that a new
optimizer needs only its own. It imports no torch, since the planner counts the bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from parallel.config import Dtype


@dataclass(frozen=True)
class Slot:
    """Describes a tensor that is kept for each trained parameter, and has its shape.

    Attributes:
        name: Name in the optimizer's own state, the same in torch and in DeepSpeed.
        dtype: Type of its elements.
    """

    name: str
    dtype: Dtype = Dtype.float32

    def entry(self, parameter: str) -> str:
        """Returns the name in checkpoints of the tensor that belongs to `parameter`."""
        return f"optim.{parameter}.{self.name}"


@dataclass(frozen=True)
class OptimizerState:
    """Describes the state of an optimizer.

    Attributes:
        slots: Tensors that checkpoints hold; zero before the first update.
        step: Name of the scalar that counts updates of a parameter. Checkpoints do not hold it,
            since every parameter has as many as the run has steps.
    """

    slots: tuple[Slot, ...]
    step: str

    @property
    def num_bytes(self) -> int:
        """Bytes for each element of a trained parameter."""
        return sum(slot.dtype.num_bytes for slot in self.slots)


ADAMW = OptimizerState(slots=(Slot("exp_avg"), Slot("exp_avg_sq")), step="step")
