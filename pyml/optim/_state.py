"""What a model keeps of its inputs beside gradients: it would leave without clip and without noise."""

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from pyml.ops import _check


def check_layers(op: str, model: nn.Module, mode: str) -> None:
    """Refuse layers that mix records, or keep statistics of them, and those whose gradients Opacus has wrong."""
    for name, layer in model.named_modules():
        got = f"{type(layer).__name__} {name!r}"
        if isinstance(layer, _BatchNorm):  # with or without weights: a sample has no gradient of its own behind it
            _check.fail(op, "model", "no batch norm, which mixes samples", got)
        if isinstance(layer, _NormBase) and layer.track_running_stats:
            _check.fail(op, "model", "no running statistics, which get no noise", got)
        if mode != "functorch" and getattr(layer, "padding_mode", "zeros") != "zeros":  # Opacus' rule pads with zeros
            expected = 'convolutions padded with zeros, or grad_sample_mode "functorch"'
            _check.fail(op, "model", expected, f"{layer.padding_mode!r} of {got}")


def watch(op: str, model: nn.Module) -> None:
    """An error in any forward pass in training that writes to a parameter or a floating buffer, or replaces one.

    Integers may count calls. The pass of each layer that has such tensors of its own is looked at, and the model's.
    """

    Known = dict[str, tuple[Tensor, int]]
    before: dict[int, Known] = {}
    watched: set[int] = set()

    def tensors(layer: nn.Module) -> Known:
        every = (*layer.named_parameters(), *layer.named_buffers())
        return {name: (t, t._version) for name, t in every if not _counts(t)}

    def start(layer: nn.Module, _: Any) -> None:
        if layer.training and id(layer) in watched:  # not a copy of it
            before[id(layer)] = tensors(layer)

    def end(layer: nn.Module, _: Any, __: Any) -> None:
        known = before.pop(id(layer), None)
        for name, (t, version) in ({} if known is None else tensors(layer)).items():
            then, of = known.get(name, (None, -1))  # type: ignore[union-attr]
            if then is not t or of != version:
                got = f"{name!r} of {type(layer).__name__}"
                _check.fail(op, "model", "no forward pass that writes to its state, which gets no noise", got)

    for layer in model.modules():
        own = [t for t in layer.buffers(recurse=False) if not _counts(t)]
        if own or layer is model or getattr(layer, "max_norm", None) is not None:
            watched.add(id(layer))
            layer.register_forward_pre_hook(start)
            layer.register_forward_hook(end)


def _counts(t: Tensor) -> bool:
    return not (t.is_floating_point() or t.is_complex())
