"""What Opacus' hooks tell of a backward pass: norms of the gradients of records, and the weighted sum of the same ones.

Norm and sum are made of the same numbers, the inputs of each call of a layer and the gradients of its output. So a
record adds no more than its clipped norm, also where autograd would add up more than the hooks see: other uses of a
weight, a layer that has a state or keyword arguments, hooks of others.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyml.ops import _check
from pyml.privacy import _arguments as arguments

OP = "GhostNoiseOptimizer"
Call = tuple[nn.Module, Tensor, Tensor, int]  # a layer, its input, the gradient of its output, how often both changed


class Records:
    """Takes the place of Opacus' backward hooks on a GradSampleModuleFastGradientClipping.

    Norms stand in ``_norm_sample`` of the parameters, as Opacus leaves them. Linear, embedding and convolution keep
    inputs and gradients of outputs; every other layer the gradients of records, until `clear`.
    """

    def __init__(self, module: Any) -> None:
        self.module = module
        self._gradients = arguments.package(OP, "opacus.grad_sample.grad_sample_module")
        self.clear()
        module.remove_hooks()
        hooked = self._hooked()
        module.capture_backprops_hook = self._hook
        module.add_hooks(
            loss_reduction="sum", batch_first=module.batch_first, force_functorch=module.force_functorch
        )  # fmt: skip
        # each call of these uses each parameter once
        self.counted = [p for m in hooked if type(m) in SUMS for p in m.parameters(recurse=False) if p.requires_grad]

    def _hooked(self) -> list[nn.Module]:
        """The layers that get hooks. A weight of two of them would have norms of either, and a layer at two places two
        hooks."""
        names = {id(m): name for name, m in self.module._module.named_modules()}
        found: list[nn.Module] = []
        owner: dict[int, str] = {}
        for layer in self.module.iterate_submodules(self.module._module):
            if type(layer) in (self._gradients.DPRNN, self._gradients.DPLSTM, self._gradients.DPGRU):  # made of layers
                continue
            for p in layer.parameters():
                other = owner.setdefault(id(p), names[id(layer)])
                if p.requires_grad and (other != names[id(layer)] or layer in found):
                    got = f"one of {other!r} and {names[id(layer)]!r}"
                    _check.fail(OP, "module", "weights that each belong to one layer, under ghost clipping", got)
            found.append(layer)
        return found

    def clear(self) -> None:
        """Forget the last pass."""
        self._calls: list[Call] = []
        self._grads: list[tuple[nn.Parameter, Tensor]] = []

    def restart(self) -> None:
        """After a pass that failed, or a forward one alone: what it left would be taken for a part of the next."""
        self.clear()
        for layer in self.module.modules():
            for name in ("activations", "max_batch_len"):
                layer.__dict__.pop(name, None)
        for p in self.module.parameters():
            p.__dict__.pop("_current_grad_sample", None)
            p.grad_sample, p._forward_counter = None, 0

    def _hook(self, layer: Any, _inputs: Any, given: Any, loss_reduction: str, batch_first: bool) -> None:
        outer = self.module
        if not outer.hooks_enabled:
            return
        own = [p for p in layer.parameters() if p.requires_grad]
        inputs, back = outer.rearrange_grad_samples(
            module=layer, backprops=given[0].detach(), loss_reduction=loss_reduction, batch_first=batch_first
        )
        # 16 bits of an autocast would round the norms
        inputs = [t.to(own[0].dtype) if t.is_floating_point() else t for t in inputs]
        back = back.to(own[0].dtype)
        kind = type(layer)
        products = kind in SUMS and (not isinstance(layer, CONVOLUTIONS) or _plain(layer))
        if products:
            self._calls.append((layer, inputs[0], back, inputs[0]._version + back._version))
        if products and kind in outer.NORM_SAMPLERS:
            sizes = outer.NORM_SAMPLERS[kind] if kind is nn.Embedding else _linear_norms
            for p, norms in sizes(layer, inputs, back).items():
                if p.requires_grad:
                    p._norm_sample = norms
                    p._forward_counter -= 1
        else:
            rule = None if outer.force_functorch else outer.GRAD_SAMPLERS.get(kind)
            found = (rule or self._gradients.ft_compute_per_sample_gradient)(layer, inputs, back)
            for p, grads in found.items():
                self._gradients.create_or_accumulate_grad_sample(
                    param=p, grad_sample=grads[: layer.max_batch_len], max_batch_len=layer.max_batch_len
                )
            for p in own:
                p._forward_counter -= 1
                if p._forward_counter == 0:  # the last of several calls
                    self._gradients.promote_current_grad_sample(p)
                    p._norm_sample = p.grad_sample.reshape(len(p.grad_sample), max(p.numel(), 1)).norm(dim=1)
                    if not products:
                        self._grads.append((p, p.grad_sample))
                    p.grad_sample = None
        if not layer.activations:
            del layer.max_batch_len

    def sums(self, params: Sequence[Tensor], factors: Tensor) -> list[Tensor]:
        """The gradients of the records of the last pass, each times its factor, added up."""
        found: dict[int, Tensor] = {}

        def add(p: Tensor, part: Tensor) -> None:
            found[id(p)] = found[id(p)].add_(part) if id(p) in found else part

        for layer, given, back, changes in self._calls:
            if given._version + back._version != changes:  # by a hook, say
                got = f"another input or gradient of {type(layer).__name__}"
                _check.fail(OP, "losses", "the numbers that the norms were made of", got)
            weights = factors[: len(back)].to(back.dtype).view(-1, *[1] * (back.dim() - 1))
            parts = SUMS[type(layer)](layer, given, back * weights)
            for p, part in zip((layer.weight, getattr(layer, "bias", None)), parts):
                if isinstance(p, Tensor) and p.requires_grad:
                    add(p, part)
        for p, grads in self._grads:
            add(p, torch.tensordot(factors[: len(grads)].to(grads.dtype), grads, 1))
        return [found[id(p)] if id(p) in found else torch.zeros_like(p) for p in params]

    def check_uses(self, losses: Tensor) -> None:
        """Refuse a weight that the losses use outside of the calls of its layer: that part has no norm."""
        into: dict[Any, list[Any]] = {}
        waiting = [losses.grad_fn]
        seen = set(waiting)
        while waiting:
            node = waiting.pop()
            for before, _ in node.next_functions:  # type: ignore[union-attr]
                if before is not None:
                    into.setdefault(before, []).append(node)
                    if before not in seen:
                        seen.add(before)
                        waiting.append(before)

        def uses(node: Any) -> int:
            """Views and casts of a weight are shared by several uses: an autocast keeps them."""
            users = into.get(node, ())
            return sum(uses(user) if user.name().rstrip("0123456789") in VIEWS else 1 for user in users)

        leaves = {id(node.variable): node for node in into if hasattr(node, "variable")}
        for p in self.counted:
            found, known = uses(leaves.get(id(p))), getattr(p, "_forward_counter", 0)
            if found != known:
                expected = f"each use of a weight in a call of its layer, in one forward pass ({known} calls)"
                _check.fail(OP, "losses", expected, f"{found} uses of one of shape {list(p.shape)}")


def _plain(layer: nn.Module) -> bool:
    """Convolutions whose sum is one call; the others keep gradients of records."""
    return not isinstance(layer.padding, str) and layer.padding_mode == "zeros"


def _linear_norms(layer: Any, inputs: list[Tensor], back: Tensor) -> dict[Any, Tensor]:
    """That of sum_t b_t a_t over the places t of a sequence is the root of sum_tu (a_t a_u) (b_t b_u).

    Where the places cancel, this is mostly rounding, and might be 0. So what floats may have lost is added.
    """
    given = inputs[0]
    if back.dim() == 2:
        weight, bias = given.norm(dim=1) * back.norm(dim=1), back.norm(dim=1)
    else:
        a, b = (t.reshape(len(t), t[0].numel() // t.shape[-1] if len(t) else 1, t.shape[-1]) for t in (given, back))
        squares = ((a @ a.mT) * (b @ b.mT)).sum((1, 2), dtype=torch.float64).clamp(min=0)
        longest = (a.double().norm(dim=2) * b.double().norm(dim=2)).sum(1)
        lost = ROUNDINGS * math.sqrt(a.shape[2] + b.shape[2]) * torch.finfo(a.dtype).eps
        weight, bias = (squares + lost * longest.square()).sqrt().to(a.dtype), b.sum(1).norm(dim=1)
    return {layer.weight: weight} if layer.bias is None else {layer.weight: weight, layer.bias: bias}


def _linear(layer: Any, given: Tensor, back: Tensor) -> tuple[Tensor, Tensor]:
    rows = back.reshape(-1, back.shape[-1])
    return rows.t() @ given.reshape(-1, given.shape[-1]), rows.sum(0)


def _embedding(layer: Any, given: Tensor, back: Tensor) -> tuple[Tensor]:
    total = torch.zeros_like(layer.weight).index_add_(0, given.reshape(-1), back.reshape(-1, back.shape[-1]))
    if layer.padding_idx is not None:
        total[layer.padding_idx] = 0
    return (total,)


def _convolution(layer: Any, given: Tensor, back: Tensor) -> tuple[Tensor, Tensor]:
    sizes = (layer.stride, layer.padding, layer.dilation, False, layer.output_padding, layer.groups)
    mask = [False, True, True]
    _, weight, bias = torch.ops.aten.convolution_backward(back, given, layer.weight, [layer.out_channels], *sizes, mask)
    return weight, bias


ROUNDINGS = 4.0  # of a sum of n products, in units of sqrt(n) eps: they go either way, and BLAS adds up in blocks
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
SUMS: dict[type, Any] = {nn.Linear: _linear, nn.Embedding: _embedding, **dict.fromkeys(CONVOLUTIONS, _convolution)}
VIEWS = {
    f"{name}Backward"
    for name in (
        "T",
        "Transpose",
        "Permute",
        "View",
        "UnsafeView",
        "ReshapeAlias",
        "Alias",
        "Expand",
        "ToCopy",
        "Clone",
    )
}
