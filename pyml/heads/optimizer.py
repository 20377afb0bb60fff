"""AdamW whose state is that of the slices alone, in one pass over memory."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pyml.nn.head_update import in_shards
from pyml.ops import _check, adamw_slices_

OP = "SliceAdamW"
MOMENTS = ("exp_avg", "exp_avg_sq")
STATES = (*MOMENTS, "master")


def wide(p: Tensor) -> torch.dtype:
    """The dtype of the moments: float32, and float64 for float64."""
    return torch.float64 if p.dtype == torch.float64 else torch.float32


class SliceAdamW(Optimizer):
    """`torch.optim.AdamW` for parameters of any strides, such as the columns of a weight that belong to one head.

    Moments are contiguous and of the parameter's own size, in float32 (float64 for float64): 8 bytes a parameter.

    Args:
        params: as for any torch optimizer; groups may differ in lr, betas, eps and weight_decay.
        master_weights: float32 copies of 16-bit parameters: updates that are smaller than their rounding add up. By
            default there are copies, unless there is stochastic rounding; without either, small updates are lost.
            Where a parameter was written to since the last step, its copy follows.
        stochastic_rounding: instead: 16-bit parameters are rounded up or down at random, right on average.
        seed: of that randomness.

    Raises:
        ValueError: one sentence.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, *, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.0, master_weights: bool | None = None, stochastic_rounding: bool = False, seed: int = 0,
    ) -> None:  # fmt: skip
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not 0 <= value < float("inf"):
                _check.fail(OP, name, "a finite number of at least 0", value)
        if not all(0 <= b < 1 for b in betas):
            _check.fail(OP, "betas", "two numbers in [0, 1)", betas)
        if master_weights and stochastic_rounding:
            _check.fail(OP, "stochastic_rounding", "False with master_weights", True)
        if master_weights is None:
            master_weights = not stochastic_rounding
        self.master_weights, self.stochastic_rounding, self.seed = master_weights, stochastic_rounding, seed
        self._keys: dict[torch.device, tuple[int, Tensor]] = {}
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        refuse_shards(OP, self.param_groups[-1]["params"])

    def __getstate__(self) -> dict[str, Any]:
        own = ("master_weights", "stochastic_rounding", "seed")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({"_keys": {}, **state})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        number = 0
        for group in self.param_groups:
            together: dict[tuple[Any, ...], list[tuple[int, Tensor]]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    step = self._state(p)["step"] + 1
                    together.setdefault((step, p.device, p.dtype), []).append((number, p))
                number += 1
            for (step, device, _), members in together.items():
                self._update(group, step, device, members)
        return loss

    def _state(self, p: Tensor) -> dict[str, Any]:
        state = self.state[p]
        if not state:
            refuse_shards(OP, [p])  # FSDP2 may have come after this optimizer
            state["step"] = 0
            for name in MOMENTS:
                state[name] = torch.zeros(p.shape, dtype=wide(p), device=p.device)
        if not (self.master_weights and p.element_size() == 2):
            state.pop("master", None)
        elif "master" not in state:
            state["master"] = p.detach().to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        return state

    def _key(self, device: torch.device) -> Tensor:
        """The seed where the kernels read it; made once, not in every step."""
        seed, key = self._keys.get(device, (None, None))
        if key is None or seed != self.seed:
            key = torch.tensor([self.seed], dtype=torch.int64, device=device)
            self._keys[device] = self.seed, key
        return key

    def _update(
        self, group: dict[str, Any], step: int, device: torch.device, members: list[tuple[int, Tensor]]
    ) -> None:
        params = [p for _, p in members]
        grads = [p.grad for p in params if p.grad is not None]  # all have one
        states = [self.state[p] for p in params]
        key = ids = None
        if self.stochastic_rounding and params[0].element_size() == 2:
            key, ids = self._key(device), [n for n, _ in members]
        moments = [[state[name] for state in states] for name in MOMENTS]
        masters = [state["master"] for state in states] if "master" in states[0] else None
        adamw_slices_(
            params, grads, *moments, step=step, lr=float(group["lr"]), betas=group["betas"],
            eps=group["eps"], weight_decay=group["weight_decay"], masters=masters, key=key, ids=ids,
        )  # fmt: skip
        for state in states:  # a refused step is none
            state["step"] = step

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but moments and masters keep their dtype, where torch rounds them to the parameter's.

        This optimizer has masters where it wants them, whatever the saved one had; it takes the state of
        `torch.optim.AdamW` too.
        """
        super().load_state_dict(state_dict)
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for p, i in zip(params, saved):
            given = state_dict["state"].get(i, {})
            for name in STATES:
                if name in given:
                    self.state[p][name] = given[name].to(p.device, wide(p), copy=True).contiguous()
            if given:
                self.state[p]["step"] = int(given["step"])
                if not (self.master_weights and p.element_size() == 2):
                    self.state[p].pop("master", None)

    def state_bytes(self) -> dict[str, int]:
        """Bytes that moments and masters take now."""
        found = {"moments": 0, "masters": 0}
        for state in self.state.values():
            for name in STATES:
                if name in state:
                    found["masters" if name == "master" else "moments"] += state[name].nbytes
        return found


def refuse_shards(op: str, params: Iterable[Tensor]) -> None:
    """Whole MLPs are trained as they are, so nothing else notices what FSDP2 makes of them."""
    if any(in_shards(p) for p in params):
        wanted = "a whole tensor in each process (DistributedDataParallel)"
        _check.fail(op, "params", wanted, "a DTensor, in shards (FSDP2, tensor parallelism)")


def refuse_alone(op: str) -> None:
    """Past the forward of DistributedDataParallel its gradients would stay those of one process, without a word."""
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    if not (distributed.is_available() and distributed.is_initialized()):
        return
    count = distributed.get_world_size()
    if count > 1 and DistributedDataParallel._get_active_ddp_module() is None:
        wanted = "a call within DistributedDataParallel's forward (train on its own loss: wrapped(**batch).loss)"
        _check.fail(op, "model", wanted, f"{count} processes and none")
