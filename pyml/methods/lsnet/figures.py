"""The contact sheet of a run: some test images before and after, and their targets."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from pyml.methods._checkpoint import write_atomically
from pyml.methods._measure import image_scores
from pyml.methods._pictures import to_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = 5
LETTERS = 11  # of a title that fit on an inch


def save_sheet(
    rows: dict[str, Sequence[Tensor]], targets: Sequence[Tensor], names: Sequence[str], path: Path, title: str
) -> None:
    """Write `draw_sheet` as a PNG."""
    figure = draw_sheet(rows, targets, names, title)
    write_atomically(path, lambda part: figure.savefig(part, format="png"))


def draw_sheet(
    rows: dict[str, Sequence[Tensor]], targets: Sequence[Tensor], names: Sequence[str], title: str
) -> "Figure":
    """One row a name with its images and their PSNR, the targets below, as many columns as images.

    Args:
        rows: row name -> images ``[3, H, W]`` in 0..1, as many as targets.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = {**rows, "target": targets}
    height, width = targets[0].shape[1:]
    wide = max(3.0, 2.0 * len(targets))
    heading = textwrap.wrap(title, int(LETTERS * wide))
    tall = (2 * height / width + 0.3) * len(shown) + 0.2 * (1 + len(heading))
    figure = Figure(figsize=(wide, tall), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(shown), len(targets), squeeze=False)
    for axes, (name, images) in zip(grid, shown.items()):
        for column, (axis, image) in enumerate(zip(axes, images)):
            axis.imshow(to_bytes(image).permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            if name != "target":
                psnr = image_scores(image.unsqueeze(0), targets[column].unsqueeze(0))["psnr"]
                axis.set_title(f"{psnr:.1f} dB", fontsize=8, pad=2)
            else:
                axis.set_title(_short(names[column]), fontsize=8, pad=2)
        axes[0].set_ylabel(name, fontsize=9)
    figure.suptitle("\n".join(heading), fontsize=10)
    return figure


def _short(name: str) -> str:
    """A name that stays above its own picture."""
    return name if len(name) <= 26 else f"{name[:12]}…{name[-13:]}"
