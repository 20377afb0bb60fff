"""Hooks for the time of one run: part of a model, or part of its tokens."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

MOST = 0.75  # a run at more than this share of the tokens gains nothing over one at all
HOOKS = (
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs",
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
)  # fmt: skip


def first_argument(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The hidden states that a module is called with: some layouts pass them by name."""
    return args[0] if args else kwargs["hidden_states"]


def replaced(args: tuple[Any, ...], kwargs: Mapping[str, Any], hidden: Tensor) -> tuple[Any, Any]:
    """The same call with other hidden states."""
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})


@contextmanager
def hooked() -> Iterator[list[Any]]:
    """A list for the handles of hooks, which are removed behind it."""
    handles: list[Any] = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off within; every module has its mode again behind it."""
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class _Reached(Exception):
    """Ends a run at a block whose input is all that is wanted."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


def reaching(block: nn.Module, run: Callable[[], Any]) -> Tensor:
    """The hidden states that a block is called with in a run, which ends there; hooks of others have not seen them."""

    def stop(module: nn.Module, args: Any, kwargs: Any) -> None:
        raise _Reached(first_argument(args, kwargs))

    with hooked() as handles:
        handles.append(block.register_forward_pre_hook(stop, with_kwargs=True, prepend=True))
        try:
            run()
        except _Reached as reached:
            return reached.hidden
    raise RuntimeError("the model ran without the block")


@contextmanager
def starting_from(blocks: Sequence[Any], first: int, hidden: Tensor, tuples: bool) -> Iterator[None]:
    """Blocks below the first one do not run, nor do their hooks: they hand on the hidden states that enter it.

    The first block is called with them, and not by a hook of its own: where it is checkpointed together with its hooks,
    as in older versions of transformers, the backward would run it on what it was called with.

    Args:
        tuples: whether blocks return tuples.
    """

    def passed(*args: Any, **kwargs: Any) -> Any:
        return (hidden,) if tuples else hidden

    names = ("forward", *HOOKS)  # accelerate and others put a forward on the block itself
    skipped = [(block, {n: block.__dict__[n] for n in names if n in block.__dict__}) for block in blocks[:first]]
    with hooked() as handles:
        if not first:
            enter = lambda module, args, kwargs: replaced(args, kwargs, hidden)  # noqa: E731
            handles.append(blocks[0].register_forward_pre_hook(enter, with_kwargs=True, prepend=True))
        try:
            for block, _ in skipped:
                block.__dict__.update({name: OrderedDict() for name in HOOKS}, forward=passed)
            yield
        finally:
            for block, own in skipped:
                del block.__dict__["forward"]
                block.__dict__.update(own)


@contextmanager
def only_at(modules: Sequence[nn.Module], tokens: Tensor, shape: tuple[int, int]) -> Iterator[None]:
    """Modules that see one token at a time run on some alone and give zeros for the others.

    They run on all where that gains nothing, and where hooks of others inside of them expect every token.

    Args:
        tokens: ``[n]``, their numbers in ``[B * T]``.
        shape: (B, T).
    """

    def gather(module: nn.Module, args: Any, kwargs: Any) -> Any:
        x = first_argument(args, kwargs)
        return replaced(args, kwargs, x.flatten(0, 1).index_select(0, tokens.to(x.device)))

    def spread(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        full = out.new_zeros(shape[0] * shape[1], out.shape[-1])
        return full.index_copy(0, tokens.to(out.device), out).view(*shape, -1)

    with hooked() as handles:
        inner = [part for module in modules for part in module.modules() if part is not module]
        if len(tokens) <= MOST * shape[0] * shape[1] and not any(getattr(p, name) for p in inner for name in HOOKS):
            for module in modules:
                handles.append(module.register_forward_pre_hook(gather, with_kwargs=True))
                handles.append(module.register_forward_hook(spread, prepend=True))  # others' hooks see every token
        yield
