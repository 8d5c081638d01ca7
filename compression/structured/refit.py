"""Fits the remaining layers of a pruned model to the parent.

The child runs beside the parent, block by block. Its `o_proj`, then its `down_proj` is fitted so
that its residual stream is as close as possible to the parent's, including errors of earlier
blocks. The fit has a closed form, as in SliceGPT and FLAP.

Shapes: N samples of T tokens, H hidden size of the parent, C of the child, O outputs and I inputs
of a layer of the child.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compression.hidden import Hidden, embed
from compression.stream import BlockStream
from compression.structured.plan import Plan

# Layer that writes to the residual stream -> norm that reads the stream which it adds to.
_WRITERS = {"self_attn.o_proj": "input_layernorm", "mlp.down_proj": "post_attention_layernorm"}


class Flow:
    """The residual streams of parent and child, on disk.

    Args:
        plan: Plan of the pruning.
        stream: Stream of the parent.
        calibration: Token ids (N, T) int64.
        channels: Channels of the parent that the child keeps (C).
    """

    def __init__(
        self, plan: Plan, stream: BlockStream, calibration: Tensor, channels: Tensor
    ) -> None:
        self._plan, self._stream, self._channels = plan, stream, channels
        self._calibration = calibration
        self._parent, self._child = self._of_parent(0), self._of_child(0)
        self._wanted: dict[str, Hidden] = {}  # layer that writes -> the parent's stream after it

    def resume(self, place: int, index: int) -> bool:
        """Returns whether the files of a stopped call allow to continue before a block.

        Args:
            place: Number of the parent's next block.
            index: Number of the child's next block.
        """
        self._parent, self._child = self._of_parent(place), self._of_child(index)
        return self._parent.path.exists() and self._child.path.exists()

    def start(self) -> None:
        """Starts before the first block, with the embeddings of parent and child."""
        self._parent, self._child = self._of_parent(0), self._of_child(0)
        self._stream.load_embedding()
        width = self._parent.shape[2]
        embed(self._calibration, self._stream.embed, self._parent.path, width)
        self._child.write(batch[..., self._channels] for batch in self._parent.batches())

    def pass_by(self, place: int) -> None:
        """Runs a loaded block of the parent that the child does not have."""
        following = self._of_parent(place + 1).path
        self._parent = self._parent.map(partial(self._stream.run, place), following)

    def see_parent(self, place: int, block: nn.Module) -> None:
        """Runs a loaded block of the parent before it is cut, and keeps its residual stream."""
        middle = Hidden(self._plan.work / "middle.bin", self._parent.shape)
        with middle.path.open("wb") as file:

            def write(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                file.write(args[0].contiguous().numpy().tobytes())

            norm = block.get_submodule("post_attention_layernorm")
            # The input of this norm is the residual stream after attention.
            handle = norm.register_forward_pre_hook(write)
            self.pass_by(place)
            handle.remove()
        self._wanted = {"self_attn.o_proj": middle, "mlp.down_proj": self._parent}

    def refit(self, place: int, block: nn.Module) -> None:
        """Fits the layers of a block that was cut."""
        for name, wanted in self._wanted.items():
            layer: Any = block.get_submodule(name)
            seen: dict[str, Tensor] = {}
            handles = [
                block.get_submodule(module).register_forward_pre_hook(_keep_in(seen, what))
                for module, what in ((name, "input"), (_WRITERS[name], "stream"))
            ]
            # `down_proj` is fitted after `o_proj`, on inputs that the fitted `o_proj` causes.
            fit = LeastSquares(*layer.weight.shape)
            for batch, target in zip(self._child.batches(), wanted.batches(), strict=True):
                self._stream.run(place, batch)
                y = target[..., self._channels] - seen["stream"]
                fit.add(seen["input"], y if layer.bias is None else y - layer.bias)
            for handle in handles:
                handle.remove()
            layer.weight.data = fit.solve(layer.weight.data, self._plan.config.damping)

    def run_child(self, place: int, index: int) -> None:
        """Runs the child's block."""
        following = self._of_child(index + 1).path
        self._child = self._child.map(partial(self._stream.run, place), following)

    def tidy(self) -> None:
        """Removes files that are not needed once the block is written."""
        for path in self._plan.work.glob("*.bin"):
            if path not in (self._parent.path, self._child.path):
                path.unlink()

    def _of_parent(self, place: int) -> Hidden:
        path = self._plan.work / f"parent-{place:05d}.bin"
        return Hidden(path, (*self._calibration.shape, self._plan.family.shape.hidden))

    def _of_child(self, index: int) -> Hidden:
        path = self._plan.work / f"child-{index:05d}.bin"
        return Hidden(path, (*self._calibration.shape, self._plan.shape.hidden))


class LeastSquares:
    """Least-squares fit of a layer's weight to given inputs and wanted outputs.

    Args:
        outputs: Number of outputs O.
        inputs: Number of inputs I.
    """

    def __init__(self, outputs: int, inputs: int) -> None:
        self._gram = torch.zeros(inputs, inputs)
        self._cross = torch.zeros(inputs, outputs)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Adds inputs (..., I) and the outputs that are wanted for them (..., O)."""
        x, y = x.flatten(0, -2), y.flatten(0, -2)
        self._gram.addmm_(x.T, x)
        self._cross.addmm_(x.T, y)

    def solve(self, weight: Tensor, damping: float) -> Tensor:
        """Returns the W that minimizes `|X W^T - Y|^2 + d |W - weight|^2`: (O, I).

        Args:
            weight: Weight (O, I) that W stays close to.
            damping: d as a share of the mean squared input.
        """
        # In double: the Gram matrix of correlated channels is close to singular.
        gram, cross = self._gram.double(), self._cross.double()
        d = damping * gram.diagonal().mean().clamp_min(1e-12)
        gram.diagonal().add_(d)
        factor = torch.linalg.cholesky(gram)
        return torch.cholesky_solve(cross + d * weight.T.double(), factor).T.float()


def _keep_in(seen: dict[str, Tensor], what: str) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen[what] = args[0]

    return hook
