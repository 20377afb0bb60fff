"""Gaussian noise as a layer, with a standard deviation for every feature."""

import torch
from torch import Tensor, nn

from pyml.ops import _check, hetero_noise
from pyml.ops import _hetero_noise_arguments as arguments
from pyml.privacy import new_key


class HeteroNoise(nn.Module):
    """Adds ``std * scale * z`` to its input in training, and does nothing in eval mode.

    A regulariser. It makes nothing private: for that, gradients need noise (`pyml.optim.HeteroNoiseOptimizer`).

    Args:
        std: standard deviation where the scale is 1, >= 0.
        scale: a number, or a tensor of the shape of one sample; as an `nn.Parameter` it is trained.
        seed: fixes the noise; by default the key comes from the operating system, not from torch's generator.

    Shapes: ``[B, *shape of the scale]``, or any shape where the scale is a number -> the same.
    Dtype: float32, float64, bfloat16 or float16.
    State: the key, and the number of the next call, so that a resumed training goes on with new noise.

    Every call in training has noise of its own: a layer that is computed again for its gradient (activation
    checkpointing) gets other noise than the first time.

    Raises:
        ValueError, TypeError: one sentence naming the argument, what was expected and what came.
    """

    key: Tensor
    scale: Tensor

    def __init__(self, std: float, scale: float | Tensor = 1.0, *, seed: int | None = None) -> None:
        super().__init__()
        arguments.check_std("HeteroNoise", std)
        if not isinstance(scale, Tensor):
            arguments.number("HeteroNoise", "scale", scale, "a finite number of at least 0, or a tensor", 0.0)
            scale = torch.tensor(float(scale))
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**63):
            _check.fail("HeteroNoise", "seed", "None, or an integer of 64 bits", repr(seed))
        self.std, self.step = std, 0
        self.register_buffer("key", new_key() if seed is None else torch.tensor([seed], dtype=torch.int64))
        if isinstance(scale, nn.Parameter):
            self.register_parameter("scale", scale)
        else:
            _check.tensors("HeteroNoise", scale, first_name="scale")
            self.register_buffer("scale", scale.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        columns, scale = None, self.scale
        if scale.dim():
            _check.tensors("HeteroNoise", x)
            if x.dim() != scale.dim() + 1 or x.shape[1:] != scale.shape:
                _check.fail("HeteroNoise", "x", f"[B, *{list(scale.shape)}]", list(x.shape))
            columns, scale = scale.flatten(), scale.new_ones(x.shape[0])  # samples are rows, features are columns
        step, self.step = self.step, (self.step + 1) % arguments.WORD
        return hetero_noise(x, scale, self.std, key=self.key, step=step, columns=columns)

    def get_extra_state(self) -> Tensor:
        """The number of the next call, as a tensor, which every format of checkpoints keeps."""
        return torch.tensor(self.step)

    def set_extra_state(self, state: Tensor) -> None:
        """Go on from a saved call."""
        arguments.whole("HeteroNoise", "step of the state", int(state), arguments.WORD)
        self.step = int(state)

    def extra_repr(self) -> str:
        return f"std={self.std}, scale={list(self.scale.shape) if self.scale.dim() else float(self.scale)}"
