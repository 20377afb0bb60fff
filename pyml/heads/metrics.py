"""What a run is measured by: a difference of logits at the last token, or a function of all of them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyml.heads.adapters import Adapter
from pyml.ops import _check


class Metric:
    """Values ``[..., B]`` of final hidden states ``[..., B, D]`` at the last token.

    Args:
        metric: ``(positive, negative)``: the logit of positive minus that of negative; each an int, a list of ints (the
            mean of their logits), or an int64 tensor ``[B]`` or ``[B, n]`` with tokens for each sample. No negative
            (None): the logit of positive alone. Or a function from logits ``[..., B, V]`` to values ``[..., B]``.
        samples: B.
    """

    def __init__(self, op: str, adapter: Adapter, metric: Any, samples: int) -> None:
        self.adapter = adapter
        self.function: Callable[[Tensor], Tensor] | None = None
        self.tokens: list[Tensor] = []
        if isinstance(metric, tuple) and len(metric) == 2:
            sides = [metric[0]] if metric[1] is None else list(metric)
            self.tokens = [self._read(op, side, samples) for side in sides]
        elif callable(metric):
            self.function = metric
        else:
            expected = "(positive tokens, negative tokens) or a function of logits"
            _check.fail(op, "metric", expected, type(metric).__name__, TypeError)

    def _read(self, op: str, side: Any, samples: int) -> Tensor:
        if not isinstance(side, Tensor):
            items = list(side) if isinstance(side, (list, tuple)) else [side]
            if not items or not all(isinstance(i, int) and not isinstance(i, bool) for i in items):
                _check.fail(op, "metric", "token ids: an int, a list of ints or a tensor [B] or [B, n]", repr(side))
            tokens = torch.tensor(items)
        else:
            tokens = side
            if tokens.dtype != torch.int64 or tokens.dim() not in (1, 2) or len(tokens) != samples or not side.numel():
                got = f"{list(tokens.shape)} of {tokens.dtype}"
                _check.fail(op, "metric", f"int64 tokens [B] or [B, n] with B = {samples}", got)
            tokens = tokens.view(samples, -1)
        vocabulary = int(self.adapter.config.vocab_size)
        if int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary:
            _check.fail(op, "metric", f"tokens in 0..{vocabulary - 1}", f"{int(tokens.min())}..{int(tokens.max())}")
        return tokens.to(self.adapter.device)

    @property
    def width(self) -> int:
        """How many logits a sample needs."""
        if self.function is not None:
            return int(self.adapter.config.vocab_size)
        return sum(tokens.shape[-1] for tokens in self.tokens)

    def __call__(self, hidden: Tensor, rows: slice) -> Tensor:
        """Of the samples ``rows`` of the batch: ``[..., b, D]`` to ``[..., b]``."""
        if self.function is not None:
            logits = self.adapter.logits(hidden)
            values = self.function(logits)
            if not isinstance(values, Tensor) or values.shape != logits.shape[:-1]:
                got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
                raise ValueError(f"metric: expected values of shape {list(logits.shape[:-1])}, got {got}")
            return values
        sides = [
            self.adapter.logits(hidden, tokens if tokens.dim() == 1 else tokens[rows]).mean(-1)
            for tokens in self.tokens
        ]
        return sides[0] if len(sides) == 1 else sides[0] - sides[1]
