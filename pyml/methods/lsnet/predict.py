"""Enhance images of any size with a trained network, and show the two terms it adds and subtracts."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyml.methods import UserError, first_line
from pyml.methods._checkpoint import load_checkpoint
from pyml.methods._options import check_folder
from pyml.methods._pictures import list_pictures, no_picture, read_picture, save_png, to_bytes, to_float
from pyml.methods.lsnet.archs import LSNETS, build
from pyml.nn import LSNet
from pyml.ops import _check

PUBLIC = (".pth", ".pt")
MAPS = ("_compensate", "_exposed")  # ends of the names of the two terms


def load_model(path: Path) -> nn.Module:
    """The network of a checkpoint of `pyml train lsnet`, or of a public weight file (.pth), in evaluation mode."""
    if path.suffix.lower() in PUBLIC:
        return _public(path)
    checkpoint = load_checkpoint(path)
    info = checkpoint.info
    if info.get("method") != "lsnet" or info.get("arch") not in LSNETS:
        raise UserError(f"checkpoint: {path} belongs to the method {info.get('method')!r}, expected 'lsnet'")
    model = build(info["arch"])
    try:
        # evaluation uses the average of the weights where one was kept
        model.load_state_dict(checkpoint.part("average.module") or checkpoint.part("model"))
    except RuntimeError as error:
        raise UserError(f"checkpoint: {path} does not fit its own network: {first_line(error)}") from error
    return model.eval()


def _public(path: Path) -> nn.Module:
    if not path.is_file():
        raise UserError(f"checkpoint: no file {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that is none of its own
        raise UserError(f"checkpoint: {path} is not a weight file of torch ({first_line(error)})") from error
    for key in ("state_dict", "model", "params"):
        state = state.get(key, state) if isinstance(state, dict) else state
    model = LSNet()
    expected = model.state_dict()
    if not isinstance(state, dict):
        raise UserError(f"checkpoint: {path} holds a {type(state).__name__}, expected {len(expected)} named tensors")
    state = {str(name).removeprefix("module."): value for name, value in state.items()}
    for name in sorted(expected.keys() | state.keys()):
        shapes = [list(getattr(tensors.get(name), "shape", "-")) for tensors in (expected, state)]
        if shapes[0] != shapes[1]:
            raise UserError(f"checkpoint: {path}: expected {name} of shape {shapes[0]}, got {shapes[1]}")
    model.load_state_dict(state)
    return model.eval()


@torch.no_grad()
def enhance(model: nn.Module, image: Tensor) -> Tensor:
    """``[3, H, W]`` in 0..1 -> the same, of any size; an odd side is continued by one pixel and cut back."""
    return _on_even_sides(image, model)


@torch.no_grad()
def terms(model: nn.Module, image: Tensor) -> tuple[Tensor, Tensor]:
    """The compensate and the exposed term, each ``[3, H, W]``: the network gives image + compensate - exposed."""
    both = _on_even_sides(image, lambda x: torch.cat(model.terms(x), 1))  # type: ignore[operator]
    return both[:3], both[3:]


def _on_even_sides(image: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
    if image.dim() != 3 or len(image) != 3:
        _check.fail("enhance", "image", "[3, H, W]", list(image.shape))
    height, width = image.shape[1:]
    padded = F.pad(image.unsqueeze(0), (0, width % 2, 0, height % 2), mode="replicate")
    return call(padded)[0, :, :height, :width]


@dataclass
class Outcome:
    """What became of one file: where its result is, or why there is none."""

    source: Path
    written: list[Path]
    error: str | None = None
    range: tuple[float, float] | None = None  # what black and white mean in the maps


def predict_files(
    checkpoint: Path, source: Path, out: Path, *, maps: bool = False, size: int | None = None, device: str = "cpu"
) -> Iterator[Outcome]:
    """Enhance a picture or every picture of a folder into ``out``; a file that cannot be read does not stop the others.

    Other files of the folder, by their suffix, come first, each with the sentence that it is left out. Nothing in the
    folder of the pictures is ever replaced: no one can tell there what is a result and what an original.

    Args:
        maps: also write both terms, ``<name>_compensate.png`` and ``<name>_exposed.png``, on one scale: black is the
            lowest value of the two, white the highest.
        size: resize to a square of this side first (bicubic), as the public code does with 256.
    """
    model = load_model(checkpoint).to(device)
    if not source.exists():
        raise UserError(f"input: no file or folder {source}")
    pictures, others = list_pictures(source, "input") if source.is_dir() else ([source], [])
    check_folder(out)
    yield from (Outcome(path, [], no_picture(path)) for path in others)
    taken: dict[str, Path] = {}
    for path in pictures:
        outcome = Outcome(path, [])
        try:
            targets = [out / f"{path.stem}{end}.png" for end in ("", *(MAPS if maps else ()))]
            for target in targets:
                if target.name in taken:
                    raise UserError(f"{path}: {target.name} would overwrite a result of {taken[target.name].name}")
                if not target.exists():
                    continue
                beside = [target] if target.parent.samefile(path.parent) else []
                if lost := next((file for file in (*pictures, *beside) if target.samefile(file)), None):
                    what = "it" if lost == path else lost.name
                    raise UserError(f"{path}: its result would overwrite {what}: choose another --out")
            _one(model, read_picture(path, size), targets, device, outcome)
        except UserError as error:
            outcome.error = str(error)
        taken.update((target.name, path) for target in outcome.written)
        yield outcome


def _one(model: nn.Module, picture: Tensor, targets: list[Path], device: str, outcome: Outcome) -> None:
    image = to_float(picture.to(device))

    def save(values: Tensor, path: Path) -> None:
        save_png(to_bytes(values).permute(1, 2, 0).cpu(), path)
        outcome.written.append(path)

    target, *maps = targets
    if not maps:
        save(enhance(model, image), target)
        return
    both: Any = terms(model, image)
    save(image + both[0] - both[1], target)
    low, high = (float(bound) for bound in torch.aminmax(torch.stack(both)))
    for path, term in zip(maps, both):
        save((term - low) / max(high - low, 1e-12), path)
    outcome.range = low, high
