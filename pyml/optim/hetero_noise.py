"""DP-SGD around any torch optimizer, with noise that differs from element to element: clip, add up, add noise, step."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import LBFGS, SGD, Optimizer

from pyml.ops import _check, clip_sum, hetero_noise_
from pyml.ops._hetero_noise_arguments import check_groups
from pyml.optim._checkpoints import OP, RESUME, Checkpoints
from pyml.optim._scales import Scales
from pyml.privacy import Epsilon, History, effective_multiplier, noise_kind, secure_sum
from pyml.privacy import _arguments as arguments

MODES = ("whitened", "l2", "group")


class HeteroNoiseOptimizer(Checkpoints):
    """Makes each step of an optimizer private: per-sample gradients are clipped and added up, and get noise once.

    The parameters need ``grad_sample`` ``[B, *shape]`` after each backward pass, as Opacus' GradSampleModule gives it;
    `make_private` sets all of that up. Plain SGD (no momentum, no weight decay, one process) is updated in the same
    pass over memory that makes the noise.

    Args:
        optimizer: any torch optimizer that needs no closure. Its learning rates may be scheduled.
        noise_multiplier: the effective one, as `pyml.privacy.noise_multiplier` gives it. Each mode derives from it the
            std of its noise, so that all modes have the same epsilon.
        clip: clip norm of a sample's gradient; with groups a list, one a group.
        sample_rate: the chance of each record to be in a batch.
        expected_batch_size: what a sum is divided by (sample rate times records): never the actual batch size, which
            is private.
        mode: what is clipped, see `pyml.privacy.effective_multiplier`: ``"whitened"`` (the norm of g / scale),
            ``"l2"``, ``"group"`` (an L2 norm for each group of parameters).
        scale: None (1 everywhere), a number, a `pyml.privacy.Scale`, or a list with a number, a tensor of its shape or
            a pair (row factors, column factors) for each parameter that requires a gradient.
        provenance: of the scale; needed wherever the scale is neither 1 nor a Scale.
        groups: beside a list of clip norms, the group of each of these parameters; with ``"whitened"`` the norms of
            groups are whitened.
        global_clip: also a bound on the norm over all groups; not for ``"l2"``.
        loss_reduction: "mean", or "sum": then nothing is divided.
        sampling: "poisson", "shuffled" or "fixed_size", see `pyml.privacy.epsilon`.
        seed: makes the noise reproducible, and so not private: every epsilon says so. By default the key comes from
            the operating system.
        secure: noise on a grid by `pyml.privacy.secure_sum`: CPU, one process, ``"whitened"``; a thousand times slower,
            and virtual steps keep all gradients until the step. Philox has no part in it.
        resume: what a loaded checkpoint goes on with, see `load_state_dict`: "fresh" keys; or "repeat", which is your
            word that data, scales, learning rates, machine and every random number (dropout, augmentation) come again.
        distributed: whether the processes of torch.distributed train one model together: by default where there are
            several. Each clips its own samples and adds its share of the rows of one noise, then sums are added up; the
            result is that of one process. All use the key of rank 0, and all must step equally often.

    Attributes:
        history: `pyml.privacy.History`: each step is recorded before its noise is used.
        steps: how many steps were released, those of empty batches included; the number of the next noise.
        multiplier, std: the effective multiplier, and the factor of scale * z on the sum.

    Raises:
        ValueError, TypeError: one sentence naming the argument, what was expected and what came.
    """

    GHOST = False  # whether gradients of samples are never there: `pyml.optim.ghost`

    def __init__(
        self, optimizer: Optimizer, *, noise_multiplier: float, clip: float | Sequence[float], sample_rate: float,
        expected_batch_size: float, mode: str = "whitened", scale: Any = None, provenance: Any = None,
        groups: Sequence[int] | None = None, global_clip: float | None = None, loss_reduction: str = "mean",
        sampling: str = "poisson", seed: int | None = None, secure: bool = False, resume: str = "fresh",
        distributed: bool | None = None,
    ) -> None:  # fmt: skip
        # Optimizer.__init__ is not called: groups, state and hooks are those of the wrapped optimizer.
        if not isinstance(optimizer, Optimizer) or isinstance(optimizer, HeteroNoiseOptimizer | LBFGS):
            expected = "a torch optimizer that is not private yet and needs no closure"
            _check.fail(OP, "optimizer", expected, type(optimizer).__name__, TypeError)
        _check.member(OP, "mode", mode, MODES)
        _check.member(OP, "loss_reduction", loss_reduction, ("mean", "sum"))
        _check.member(OP, "resume", resume, RESUME)
        self.optimizer, self.mode = optimizer, mode
        self.params: list[Tensor] = [p for g in optimizer.param_groups for p in g["params"] if p.requires_grad]
        if not self.params:
            _check.fail(OP, "optimizer", "at least one parameter that requires a gradient", "none")
        several = isinstance(clip, list | tuple)
        if several != (mode == "group") and (several, mode) != (True, "whitened"):
            expected = "a list of one clip norm a group" if mode == "group" else "one clip norm"
            _check.fail(OP, "clip", f'{expected}, for mode "{mode}"', clip)
        if several != (groups is not None):
            _check.fail(OP, "groups", "the group of each parameter beside a list of clip norms, else none", groups)
        if mode == "l2" and global_clip is not None:
            _check.fail(OP, "global_clip", 'none, for mode "l2"', global_clip)
        self.groups = None if groups is None else list(groups)
        self.clip: float | list[float] = list(clip) if isinstance(clip, list | tuple) else clip  # type: ignore[assignment]
        self.global_clip = global_clip
        check_groups(OP, self.clip, self.groups, global_clip, len(self.params))
        self.multiplier = arguments.not_negative(OP, "noise_multiplier", noise_multiplier)
        self.sample_rate = arguments.share(OP, "sample_rate", sample_rate)
        size = arguments.positive(OP, "expected_batch_size", expected_batch_size)
        self.divide_by = size if loss_reduction == "mean" else 1.0
        self.secure, self.resume = secure, resume
        self._kind = noise_kind(seed=seed, secure=secure, ghost=self.GHOST)
        together = dist.is_available() and dist.is_initialized() if distributed is None else distributed
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
        if secure and (mode != "whitened" or several or global_clip is not None or self.world > 1):
            got = f"mode {mode!r}, clip {clip}, global_clip {global_clip}, {self.world} processes"
            _check.fail(OP, "secure", 'mode "whitened" in one process, with one clip norm, where it is True', got)
        self._bad: Tensor | int = 0
        self._skips: list[bool] = []
        self._sums: list[Tensor] | None = None
        self._kept: list[list[Tensor]] = []
        self._use(Scales(OP, scale, provenance, self.params))
        self._begin(seed)
        facts = {"clip": self.clip, "norm": mode, "global clip": global_clip, "divided by": self.divide_by}
        facts["scale"] = self._scales.text
        source = list(self._scales.provenance)
        self.history = History(provenance=source, sampling=sampling, noise=self._kind, facts=facts)
        self.history.pay(self._scales.digest, ())
        self._mark()

    # --- the scale and the budget ---

    def _use(self, scales: Scales) -> None:
        forms: Any = scales.forms
        if self.groups is not None:
            members = [[i for i, k in enumerate(self.groups) if k == n] for n in range(len(self.clip))]  # type: ignore[arg-type]
            if not all(members):
                _check.fail(OP, "groups", "a parameter in each group", self.groups)
            if self.mode == "group":
                forms = [[scales.forms[i] for i in group] for group in members]
        unit = effective_multiplier(1.0, self.clip, self.mode, forms, self.global_clip)
        if unit == 0:
            _check.fail(OP, "scale", f'entries above 0 in mode "{self.mode}"', 0)
        self.std, self._scales = self.multiplier / unit, scales

    def set_scale(self, scale: Any, provenance: Any = None) -> None:
        """Use another scale from the next step on, such as one of the last released iterate.

        The multiplier stays what it was, so the schedule does not depend on outputs; the history pays for both scales.
        """
        if self._sums is not None or self._kept:
            _check.fail(OP, "scale", "the same scale within a batch", "another after a virtual step")
        scales = Scales(OP, scale, provenance, self.params)
        self._use(scales)
        self._other_scale = None
        self.history.pay(scales.digest, scales.provenance)
        self.history.facts["scale"] = scales.text

    def epsilon(self, delta: float, accountant: str = "pld") -> Epsilon:
        """The epsilon that is provable for all steps so far; infinite, with a reason, where nothing is."""
        return self.history.epsilon(delta, accountant)

    @property
    def bad(self) -> int:
        """How many samples of this process had a NaN or an infinity, and were left out. Private: not to be released."""
        return int(self._bad)

    # --- steps ---

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Clip and add up the gradients of the batch, add noise, divide, and step. A closure is called once before."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._only_ours()
        self._collect(self._per_sample())
        if not (self._skips and self._skips.pop(0)):
            self._release()
        return loss

    @torch.no_grad()
    def virtual_step(self) -> None:
        """Clip and add up a part of a batch; nothing is released. All parts must be of one Poisson batch."""
        self._collect(self._per_sample())

    @torch.no_grad()
    def empty_step(self) -> None:
        """The step of an empty batch, for models that cannot run on one: noise is added and the step counts."""
        self._only_ours()
        self._collect(self._none())
        self._release()

    def signal_skip_step(self, do_skip: bool = True) -> None:
        """Make the next `step` without a signal a virtual one: Opacus' BatchMemoryManager calls this."""
        self._skips.append(do_skip)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients, those of samples too. Sums of virtual steps stay until the step."""
        for p in self.params:
            p.grad_sample = None  # type: ignore[attr-defined]
        self.optimizer.zero_grad(set_to_none)

    def _only_ours(self) -> None:
        """No parameter that was frozen when this was made steps by the gradient that it has by now."""
        ours = {id(p) for p in self.params}
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None and id(p) not in ours:
                    expected = "gradients of the parameters that required them when it was made"
                    _check.fail(OP, "optimizer", expected, f"one of another, of shape {list(p.shape)}")

    def _per_sample(self) -> list[Tensor]:
        found = []
        for i, p in enumerate(self.params):
            given = getattr(p, "grad_sample", None)
            if isinstance(given, list):
                if len(given) != 1:  # a record may be in several batches: its share of the sum would have no bound
                    expected = "one backward pass before step() or virtual_step()"
                    _check.fail(OP, f"grad_sample of parameter {i}", expected, f"{len(given)} of them")
                given = given[0]
            if not isinstance(given, Tensor):
                expected = "per-sample gradients from a backward pass through Opacus' GradSampleModule"
                _check.fail(OP, f"grad_sample of parameter {i}", expected, type(given).__name__)
            if given.shape[1:] != p.shape:
                _check.fail(OP, f"grad_sample of parameter {i}", f"[B, *{list(p.shape)}]", list(given.shape))
            found.append(given.detach())
        return found

    def _collect(self, grads: list[Tensor]) -> None:
        if self.secure:
            self._kept.append(grads)
        else:
            # Whitened norms only where they are clipped: groups and L2 clip plain ones.
            whitened = self.mode == "whitened" and not self._scales.uniform
            scale: dict[str, Any] = {"scale": self._scales.scale, "columns": self._scales.columns} if whitened else {}
            sums, _, bad = clip_sum(grads, self.clip, groups=self.groups, global_clip=self.global_clip, **scale)  # type: ignore[arg-type]
            self._bad = self._bad + bad
            self._add(sums)
        for p in self.params:  # nobody sees gradients without noise, and no sample counts twice
            p.grad_sample = p.grad = None  # type: ignore[attr-defined]

    def _add(self, sums: list[Tensor]) -> None:
        if self._sums is None:
            self._sums = sums
        else:
            torch._foreach_add_(self._sums, sums)

    def _none(self) -> list[Tensor]:
        """What `_collect` takes for no sample at all."""
        return [p.new_zeros((0, *p.shape)) for p in self.params]

    def _release(self) -> None:
        self._settle()
        sums = self._secure_sums() if self.secure else self._noisy_sums()
        if sums is None:
            return
        for p, t in zip(self.params, sums):
            p.grad = t.to(p.dtype)
        self.optimizer.step()

    def _noisy_sums(self) -> list[Tensor] | None:
        """The noisy sums, divided; None where plain SGD was done at once."""
        sums, self._sums = self._sums or [], None
        step = self._spend(self.multiplier)
        self._key = key = self._key.to(sums[0].device)
        if self.world == 1 and self._plain_sgd():
            place = {id(p): i for i, p in enumerate(self.params)}
            for group in self.optimizer.param_groups:
                which = [place[id(p)] for p in group["params"] if id(p) in place]
                if not which:
                    continue
                scale, columns = self._scales.subset(which)
                hetero_noise_(
                    [sums[i] for i in which], scale, self.std, key=key, step=step, columns=columns, ids=which,
                    divide_by=self.divide_by, params=[self.params[i] for i in which], lr=float(group["lr"]),
                )  # fmt: skip
            self.optimizer._opt_called = True  # type: ignore[attr-defined]  # or a schedule of it would warn
            return None
        mine = self._scales.share(sums, self.rank, self.world)
        hetero_noise_(
            mine.tensors, mine.scale, self.std, key=key, step=step, columns=mine.columns, ids=mine.ids,
            offsets=mine.offsets, divide_by=self.divide_by if self.world == 1 else 1.0,
        )  # fmt: skip
        if self.world > 1:
            for work in [dist.all_reduce(t, async_op=True) for t in sums]:
                work.wait()
            torch._foreach_div_(sums, self.divide_by)
        return sums

    def _secure_sums(self) -> list[Tensor]:
        kept, self._kept = self._kept, []
        whole = [torch.cat(parts) for parts in zip(*kept)]
        found = secure_sum(whole, self.clip, self.std, scale=self._scales.full(self.params))  # type: ignore[arg-type]
        self._spend(found.multiplier, found.total_variation)
        self._bad = self._bad + found.bad
        torch._foreach_div_(found.sums, self.divide_by)
        return found.sums

    def _plain_sgd(self) -> bool:
        """Whether a step is p - lr * g, and nobody else looks at it."""
        inner = self.optimizer
        if type(inner) is not SGD or inner._optimizer_step_pre_hooks or inner._optimizer_step_post_hooks:
            return False
        wanted = {"momentum": 0, "weight_decay": 0, "maximize": False, "differentiable": False}
        return all(group[name] == value for group in inner.param_groups for name, value in wanted.items())

    # --- what belongs to the wrapped optimizer ---

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """Of the wrapped optimizer."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """Of the wrapped optimizer."""
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """Of the wrapped optimizer."""
        return self.optimizer.defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: such parameters would have neither a scale nor a clip norm."""
        _check.fail(OP, "add_param_group", "all parameters when it is made", "more of them")

    def register_step_pre_hook(self, hook: Any) -> Any:
        """As that of the wrapped optimizer: it sees noisy gradients."""
        return self.optimizer.register_step_pre_hook(hook)

    def register_step_post_hook(self, hook: Any) -> Any:
        """As that of the wrapped optimizer."""
        return self.optimizer.register_step_post_hook(hook)

    def __repr__(self) -> str:
        return f"{OP}({self.optimizer!r}, mode={self.mode!r}, clip={self.clip}, multiplier={self.multiplier:g})"
