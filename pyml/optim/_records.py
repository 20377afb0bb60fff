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
from pyml.optim._state import CONVOLUTIONS
from pyml.privacy import _arguments as arguments

OP = "GhostNoiseOptimizer"
Call = tuple[nn.Module, Tensor, Tensor, int]  # a layer, its input, the gradient of its output, how often both changed


class Records:
    """Takes the place of Opacus' hooks on a GradSampleModuleFastGradientClipping.

    Norms stand in ``_norm_sample`` of the parameters, as Opacus leaves them. Linear, embedding and convolution keep
    inputs and gradients of outputs; every other layer the gradients of records, until `clear`. Only backward passes
    between `start` and `clear` are looked at. Copies start with nothing.
    """

    def __init__(self, module: Any) -> None:
        self.module = module
        self._forget()
        module.remove_hooks()
        self.hooked = self._hooked()
        module.capture_activations_hook, module.capture_backprops_hook = self._seen, self._hook
        module.add_hooks(
            loss_reduction="sum", batch_first=module.batch_first, force_functorch=module.force_functorch
        )  # fmt: skip

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self.module, "hooked": self.hooked}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def _hooked(self) -> list[nn.Module]:
        """The layers that get hooks. A weight of two of them would have norms of either, and a layer at two places two
        hooks."""
        recurrent = arguments.package(OP, "opacus.layers.dp_rnn")
        names = {id(m): name for name, m in self.module._module.named_modules()}
        found: list[nn.Module] = []
        owner: dict[int, str] = {}
        for layer in self.module.iterate_submodules(self.module._module):
            if type(layer) in (recurrent.DPRNN, recurrent.DPLSTM, recurrent.DPGRU):  # made of layers
                continue
            for p in layer.parameters():
                other = owner.setdefault(id(p), names[id(layer)])
                if p.requires_grad and (other != names[id(layer)] or layer in found):
                    got = f"one of {other!r} and {names[id(layer)]!r}"
                    _check.fail(OP, "module", "weights that each belong to one layer, under ghost clipping", got)
            found.append(layer)
        return found

    def _forget(self) -> None:
        self.passing = False
        self._inputs: dict[nn.Module, list[list[Tensor]]] = {}  # of the calls that no backward pass has come to
        self._mixed: set[nn.Module] = set()
        self.clear()

    def start(self) -> None:
        """From here on a backward pass counts, and nothing that an earlier one left."""
        if self._mixed:  # which of the inputs it has taken is not known
            expected = "one forward pass, and no other backward pass through the model after it"
            _check.fail(OP, "losses", expected, "one through another forward pass")
        self.clear()
        self.passing = True

    def clear(self) -> None:
        """Forget the last pass."""
        self.passing = False
        self._calls: list[Call] = []
        self._grads: dict[nn.Parameter, Tensor] = {}

    def restart(self) -> None:
        """After a pass that failed, or a forward one alone: what it left would be taken for a part of the next."""
        self._forget()
        for layer in self.hooked:
            if _recurrent(layer):
                layer.__dict__.pop("max_batch_len", None)
        for p in self.module.parameters():
            p.grad_sample = None

    def _seen(self, layer: nn.Module, given: Any, _: Any) -> None:
        """After each forward pass of a layer."""
        if layer.training and torch.is_grad_enabled() and self.module.hooks_enabled and _trained(layer):
            self._inputs.setdefault(layer, []).append([t.detach() for t in given])

    def _hook(self, layer: Any, _inputs: Any, given: Any, loss_reduction: str, batch_first: bool) -> None:
        """After each backward pass of a layer."""
        outer, waiting = self.module, self._inputs.get(layer, [])
        if not outer.hooks_enabled:
            return
        if not self.passing:  # for gradients of inputs, say: its calls are no part of any sum
            if waiting:
                waiting.pop()
                (self._mixed.add if waiting else self._mixed.discard)(layer)
            if not waiting and _recurrent(layer):
                layer.__dict__.pop("max_batch_len", None)
            return
        if not waiting:
            expected = "one backward pass for each forward pass in training"
            _check.fail(OP, "losses", expected, f"another through {type(layer).__name__}")
        own, axis = _trained(layer), 0 if batch_first or _recurrent(layer) else 1
        rows = max(inputs[-1].shape[axis] for inputs in waiting)
        if _recurrent(layer):  # of a packed sequence the first call has the most
            rows = layer.__dict__.setdefault("max_batch_len", rows)
        # 16 bits of an autocast would round the norms
        inputs = [t.to(own[0].dtype) if t.is_floating_point() else t for t in waiting.pop()]
        inputs, back = [t.movedim(axis, 0) for t in inputs], given[0].detach().to(own[0].dtype).movedim(axis, 0)
        kind = type(layer)
        products = kind in SUMS and (not isinstance(layer, CONVOLUTIONS) or _plain(layer))
        if products:
            self._calls.append((layer, inputs[0], back, inputs[0]._version + back._version))
        if products and kind in outer.NORM_SAMPLERS:
            sizes = outer.NORM_SAMPLERS[kind] if kind is nn.Embedding else _linear_norms
            found = sizes(layer, inputs, back) if len(back) else {p: back.new_zeros(0) for p in own}
            for p in own:
                p._norm_sample = found[p]  # type: ignore[attr-defined]
        else:
            rule = None if outer.force_functorch else outer.GRAD_SAMPLERS.get(kind)
            rule = rule or arguments.package(OP, "opacus.grad_sample.functorch").ft_compute_per_sample_gradient
            for p, grads in rule(layer, inputs, back).items():
                if p.requires_grad:
                    self._add(p, grads if rows else grads[:0], rows, kind)
                if p.requires_grad and not waiting:  # the last of several calls
                    whole = self._grads.pop(p) if products else self._grads[p]
                    p._norm_sample = whole.reshape(rows, max(p.numel(), 1)).norm(dim=1)
        if not waiting and _recurrent(layer):
            layer.__dict__.pop("max_batch_len", None)

    def _add(self, p: nn.Parameter, grads: Tensor, rows: int, kind: type) -> None:
        """Gradients of records, which several calls add up. Shorter ones are of the first records of a packed batch."""
        if len(grads) > rows:
            _check.fail(OP, "losses", f"gradients of {rows} records, batch first", f"{len(grads)} of {kind.__name__}")
        if p not in self._grads:
            self._grads[p] = grads.new_zeros(rows, *grads.shape[1:])
        self._grads[p][: len(grads)] += grads

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
        for p, grads in self._grads.items():
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
        for layer in self.hooked:
            known, once = len(self._inputs.get(layer, ())), type(layer) in ONCE
            # each call of these uses each parameter once
            for p in layer.parameters(recurse=False) if type(layer) in SUMS else ():
                found = uses(leaves.get(id(p))) if p.requires_grad else known
                if found != known or (once and known > 1):
                    expected = "one call of each linear layer and embedding" if found == known else EACH_USE
                    unused = "" if found >= known else "; discard() forgets a forward pass that was not used"
                    got = f"{found} uses of one of shape {list(p.shape)}{unused}"
                    _check.fail(OP, "losses", f"{expected} ({known} calls)", got)


def _trained(layer: nn.Module) -> list[nn.Parameter]:
    return [p for p in layer.parameters() if p.requires_grad]


def _recurrent(layer: nn.Module) -> bool:
    return isinstance(layer, arguments.package(OP, "opacus.layers.dp_rnn").RNNLinear)


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
ONCE = (nn.Linear, nn.Embedding)  # norms are those of one call
EACH_USE = "each use of a weight in a call of its layer, in one forward pass"
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
