"""Ghost clipping: norms of the gradients of records, and their clipped sum, without the gradients themselves."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pyml.ops import _check
from pyml.optim._records import OP, Records
from pyml.optim._scales import Scales
from pyml.optim.hetero_noise import HeteroNoiseOptimizer
from pyml.privacy import secure_noise


class GhostNoiseOptimizer(HeteroNoiseOptimizer):
    """`HeteroNoiseOptimizer` for models whose per-sample gradients do not fit in memory; `make_private` sets it up.

    In the loop `backward` takes the place of ``loss.backward()``: it finds the norms of the gradients of the records,
    layer by layer, and then the sum of the clipped ones. What is released has the same distribution. Norms and sum are
    made of what Opacus' hooks see, each of the same numbers, so no use of a weight that they miss can leave the clip;
    where a linear layer, an embedding or a convolution has such uses, `backward` refuses them. Layers of other kinds
    keep the gradients of records until `backward` ends.

    Less is proven: layers add up in floats, so no record can be rounded to a grid. With ``secure`` the noise comes from
    `pyml.privacy.secure_noise`, and its label is "hardened". Nor can a record with a NaN or an infinity be left out: it
    ends in an error, which tells that there was one. With several processes the error comes at the step, in all of
    them.

    Args:
        module: the model in Opacus' GradSampleModuleFastGradientClipping with loss_reduction "sum".
        optimizer, options: as in `HeteroNoiseOptimizer`. The mode is "whitened" or "l2" with one clip norm; a scale
            is one number a parameter, as a norm whitened by element needs the gradient. Parameters are float32 or
            float64.
    """

    GHOST = True

    def __init__(self, optimizer: Optimizer, *, module: Any = None, **options: Any) -> None:
        self._failed: Exception | None = None
        self.module = module
        self._clipped: list[Tensor] | None = None
        super().__init__(optimizer, **options)
        if self.groups is not None or self.global_clip is not None:
            got = f"clip {self.clip}, groups {self.groups}, global_clip {self.global_clip}"
            _check.fail(OP, "clip", "one clip norm for all parameters, without groups or global_clip", got)
        for p in self.params:
            if p.dtype not in (torch.float32, torch.float64):  # the sum would be rounded before the noise is in
                _check.fail(OP, "optimizer", "parameters in float32 or float64", p.dtype)
            if self.secure and p.device.type != "cpu":
                _check.fail(OP, "secure", "parameters on the CPU, where it is True", p.device)

    @property
    def module(self) -> Any:
        """The wrapped model."""
        return self._module

    @module.setter
    def module(self, module: Any) -> None:
        # any other is refused by `backward`
        fits = hasattr(module, "get_norm_sample") and getattr(module, "loss_reduction", None) == "sum"
        self._module, self._records = module, Records(module) if fits else None

    def _use(self, scales: Scales) -> None:
        for i, s in enumerate(scales.forms):
            if isinstance(s, tuple) or (isinstance(s, Tensor) and s.dim()):
                _check.fail(OP, f"scale[{i}]", "one number for the parameter", "one for each of its elements")
        super()._use(scales)
        self._numbers = [float(s) for s in scales.forms]

    def backward(self, losses: Tensor) -> None:
        """Norms of the gradients and the sum of the clipped ones, which waits for the step.

        Args:
            losses: ``[B]``, the loss of each record, which depends on no other record; summed or averaged by nobody.
        """
        if self.world == 1:
            self._clipped = self._pass(losses)
            return
        try:
            self._clipped = self._pass(losses)
        except Exception as error:  # the other processes would wait for this one: all stop at the step
            self._failed = self._failed or error
            self._clipped = self._none()

    def _pass(self, losses: Tensor) -> list[Tensor]:
        if self._clipped is not None:
            _check.fail(OP, "backward", "a step, or a virtual one, after each backward pass", "two of them")
        if not isinstance(losses, Tensor) or losses.dim() != 1 or not losses.requires_grad:
            got = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            _check.fail(OP, "losses", "[B], one a record, with a gradient", got)
        if self._records is None:
            expected = "Opacus' GradSampleModuleFastGradientClipping with loss_reduction 'sum'"
            _check.fail(OP, "module", expected, type(self.module).__name__)
        self._forget()
        done = False
        try:
            with torch.autocast(losses.device.type, enabled=False):  # norms and sums in the type of the parameters
                self._records.check_uses(losses)
                self._records.start()
                losses.sum().backward()
                factors = self._factors(losses)
                self._forget()
                sums = self._records.sums(self.params, factors)
            done = True
        finally:
            self._forget()
            self._records.clear() if done else self._records.restart()
        return [t if s else torch.zeros_like(t) for t, s in zip(sums, self._numbers)]

    def _release(self) -> None:
        if self.world > 1 and self.anywhere(self._failed is not None):
            error, self._failed = self._failed, None
            self.discard()
            if error is not None:
                raise error
            _check.fail(OP, "losses", "a backward pass in every process", "one that failed in another process")
        super()._release()

    def _forget(self) -> None:
        """Nobody sees norms, or gradients without noise; and no norm of an earlier batch is taken for one of this."""
        for p in self.params:
            p.grad = p._norm_sample = None  # type: ignore[attr-defined]

    def _factors(self, losses: Tensor) -> Tensor:
        total = losses.new_zeros(losses.shape, dtype=torch.float64)
        for i, (p, s) in enumerate(zip(self.params, self._numbers)):
            norms = getattr(p, "_norm_sample", None)
            if not isinstance(norms, Tensor) or norms.numel() != losses.numel():
                got = list(norms.shape) if isinstance(norms, Tensor) else "none"
                _check.fail(OP, "losses", f"one a record, through every parameter (norms of number {i})", got)
            if s:
                total += (norms.detach().double().view(-1) / (s if self.mode == "whitened" else 1.0)).square()
        if not bool(total.isfinite().all()):
            _check.fail(OP, "losses", "records with finite gradients, as ghost clipping can leave none out", "another")
        norm, limit = total.sqrt(), float(self.clip)  # type: ignore[arg-type]  # one number here
        return torch.where(norm > limit, limit / norm, 1.0)  # in 16 bits they would be rounded up

    def _per_sample(self) -> list[Tensor]:
        found, self._clipped = self._clipped, None
        if found is None:
            _check.fail(OP, "step", "backward(losses) before it", "none")
        return found

    def _collect(self, grads: list[Tensor]) -> None:
        self._add(grads)

    def _none(self) -> list[Tensor]:
        return [torch.zeros_like(p) for p in self.params]

    def _secure_sums(self) -> list[Tensor]:
        sums, self._sums = self._sums or [], None
        self._spend(self.multiplier)
        for t, s in zip(sums, self._numbers):
            t.add_(secure_noise(t.shape, self.std, scale=s, dtype=t.dtype)).div_(self.divide_by)
        return sums

    def discard(self) -> int:
        """Also what a pass left, or a forward one alone."""
        self._clipped = self._failed = None
        if self._records is not None:
            self._records.restart()
        return super().discard()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients and what a backward pass left. Sums of virtual steps stay until the step."""
        self._clipped = None
        if self._records is not None:
            self._records.clear()
        super().zero_grad(set_to_none)
