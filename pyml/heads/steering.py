"""Steering without training: outputs of chosen heads are moved from one behaviour's distribution to another's.

After Sparse Activation Control (NeurIPS 2024): a Gaussian is fitted to the outputs of a head under positive and under
negative prompts, and an output z becomes

    mu+ + S+^(1/2) S-^(-1/2) (z - mu-)

The paper has published no code, and this map has not been compared with its text: read it as "an affine map between two
Gaussians in the manner of that paper". It moves prompts of any other kind too, which pass through the same heads. So
there is a second map, which is ours: it moves z along mu+ - mu- alone, as far as a coordinate w of it says,

    z + (mu+ - mu-) w.(mu+ - z),    w ~ (S+ + S-)^(-1) (mu+ - mu-),  w.(mu+ - mu-) = 1

With prompts that should stay as they are in S+, w is blind to what they differ in.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyml.heads import delta
from pyml.heads.acting import ACTS, Acting
from pyml.heads.adapters import adapter, at
from pyml.heads.edits import Edit, as_batches, install, outputs
from pyml.heads.hooks import evaluating, hooked
from pyml.heads.selection import Head, as_heads, whole
from pyml.ops import _check

POSITIONS = ("last", "all")


class _Switch:
    """Hooks that are there only while it is on."""

    def __init__(self, model: Any, op: str) -> None:
        self.adapter = adapter(model, op)
        self._acting = Acting(self.adapter, op)
        self._handles: list[Any] = []
        self._enabled = False
        self._before: list[bool] = []

    def _hooks(self) -> list[Any]:
        raise NotImplementedError

    def enable(self) -> None:
        """Steer from the next forward on."""
        self._enabled = True
        self._refresh()

    def disable(self) -> None:
        """The model is as it was."""
        self._enabled = False
        self._refresh()

    close = disable

    def prompt_ends(self, ends: Tensor) -> AbstractContextManager[None]:
        """Within it, rows of a forward hold prompts and what follows them, as in a loss: what acts from the last token
        of a prompt on begins at ``ends`` ``[B]``, not at the last real token of the row."""
        return self._acting.prompt_ends(ends)

    def _refresh(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = self._hooks() if self._enabled else []

    def __enter__(self) -> Any:
        self._before.append(self._enabled)
        self.enable()
        return self

    def __exit__(self, *_: Any) -> None:
        if not self._before.pop():  # the inner one of two leaves the outer one on
            self.disable()


@dataclass
class Control:
    """The maps of one behaviour: head i's output z becomes ``matrix[i] z + values[i]`` at strength 1."""

    heads: list[Head]
    matrix: Tensor  # [k, D, D]
    values: Tensor  # [k, D]
    strength: float
    on: bool = True
    act: str = "all"

    def map(self, index: int) -> tuple[Tensor, Tensor]:
        """Matrix and values at this strength: between the identity at 0 and the whole map at 1."""
        eye = torch.eye(self.matrix.shape[-1], dtype=self.matrix.dtype, device=self.matrix.device)
        return eye + self.strength * (self.matrix[index] - eye), self.strength * self.values[index]


class HeadSteering(_Switch):
    """Moves the outputs of chosen heads while it is enabled; several behaviours at once.

        steering = HeadSteering(model)
        steering.add("honest", heads, honest_prompts, other_prompts)
        with steering:
            model.generate(...)

    Where two controls share a head, the one that was added first acts first.

    Args:
        model: a causal LM of a layout that `pyml.heads.adapter` knows. Its weights do not change.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model, "HeadSteering")
        self._controls: dict[str, Control] = {}

    @property
    def controls(self) -> dict[str, float]:
        """Strength by name; 0 for one that is off."""
        return {name: control.strength if control.on else 0.0 for name, control in self._controls.items()}

    def add(
        self, name: str, heads: Any, positive: Any, negative: Any, *, strength: float = 1.0, shrinkage: float = 0.1,
        positions: str = "last", act: str = "all", map: str = "gaussian", kept: Any = None, beside: bool = False,
    ) -> None:  # fmt: skip
        """Fit a control and switch it on.

        Args:
            name: what `on` and `off` call it; an old one of that name is replaced.
            heads: pairs (layer, head), or a bool mask ``[L, H]``.
            positive, negative: batches of prompts with and without the behaviour (one or a list of them).
            strength: 1 moves the negative Gaussian onto the positive one.
            shrinkage: in (0, 1]: how far each covariance is drawn to a multiple of the identity, which makes it
                invertible with few samples. With 1 the map is a shift and a change of scale.
            positions: fit at the "last" real token, or at "all" real tokens.
            act: where outputs are moved: at "all" positions; from the "last" token of the prompt on, at generated ones
                too; or "once", at the last token of the prompt alone. A forward without a cache counts as a prompt, see
                `prompt_ends`.
            map: "gaussian" carries the one Gaussian onto the other; "direction" moves along the difference of their
                means alone, see the module.
            kept: batches of other prompts that should stay as they are, for "direction".
            beside: fit with the other controls that are on acting, not on the model itself.
        """
        op = "HeadSteering.add"
        a = self.adapter
        if not isinstance(name, str) or not name:
            _check.fail(op, "name", "a name", repr(name))
        chosen = as_heads(op, "heads", heads, a.num_layers, a.num_heads)
        if not chosen:
            _check.fail(op, "heads", "at least one head", "none")
        _check.member(op, "positions", positions, POSITIONS)
        _check.member(op, "act", act, ACTS)
        _check.member(op, "map", map, MAPS)
        if kept is not None and map == "gaussian":
            _check.fail(op, "kept", 'map="direction" beside it', "gaussian")
        if not 0 < shrinkage <= 1:
            _check.fail(op, "shrinkage", "a number in (0, 1]", shrinkage)
        size = _number(op, strength)
        before, enabled = self._controls, self._enabled
        self._controls = {other: control for other, control in before.items() if beside and other != name}
        self.enable()
        try:
            sides: dict[str, dict[Head, Tensor]] = {}
            for side, data in (("positive", positive), ("negative", negative), ("kept", kept)):
                several = [] if side == "kept" and data is None else as_batches(op, a, data, side)
                found: dict[Head, list[Tensor]] = {head: [] for head in chosen}
                for head, z in outputs(a, several, chosen, positions):
                    found[head].append(z.double())
                sides[side] = {head: torch.cat(parts) for head, parts in found.items() if parts}
            maps = []
            for head in chosen:
                plus, minus, rest = (sides[side].get(head) for side in ("positive", "negative", "kept"))
                assert plus is not None and minus is not None
                mean, covariance = gaussian(plus, shrinkage)
                if rest is not None:
                    covariance = gaussian(torch.cat([plus, rest]), shrinkage)[1]
                maps.append(MAPS[map](*gaussian(minus, shrinkage), mean, covariance))
        finally:
            self._controls, self._enabled = before, enabled
            self._refresh()
        matrix, values = (torch.stack(parts).float() for parts in zip(*maps))
        self._controls[name] = Control(chosen, matrix, values, size, act=act)
        self._refresh()

    def on(self, name: str, strength: float | None = None) -> None:
        """Switch a control on, at another strength where one is given."""
        control = self._named("HeadSteering.on", name)
        control.on = True
        control.strength = control.strength if strength is None else _number("HeadSteering.on", strength)
        self._refresh()

    def off(self, name: str) -> None:
        self._named("HeadSteering.off", name).on = False
        self._refresh()

    def _named(self, op: str, name: str) -> Control:
        if name not in self._controls:
            _check.fail(op, "name", f"one of {sorted(self._controls)}", repr(name))
        return self._controls[name]

    def _hooks(self) -> list[Any]:
        on = [control for control in self._controls.values() if control.on and control.strength]
        handles = [] if all(control.act == "all" for control in on) else [self._acting.install()]
        for act, several in groupby(on, key=lambda control: control.act):  # each acts on what those before it left
            handles += install(self.adapter, _edits(list(several)), self._acting.at(act))
        return handles

    def save(self, path: str | Path) -> None:
        """All controls, as safetensors."""
        tensors, facts = {}, {}
        for name, c in self._controls.items():
            tensors[f"{name}.matrix"], tensors[f"{name}.values"] = c.matrix, c.values
            facts[name] = {"heads": c.heads, "strength": c.strength, "on": c.on, "act": c.act}
        delta.write(path, tensors, {**delta.sizes(self.adapter), "controls": facts})

    def load(self, path: str | Path) -> None:
        """Controls of a model of the same layout and sizes; those of the same names are replaced, none where one
        does not fit."""
        op = "HeadSteering.load"
        tensors, metadata = delta.read(op, path)
        delta.check(op, "controls", metadata, delta.sizes(self.adapter))
        controls = metadata.get("controls")
        if not isinstance(controls, dict) or not all(isinstance(facts, dict) for facts in controls.values()):
            _check.fail(op, "path", "a file that HeadSteering.save wrote", path)
        found = {name: self._read(op, name, facts, tensors) for name, facts in controls.items()}
        self._controls.update(found)
        self._refresh()

    def _read(self, op: str, name: str, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Control:
        """A control as `save` wrote it, checked."""
        a = self.adapter
        heads = as_heads(op, "path", facts.get("heads"), a.num_layers, a.num_heads)
        act = facts.get("act", "all")  # files of before had no other
        _check.member(op, "path", act, ACTS)
        parts = []
        for part, shape in (("matrix", (len(heads), a.head_dim, a.head_dim)), ("values", (len(heads), a.head_dim))):
            key = f"{name}.{part}"
            given = tensors.get(key)
            if given is None or given.shape != shape or not given.is_floating_point():
                got = "none" if given is None else f"{list(given.shape)} of {given.dtype}"
                _check.fail(op, "path", f"floats of shape {list(shape)} for {key}", got)
            parts.append(given.to(a.device))
        matrix, values = parts
        return Control(heads, matrix, values, _number(op, facts.get("strength")), bool(facts.get("on", True)), act)


def _edits(controls: list[Control]) -> dict[int, Edit]:
    """One edit a layer; where controls share a head, the maps of the later ones are of what the earlier ones make."""
    maps: dict[Head, tuple[Tensor, Tensor]] = {}
    for control in controls:
        for i, head in enumerate(control.heads):
            matrix, values = control.map(i)
            if head in maps:
                values = matrix @ maps[head][1] + values
                matrix = matrix @ maps[head][0]
            maps[head] = matrix, values
    edits = {}
    for layer in sorted({layer for layer, _ in maps}):
        members = tuple(head for at_layer, head in sorted(maps) if at_layer == layer)
        matrix, values = (torch.stack(parts) for parts in zip(*(maps[layer, h] for h in members)))
        edits[layer] = Edit(members, values, matrix)
    return edits


class LayerSteering(_Switch):
    """The rival: one vector for a whole layer, the difference of mean hidden states, added to the residual stream.

    Args:
        model, positive, negative, strength, act: as in `HeadSteering`; the means are over last real tokens.
        layer: behind which block the vector is added.
    """

    def __init__(
        self, model: Any, layer: int, positive: Any, negative: Any, *, strength: float = 1.0, act: str = "all"
    ) -> None:
        op = "LayerSteering"
        super().__init__(model, op)
        a = self.adapter
        _check.member(op, "act", act, ACTS)
        if not whole(layer) or not 0 <= layer < a.num_layers:
            _check.fail(op, "layer", f"a layer in 0..{a.num_layers - 1}", layer)
        self.layer, self.strength, self.act = layer, _number(op, strength), act
        means = [self._mean(as_batches(op, a, data, name)) for name, data in
                 (("positive", positive), ("negative", negative))]  # fmt: skip
        self.vector = means[0] - means[1]

    def _mean(self, several: list[dict[str, Tensor]]) -> Tensor:
        found: list[Tensor] = []
        with torch.no_grad(), evaluating(self.adapter.model), hooked() as handles:
            for batch in several:
                last = self.adapter.last(batch)
                keep = lambda m, args, out, last=last: found.append(at(_first(out), last))  # noqa: E731
                handle = self.adapter.layers[self.layer].register_forward_hook(keep)
                handles.append(handle)
                self.adapter.hidden(batch)
                handle.remove()
        return torch.cat(found).double().mean(0)

    def _hooks(self) -> list[Any]:
        where = self._acting.at(self.act)

        def behind(module: Any, args: Any, out: Any) -> Any:
            hidden = _first(out)
            step = self.strength * self.vector.to(hidden.device, hidden.dtype)
            moved = hidden + step if where is None else hidden.index_put(where(hidden), step, accumulate=True)
            return (moved, *out[1:]) if isinstance(out, tuple) else moved

        noted = [] if where is None else [self._acting.install()]
        return [*noted, self.adapter.layers[self.layer].register_forward_hook(behind)]


def gaussian(z: Tensor, shrinkage: float) -> tuple[Tensor, Tensor]:
    """Mean ``[D]`` and covariance ``[D, D]`` of samples ``[N, D]``; the covariance is drawn to its mean variance."""
    if len(z) < 2:
        _check.fail("HeadSteering.add", "positive, negative", "at least two samples of each", len(z))
    if not bool(z.isfinite().all()):
        _check.fail(
            "HeadSteering.add", "positive, negative", "prompts with finite outputs of these heads", "NaN or inf"
        )
    mean = z.mean(0)
    centred = z - mean
    covariance = centred.t() @ centred / (len(z) - 1)
    eye = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
    variance = covariance.diagonal().mean()
    return mean, (1 - shrinkage) * covariance + shrinkage * variance * eye


def transport(mean: Tensor, covariance: Tensor, to_mean: Tensor, to_covariance: Tensor) -> tuple[Tensor, Tensor]:
    """``A = S+^(1/2) S-^(-1/2)`` and ``b = mu+ - A mu-``. A head whose outputs do not vary is shifted only."""
    if min(covariance.diagonal().max(), to_covariance.diagonal().max()) <= 0:
        matrix = torch.eye(len(mean), dtype=mean.dtype, device=mean.device)
    else:
        matrix = _power(to_covariance, 0.5) @ _power(covariance, -0.5)
    return matrix, to_mean - matrix @ mean


def along(mean: Tensor, covariance: Tensor, to_mean: Tensor, to_covariance: Tensor) -> tuple[Tensor, Tensor]:
    """``A = 1 - d w^T`` and ``b = d (w . mu+)`` with ``d = mu+ - mu-``. A head whose outputs do not vary is shifted."""
    eye = torch.eye(len(mean), dtype=mean.dtype, device=mean.device)
    d, spread = to_mean - mean, covariance + to_covariance
    if float(spread.diagonal().max()) <= 0:
        return eye, d
    w = _power(spread, -1.0) @ d
    size = w @ d
    if float(size) <= 0:  # the means are one: there is nothing to move
        return eye, torch.zeros_like(d)
    w = w / size
    return eye - torch.outer(d, w), d * (w @ to_mean)


MAPS = {"gaussian": transport, "direction": along}


def _power(symmetric: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(symmetric)
    floor = values[-1] * 1e-12
    return (vectors * values.clamp(min=floor).pow(exponent)) @ vectors.t()


def _first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def _number(op: str, value: Any) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or value != value or abs(value) == float("inf"):
        _check.fail(op, "strength", "a finite number", value)
    return float(value)
