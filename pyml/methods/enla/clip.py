"""The frozen CLIP of a run: a folder of a transformers CLIPModel, or the tiny one that is trained on drawn shapes."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyml.methods import UserError, first_line
from pyml.methods._checkpoint import checksum, read_json
from pyml.methods._options import no_bars

if TYPE_CHECKING:
    from transformers import CLIPModel

POOLS = ("cls", "mean")
POOL_KEY = "pyml_pool"  # in config.json: which image feature the model was trained with
# what a folder must hold: the part, and the files that can stand for it
PARTS = {
    "the weights as safetensors": (("model.safetensors",), ("model.safetensors.index.json",)),
    "a tokenizer": (("tokenizer.json",), ("vocab.json", "merges.txt")),
    "an image processor": (("preprocessor_config.json",), ("processor_config.json",)),
}
# and what of it says how texts and images go in
SETTINGS = (
    "config.json", "tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "preprocessor_config.json", "processor_config.json",
)  # fmt: skip


@dataclass(frozen=True)
class Clip:
    """A CLIP that is ready to use.

    ``pool`` says which image feature it was trained with: ``"cls"``, transformers' own ``get_image_features``, or
    ``"mean"``, the mean of ``visual_projection(post_layernorm(patch tokens))``.
    """

    model: "CLIPModel"  # frozen, evaluation mode, float32
    tokenize: Callable[[list[str]], dict[str, Tensor]]  # texts -> input_ids, attention_mask, padded to the longest
    pool: str
    preprocess: Callable[[Any], Tensor]  # an RGB picture of Pillow -> [3, R, R], resized, cropped and normalised
    source: dict[str, Any]  # what identifies it: plain values, kept in config and checkpoint

    @property
    def side(self) -> int:
        """R: the side of its images."""
        config: Any = self.model.config.vision_config
        return config.image_size

    @property
    def layers(self) -> int:
        """Of the image tower."""
        config: Any = self.model.config.vision_config
        return config.num_hidden_layers


def load_clip(folder: Path, name: dict[str, Any] | None = None) -> Clip:
    """Read a CLIPModel with its tokenizer and image processor from one local folder; nothing is downloaded.

    Args:
        name: what a checkpoint says to find it again; the folder where left out.

    Raises:
        UserError: no such folder, a file is missing or cannot be read, or the model is not a CLIP.
    """
    from transformers import AutoTokenizer, CLIPModel

    config = _config(folder)
    try:
        with no_bars():
            model = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        processor = _image_processor(folder)
    except Exception as error:  # whatever transformers, tokenizers and safetensors raise on files that are broken
        raise UserError(f"clip: {folder} cannot be read as a CLIPModel: {first_line(error)}") from error
    model = model.float().eval().requires_grad_(False)
    longest = model.config.text_config.max_position_embeddings
    side = model.config.vision_config.image_size

    def tokenize(texts: list[str]) -> dict[str, Tensor]:
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
        return {key: tokens[key] for key in ("input_ids", "attention_mask")}

    def preprocess(picture: Any) -> Tensor:
        pixels = torch.as_tensor(processor(images=picture, return_tensors="pt")["pixel_values"][0])
        if pixels.shape != (3, side, side):
            raise UserError(
                f"clip: the image processor of {folder} gives {list(pixels.shape)}, expected [3, {side}, {side}]"
            )
        return pixels.float()

    source = {**(name or {"folder": str(folder)}), "fingerprint": fingerprint(model, folder)}
    return Clip(model, tokenize, config.get(POOL_KEY, "cls"), preprocess, source)


def fingerprint(model: "CLIPModel", folder: Path) -> str:
    """Some digits that another CLIP does not have: what was learned for one fits no other.

    They follow from every number of the model and from the settings of model, tokenizer and image processor in the
    folder, read as values: another layout, or the version of the program that wrote them, is no other CLIP.
    """

    def parts() -> Iterator[Any]:
        for name, tensor in sorted(model.state_dict().items()):
            yield from (name.encode(), tensor)
        for name in SETTINGS:
            path = folder / name
            if path.is_file():
                values = read_json(path) if path.suffix == ".json" else path.read_text(encoding="utf-8")
                if isinstance(values, dict):
                    values.pop("transformers_version", None)
                yield f"{name} {json.dumps(values, sort_keys=True)}".encode()

    return checksum(parts())


def _config(folder: Path) -> dict[str, Any]:
    """The folder's config.json, after a look at what else must be there."""
    if not folder.is_dir():
        raise UserError(f"clip: expected the folder of a CLIPModel, got {folder}")
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"clip: expected the folder of a CLIPModel, got {folder} without config.json")
    config = read_json(path)
    if not isinstance(config, dict) or config.get("model_type") != "clip":
        kind = config.get("model_type") if isinstance(config, dict) else config
        raise UserError(f"clip: expected a model of type 'clip', got {kind!r} in {path}")
    for part, choices in PARTS.items():
        if not any(all((folder / file).is_file() for file in files) for files in choices):
            wanted = " or ".join(" and ".join(files) for files in choices)
            raise UserError(f"clip: expected {part} in {folder}, got no {wanted}")
    if config.get(POOL_KEY, "cls") not in POOLS:
        raise UserError(f"clip: expected {POOL_KEY} one of {', '.join(POOLS)}, got {config[POOL_KEY]!r} in {path}")
    return config


def _image_processor(folder: Path) -> Any:
    """The image processor that works with Pillow, under either of its names."""
    import transformers

    kind = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    return kind.from_pretrained(folder, local_files_only=True)


def tiny_clip(steps: int | None = None, *, shown: bool = True) -> Clip:
    """The tiny CLIP from the user's cache, or trained now (see ``tiny``); one process trains, the others wait."""
    from accelerate import PartialState

    from pyml.methods.enla.tiny import STEPS, tiny_clip_folder

    steps = steps or STEPS
    with PartialState().main_process_first():
        folder = tiny_clip_folder(steps, shown=shown and PartialState().is_main_process)
    return load_clip(folder, {"tiny_steps": steps})


def same_clip(source: dict[str, Any], folder: Path | None, *, shown: bool = True) -> Clip:
    """The CLIP that a checkpoint was learned on, by its ``source``, or the one in ``folder`` where it has moved."""
    if folder is not None:
        return load_clip(folder)
    if "tiny_steps" in source:
        return tiny_clip(source["tiny_steps"], shown=shown)
    if not Path(source["folder"]).is_dir():
        raise UserError(f"clip: expected --clip, as the CLIP of the checkpoint is no longer in {source['folder']}")
    return load_clip(Path(source["folder"]))
