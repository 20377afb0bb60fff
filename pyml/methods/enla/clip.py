"""The frozen CLIP of a run: a folder of a transformers CLIPModel, or the tiny one that is trained on drawn shapes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from transformers import CLIPModel


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
