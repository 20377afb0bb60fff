"""Classes of pictures by a trained arm, as a CSV file."""

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pyml.methods import UserError
from pyml.methods._checkpoint import load_checkpoint, write_atomically
from pyml.methods._pictures import list_pictures, no_picture
from pyml.methods.enla.archs import Arm, load_arm
from pyml.methods.enla.clip import same_clip
from pyml.methods.enla.data import Loader, check_classes, open_file
from pyml.methods.enla.task import Split, Task

BATCH = 32
IMAGES = "images"  # the only split of a model that predicts


@dataclass(frozen=True)
class Outcome:
    """What became of one file: its classes, the most probable first, or why there are none."""

    source: Path
    found: list[tuple[str, float]]
    error: str | None = None


class Predictor:
    """The arm of a checkpoint for the classes that it learned, or for others by their names alone."""

    def __init__(
        self, checkpoint: Path, clip: Path | None = None, classes: Sequence[str] | None = None, device: str = "cpu",
        *, shown: bool = True,
    ) -> None:  # fmt: skip
        info = load_checkpoint(checkpoint).info
        if info.get("method") != "enla":
            raise UserError(f"checkpoint: {checkpoint} belongs to the method {info.get('method')!r}, expected 'enla'")
        self.classes = list(info["classes"] if classes is None else classes)
        check_classes(self.classes, "classes")
        self.clip = same_clip(info["clip"], clip, shown=shown)
        torch.nn.Module.to(self.clip.model, device)
        self.device = device

        def split(names: list[str]) -> Split:
            return Split(torch.empty(0, 3, self.clip.side, self.clip.side), torch.empty(0, dtype=torch.int64), names)

        task = Task(info["task"], split(info["classes"]), {IMAGES: split(self.classes)}, info["templates"])
        self.arm: Arm = load_arm(checkpoint, self.clip, task)

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        """``[B, 3, R, R]`` -> ``[B, K]``, rows that sum to 1."""
        return self.arm.logits(images.to(self.device), IMAGES).softmax(1).cpu()

    def files(self, source: Path, top: int = 1) -> Iterator[Outcome]:
        """A picture or every picture of a folder; one that cannot be read does not stop the others.

        Other files of the folder, by their suffix, come first, each with the sentence that it is left out.
        """
        if not source.exists():
            raise UserError(f"input: no file or folder {source}")
        paths, others = list_pictures(source, "input") if source.is_dir() else ([source], [])
        yield from (Outcome(path, [], no_picture(path)) for path in others)
        load = Loader(open_file, self.clip.preprocess)
        for start in range(0, len(paths), BATCH):
            ready: dict[Path, Tensor] = {}
            errors: dict[Path, str] = {}
            for path in paths[start : start + BATCH]:
                try:
                    ready[path] = load(path)
                except UserError as error:
                    errors[path] = str(error)
            rows = iter(self.probabilities(torch.stack(list(ready.values()))) if ready else ())
            for path in paths[start : start + BATCH]:
                if path in errors:
                    yield Outcome(path, [], errors[path])
                    continue
                best = next(rows).topk(min(top, len(self.classes)))
                names = [self.classes[index] for index in best.indices.tolist()]
                yield Outcome(path, list(zip(names, best.values.tolist())))


def write_csv(outcomes: Sequence[Outcome], path: Path) -> None:
    """Columns ``file``, ``class``, ``probability``; a line for each class of a file."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "class", "probability"])
    for outcome in outcomes:
        writer.writerows([outcome.source, name, f"{probability:.6f}"] for name, probability in outcome.found)
    write_atomically(path, lambda part: part.write_text(text.getvalue()))
