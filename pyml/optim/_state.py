"""What a model keeps of its inputs beside gradients: it would leave without clip and without noise."""

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.utils.rnn import PackedSequence

from pyml.ops import _check

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def check_layers(op: str, model: nn.Module, mode: str) -> None:
    """Refuse layers that mix records, or keep statistics of them, and those whose gradients Opacus has wrong."""
    for name, layer in model.named_modules():
        got = f"{type(layer).__name__} {name!r}"
        if isinstance(layer, _BatchNorm):  # with or without weights: a sample has no gradient of its own behind it
            _check.fail(op, "model", "no batch norm, which mixes samples", got)
        if isinstance(layer, _NormBase) and layer.track_running_stats:
            _check.fail(op, "model", "no running statistics, which get no noise", got)
        # Opacus' rule is for these types, not for what is made of them, and pads with zeros
        ruled = mode != "functorch" and type(layer) in CONVOLUTIONS and layer.weight.requires_grad
        if ruled and layer.padding_mode != "zeros":
            expected = 'convolutions padded with zeros, or grad_sample_mode "functorch"'
            _check.fail(op, "model", expected, f"{layer.padding_mode!r} of {got}")


class Watch:
    """An error in any forward pass in training that writes to a parameter or a floating buffer, or replaces one.

    Integers may count. The pass of each layer that has such tensors of its own is looked at, and the model's. Copies
    of layers, and those that come from a file, are not: `make_private` gives them a watch of their own.
    """

    def __init__(self, op: str, model: nn.Module) -> None:
        self.__setstate__(op)
        for layer in model.modules():
            own = [t for t in layer.buffers(recurse=False) if not _counts(t)]
            if own or layer is model or getattr(layer, "max_norm", None) is not None:
                self.watched.add(id(layer))
                layer.register_forward_pre_hook(self.start)
                layer.register_forward_hook(self.end)

    def __getstate__(self) -> str:
        return self.op

    def __setstate__(self, op: str) -> None:
        self.op = op
        self.before: dict[int, dict[str, tuple[Tensor, int]]] = {}
        self.watched: set[int] = set()

    def start(self, layer: nn.Module, _: Any) -> None:
        if layer.training and id(layer) in self.watched:
            self.before[id(layer)] = _tensors(layer)

    def end(self, layer: nn.Module, _: Any, __: Any) -> None:
        known = self.before.pop(id(layer), None)
        for name, (t, version) in ({} if known is None else _tensors(layer)).items():
            then, of = known.get(name, (None, -1))  # type: ignore[union-attr]
            if then is not t or of != version:
                hint = "" if name in known else ", which it made (a pass before make_private makes it in time)"  # type: ignore[operator]
                got = f"{name!r} of {type(layer).__name__}{hint}"
                _check.fail(self.op, "model", "no forward pass that writes to its state, which gets no noise", got)


def check_order(layer: nn.Module, given: Any, named: Any) -> None:
    """A hook before the pass of a recurrent layer of Opacus: its rows are to be those of the other layers."""
    for t in (*given, *named.values()) if layer.training else ():
        order = t.sorted_indices if isinstance(t, PackedSequence) else None
        if order is not None and bool((order.diff() < 0).any()):
            expected = "packed sequences of a batch in order of length"
            _check.fail("make_private", "model", expected, f"a batch out of order for {type(layer).__name__}")


def _tensors(layer: nn.Module) -> dict[str, tuple[Tensor, int]]:
    every = (*layer.named_parameters(), *layer.named_buffers())
    return {name: (t, t._version) for name, t in every if not _counts(t)}


def _counts(t: Tensor) -> bool:
    return not (t.is_floating_point() or t.is_complex())
