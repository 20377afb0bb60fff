"""Linear layers of which only the slices of some heads are trained. `pyml.heads.HeadTuner` puts them into a model."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyml.ops import _check, _fused, head_linear

OP = "HeadLinear"
HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip


def in_shards(value: Any) -> bool:
    """Whether it is a DTensor: of FSDP2 or of tensor parallelism."""
    return hasattr(value, "placements")


class _Whole(nn.Module):
    """Its ``weight`` is in one piece."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and in_shards(value):
            got = "weights in shards (FSDP2, tensor parallelism), which slices cannot be views of"
            _check.fail("HeadTuner", "model", "a whole weight in each process (DistributedDataParallel)", got)
        super().__setattr__(name, value)


class HeadSlices(_Whole):
    """Parameters that are views of a weight: `state_dict` has the weight already, so they add nothing to it.

    The weight stands before them here too, and is one parameter: FSDP2 comes to it first, and is told so.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        for name in ("weight", *map(str, range(count))):
            self.register_parameter(name, None)

    def names(self) -> list[str]:
        return [name for name in self._parameters if name != "weight"]

    def all(self) -> list[nn.Parameter]:
        return [p for name, p in self._parameters.items() if p is not None and name != "weight"]

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Nothing of its own."""

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """The weight loads, and the slices see it."""


class _Scaled(torch.autograd.Function):
    """The same memory, with the gradient times a factor."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, factor: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad * ctx.factor, None


class Projection(_Whole):
    """A frozen Linear (or Conv1D, transposed) and the blocks of its weight that belong to heads.

    Attributes:
        weight, bias: the parameters of the layer it stands for, under their names; they require no gradient.
        blocks, size, dim: block b is ``[b * size, (b + 1) * size)`` of the rows (dim 0) or columns (dim 1) of the
            weight as ``[out, in]``.
        transposed: whether `weight` is ``[in, out]``.
    """

    def __init__(self, linear: Any, blocks: Sequence[int], size: int, dim: int, transposed: bool) -> None:
        super().__init__()
        _check.member(OP, "dim", dim, (0, 1))
        self.weight: nn.Parameter = linear.weight
        self.bias: nn.Parameter | None = linear.bias
        self.blocks, self.size, self.dim, self.transposed = tuple(blocks), size, dim, transposed
        whole = self.linear_weight().shape[dim]
        if not blocks or len(set(blocks)) != len(blocks) or min(blocks) < 0 or (max(blocks) + 1) * size > whole:
            expected = f"distinct blocks of {size} within the {whole} entries of dim {dim}, at least one"
            _check.fail(OP, "blocks", expected, list(blocks))
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.out_features, self.in_features = self.linear_weight().shape
        self.train(linear.training)
        self._linear = [linear]  # in a list: it is no child of this module
        for name in HOOKS:  # the same dicts: a hook of either is one of both, and its handle removes it from both
            self.__dict__[name] = linear.__dict__[name]
        self._is_full_backward_hook = linear._is_full_backward_hook

    def linear_weight(self) -> Tensor:
        """The weight as ``[out, in]``, a view."""
        return self.weight.t() if self.transposed else self.weight

    def view(self, block: int) -> Tensor:
        """The block of the weight as ``[size, in]`` or ``[out, size]``, a view without gradient."""
        return self.linear_weight().detach().narrow(self.dim, block * self.size, self.size)

    def original(self) -> Any:
        """The plain layer, which has this one's weight and bias."""
        linear = self._linear[0]
        linear.weight, linear.bias = self.weight, self.bias
        linear._is_full_backward_hook = self._is_full_backward_hook
        linear.train(self.training)
        return linear

    def extra_repr(self) -> str:
        what = "rows" if self.dim == 0 else "columns"
        return f"{self.in_features}, {self.out_features}, {what} of blocks {list(self.blocks)} of {self.size}"


class HeadLinear(Projection):
    """A Linear that trains some blocks of its weight: parameters that are views of it, and no gradient for the rest.

    The forward is one `F.linear` on the whole weight, and a step of an optimizer on a slice changes the weight itself.
    `state_dict` holds the usual ``weight`` and ``bias``. The views are made anew after ``.to``, a change of dtype,
    `copy.deepcopy`, unpickling and ``load_state_dict(assign=True)``; the parameters stay the same objects.

    Args:
        linear: an `nn.Linear`, or a Conv1D with ``transposed``; its parameters are taken over.
        blocks, size, dim: which, see `blocks` above.
        scales: factors of the gradients of the blocks.
        transposed: whether the weight is ``[in, out]``.

    Shapes:
        x ``[..., in]`` to ``[..., out]``.
    """

    def __init__(
        self, linear: Any, blocks: Sequence[int], size: int, dim: int, *, scales: Sequence[float] | None = None,
        transposed: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(linear, blocks, size, dim, transposed)
        self.scales = tuple(scales) if scales is not None else (1.0,) * len(self.blocks)
        self.slices = HeadSlices(len(self.blocks))
        self._tie()

    def forward(self, x: Tensor) -> Tensor:
        slices = [p if s == 1 else _Scaled.apply(p, s) for p, s in zip(self.slices.all(), self.scales)]
        weight = self.linear_weight()
        return head_linear(x, weight, self.bias, slices, heads=self.blocks, size=self.size, dim=self.dim)

    def _tie(self) -> None:
        """Slices are views of the weight, whatever became of either; a slice stays the parameter that it is."""
        _fused.guard()  # every way to such a layer leads here, unpickling in a new process too
        self.slices._parameters["weight"] = self.weight
        for name, block in zip(self.slices.names(), self.blocks):
            view, old = self.view(block), self.slices._parameters[name]
            if old is not None and torch._has_compatible_shallow_copy_type(old, view):
                old.data = view
                old.grad = None if old.grad is None else old.grad.to(view.device, view.dtype)
            else:
                self.slices.register_parameter(name, nn.Parameter(view, old is None or old.requires_grad))
            self.slices._parameters[name].head_slice = True  # type: ignore[union-attr]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "HeadLinear":
        super()._apply(fn, recurse=False)  # the weight moves; a slice that moved by itself would be another memory
        self._tie()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._tie()

    def _replicate_for_data_parallel(self) -> Any:
        got = "nn.DataParallel, whose copies of slices are no views of its copies of the weight"
        _check.fail("HeadTuner", "model", "a process a GPU (DistributedDataParallel, torchrun), or one GPU", got)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._tie()


class HeadLora(Projection):
    """A frozen Linear plus a product of low rank within the blocks of some heads: LoRA that touches these heads alone.

    Parameters:
        a: ``[k, r, in]`` for rows, ``[k, r, size]`` for columns; random.
        b: ``[k, size, r]`` for rows, ``[k, out, r]`` for columns; zero, so that training starts from the model.
    """

    def __init__(
        self, linear: Any, blocks: Sequence[int], size: int, dim: int, *, rank: int, alpha: float,
        transposed: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(linear, blocks, size, dim, transposed)
        k, weight = len(self.blocks), self.weight
        inner, outer = (self.in_features, size) if dim == 0 else (size, self.out_features)
        self.rank, self.factor, self.enabled = rank, alpha / rank, True
        self.places: Tensor
        self.register_buffer("places", torch.tensor(self.blocks, device=weight.device), persistent=False)
        self.a = nn.Parameter(weight.new_empty((k, rank, inner)).uniform_(-1, 1) / math.sqrt(inner))
        self.b = nn.Parameter(weight.new_zeros((k, outer, rank)))

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.linear(x, self.linear_weight(), self.bias)
        if not self.enabled:
            return y
        if self.dim == 1:
            part = torch.stack([x.narrow(-1, b * self.size, self.size) for b in self.blocks], -2)
            low = torch.einsum("...ki,kri->...kr", part, self.a)
            return y + self.factor * torch.einsum("...kr,kor->...o", low, self.b)
        low = torch.einsum("...i,kri->...kr", x, self.a)
        change = self.factor * torch.einsum("...kr,kor->...ko", low, self.b)
        blocks = y.unflatten(-1, (-1, self.size))
        return blocks.index_add(-2, self.places, change.to(y.dtype)).flatten(-2)

    def change(self, index: int) -> Tensor:
        """What the product adds to block number `index`: ``[size, in]`` or ``[out, size]``."""
        return self.factor * (self.b[index] @ self.a[index]).detach()

    def merged_weight(self) -> Tensor:
        """``[out, in]``: a copy of the weight with the products in it."""
        weight = self.linear_weight().detach().clone()
        for i, block in enumerate(self.blocks):
            weight.narrow(self.dim, block * self.size, self.size).add_(self.change(i))
        return weight
