"""Where steering acts in a forward: at every position, from the last token of the prompt on, or at that token alone."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyml.heads.adapters import Adapter
from pyml.ops import _check

ACTS = ("all", "last", "once")
Index = tuple[Tensor, Tensor]  # rows and columns of [B, T]
Where = Callable[[Tensor], Index]  # of what a layer puts out, [B, T, ...]


class Acting:
    """The positions of the running forward at which steering acts: a hook on the backbone notes them for the layers.

    A forward with a cache brings its new tokens alone: the prompt first, then one token after the other. So "last" is
    from the last real token of each forward on, and "once" is that of the first forward alone.

    Args:
        op: whose sentences errors are.
    """

    def __init__(self, a: Adapter, op: str) -> None:
        self.adapter, self.op = a, op
        self._ends: Tensor | None = None
        self._shape: tuple[int, int] | None = None
        self._positions: dict[str, Index] = {}

    @contextmanager
    def prompt_ends(self, ends: Tensor) -> Iterator[None]:
        """Within it, rows go on behind their prompts, whose last tokens are at ``ends`` ``[B]``."""
        before, self._ends = self._ends, ends
        try:
            yield
        finally:
            self._ends = before

    def install(self) -> Any:
        """The handle of the hook that notes positions."""
        return self.adapter.backbone.register_forward_pre_hook(self._note, with_kwargs=True)

    def at(self, act: str) -> Where | None:
        """What gives the positions for one of `ACTS`; None stands for every one."""
        return None if act == "all" else partial(self._found, act)

    def _found(self, act: str, x: Tensor) -> Index:
        if self._shape != tuple(x.shape[:2]):
            _check.fail(self.op, "model", f"layers that run on the forward's {self._shape} tokens", list(x.shape[:2]))
        return self._positions[act]

    def _note(self, module: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        tokens = args[0] if args else kwargs.get("input_ids")
        tokens = kwargs["inputs_embeds"] if tokens is None else tokens
        rows, width = tokens.shape[:2]
        columns = torch.arange(width, device=tokens.device)
        start = self._start(tokens, kwargs.get("attention_mask"))
        cache = kwargs.get("past_key_values")
        goes_on = width == 1 and cache is not None and cache.get_seq_length() > 0
        once = (columns == start[:, None]) if not goes_on else torch.zeros_like(tokens[..., :1], dtype=torch.bool)
        self._shape = (rows, width)
        self._positions = {"last": _index(columns >= start[:, None]), "once": _index(once.view(rows, -1))}

    def _start(self, tokens: Tensor, mask: Any) -> Tensor:
        """``[B]``: the column from which on it acts."""
        rows, width = tokens.shape[:2]
        if self._ends is not None:
            if self._ends.shape != (rows,):
                _check.fail(self.op, "ends", f"a position for each of {rows} rows", list(self._ends.shape))
            return self._ends.to(tokens.device)
        if mask is None or width == 1:
            return torch.full((rows,), width - 1, device=tokens.device)
        if not isinstance(mask, Tensor) or mask.dim() != 2:  # a static cache comes with one of its own
            got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            _check.fail(self.op, "attention_mask", "shape [B, T] where steering begins at the last token", got)
        return self.adapter.last({"input_ids": tokens, "attention_mask": mask[:, -width:]})


def _index(chosen: Tensor) -> Index:
    rows, columns = chosen.nonzero(as_tuple=True)
    return rows, columns
