"""Checkpoints of a private optimizer: what is spent is not forgotten, and no noise comes again for other sums."""

import hashlib
import os
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from pyml.ops import _check
from pyml.optim._keys import keys
from pyml.optim._scales import Scales
from pyml.privacy import History
from pyml.privacy import _arguments as arguments

OP = "HeteroNoiseOptimizer"
FORMAT = 3
RESUME = ("fresh", "repeat")
RULES = ("multiplier", "sample_rate", "clip", "mode", "groups", "global_clip", "divide_by")


class Checkpoints(Optimizer):
    """The part of `HeteroNoiseOptimizer` that is saved and loaded."""

    optimizer: Optimizer
    params: list[Tensor]
    history: History
    steps: int
    world: int
    sample_rate: float
    resume: str
    _kind: str
    _scales: Scales
    _key: Tensor
    _batches: Tensor
    _run: str
    _used: bool
    _other_scale: str | None
    _skips: list[bool]
    _sums: list[Tensor] | None
    _kept: list[list[Tensor]]

    def _begin(self, seed: int | None) -> None:
        """The keys, and what the run is made with: a checkpoint of another make is another run."""
        self._key, self._batches = keys(OP, seed, self.params[0].device)
        self._agree()
        self.steps, self._used, self._other_scale = 0, False, None
        made = hashlib.sha256(self._scales.digest.encode())
        made.update(type(self.optimizer).__name__.encode())
        for group in self.optimizer.param_groups:  # as they are before a schedule changes them
            plain = [(name, value) for name, value in sorted(group.items()) if name not in ("params", "initial_lr")]
            made.update(repr([(n, v.tolist() if isinstance(v, Tensor) else v) for n, v in plain]).encode())
        self._made = made.hexdigest()

    def _how(self) -> dict[str, Any]:
        """What the sums of a step follow from, beside data and weights."""
        return {**{name: getattr(self, name) for name in RULES}, "made": self._made}

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """The state of the wrapped optimizer, and under "privacy" key, step and history. To be kept secret: who has the
        key can take the noise away."""
        privacy = {"format": FORMAT, "key": self._key.cpu().clone(), "batches": self._batches.cpu().clone(),
                   "step": self.steps, "noise": self._kind, "how": self._how(),
                   "scale": self._scales.digest, "history": self.history.state_dict()}  # fmt: skip
        return {**self.optimizer.state_dict(), "privacy": privacy}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Go on where a checkpoint was made: steps, history and the wrapped optimizer's state.

        The keys of noise and batches are new ones, since what a run does after its checkpoint seldom comes again in
        every bit, and the same noise on another sum gives both away. With ``resume="repeat"`` they are those of the
        checkpoint, with the number of its next step, and the run repeats what it may have released after it; new ones
        all the same where multiplier, rate, clip norms or divisor differ, or the scale, the kind of optimizer or its
        options (learning rate, momentum) at construction; or, at the first step, the scale, unless `set_scale` has
        given another one since. A seed is always that of the checkpoint.

        Steps after the checkpoint that anybody has seen are spent under new keys, and to be recorded. What this
        history has and the loaded one has not is kept. With several processes all of them load, since they agree on
        the keys, and where one of them cannot, it is an error of all.
        """
        error: Exception | None = None
        try:
            privacy, history = self._read(state)
            self.optimizer.load_state_dict({name: value for name, value in state.items() if name != "privacy"})
        except Exception as found:  # the other processes would wait for this one
            error = found
        if self.anywhere(error is not None):
            if error is not None:
                raise error
            _check.fail(OP, "state", "one that every process can load", "an error in another process")
        self.discard()
        history.keep(self.history)
        scale = history.facts.get("scale", self._scales.text)  # of the last step, until there is another one
        history.facts |= {**self.history.facts, "scale": scale}
        self.history, self.steps = history, int(privacy["step"])
        self._mark()
        self._key, self._batches = (
            t.to(self.params[0].device, copy=True) for t in (privacy["key"], privacy["batches"])
        )
        differs = self.resume != "repeat" or privacy["how"] != self._how()
        if self.anywhere(differs and self._kind != "seeded"):
            self.renew_key()
        else:
            self._other_scale = None if self._kind == "seeded" else privacy.get("scale", "")
            self._agree()

    def _read(self, state: Mapping[str, Any]) -> tuple[Mapping[str, Any], History]:
        """What is private of a state, looked at; nothing has changed."""
        privacy = state.get("privacy")
        names = {"format", "key", "batches", "step", "noise", "how", "history"}
        if not isinstance(privacy, Mapping) or not names <= set(privacy) or privacy["format"] != FORMAT:
            _check.fail(OP, "state", f'one of state_dict(), with "privacy" of format {FORMAT}', sorted(state))
        step = arguments.count(OP, "step of the state", privacy["step"])
        key, batches = privacy["key"], privacy["batches"]
        for name, t, dtype, size in (("key", key, torch.int64, 1), ("batches", batches, torch.uint8, 32)):
            if not isinstance(t, Tensor) or t.dtype != dtype or t.shape != (size,):
                _check.fail(OP, f"{name} of the state", f"{dtype} of shape [{size}]", type(t).__name__)
        if self._used and step < self.steps:
            _check.fail(OP, "step of the state", f"at least {self.steps}, as earlier noise would be used again", step)
        if self._used and not torch.equal(key.cpu(), self._key.cpu()):
            _check.fail(OP, "key of the state", "that of this run, which has taken steps", "another")
        if privacy["noise"] != self._kind:
            _check.fail(OP, "noise of the state", repr(self._kind), repr(privacy["noise"]))
        history = History(provenance="public")
        history.load_state_dict(privacy["history"])
        if history.steps < step:
            _check.fail(OP, "history of the state", f"at least {step} steps", history.steps)
        return privacy, history

    def renew_key(self) -> None:
        """Other keys from the operating system: no noise of before comes again, whatever the step. Not for seeds. With
        several processes all of them call it."""
        if self._kind == "seeded":
            _check.fail(OP, "renew_key", "a run without a seed", "a seeded one")
        self._key, self._batches = keys(OP, None, self.params[0].device)
        self._used, self._other_scale = False, None
        self._agree()

    def _spend(self, multiplier: float, total_variation: float = 0.0) -> int:
        """Record a step before its noise is made: no error can have it made twice. The number of the step."""
        self.history.record(multiplier, self.sample_rate, total_variation=total_variation, by=self._run)
        self.history.facts["scale"] = self._scales.text
        self.steps, self._used = self.steps + 1, True
        return self.steps - 1

    def _settle(self) -> None:
        """Before the first batch or step after a checkpoint: its scale is the one of now, or its keys are not."""
        then, self._other_scale = self._other_scale, None
        if then is not None and self.anywhere(then != self._scales.digest):
            self.renew_key()

    def _start(self) -> int:
        """Batches begin: the number of the first, and the key that all of them are drawn with."""
        self._settle()
        return self.discard()

    def batch_key(self) -> bytes:
        """32 secret bytes for `PoissonBatches`: saved and loaded with the noise's key."""
        return bytes(self._batches.tolist())

    def discard(self) -> int:
        """Forget parts of a batch that were not released, and signals; the number of the next step."""
        self._skips, self._sums, self._kept = [], None, []
        return self.steps

    def _agree(self) -> None:
        """All ranks have the keys of rank 0, and one name for the steps under them."""
        if self.world > 1:
            dist.broadcast(self._key, 0)
            dist.broadcast(self._batches, 0)
        self._run = hashlib.sha256(b"run" + self.batch_key()).hexdigest()[:16]

    def _mark(self) -> None:
        """What the owner records by hand is the same on all ranks."""
        mark = torch.tensor(list(os.urandom(8)), dtype=torch.uint8, device=self.params[0].device)
        if self.world > 1:
            dist.broadcast(mark, 0)
        self.history.by = bytes(mark.tolist()).hex()

    def anywhere(self, here: bool) -> bool:
        """Whether it is so in any process."""
        if self.world == 1:
            return here
        found = torch.tensor([int(here)], device=self.params[0].device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return bool(found)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        expected = "state_dict() loaded by another optimizer, as a copy would give the same noise to other sums"
        _check.fail(type(self).__name__, "copy", expected, "copy, deepcopy or pickle", TypeError)
