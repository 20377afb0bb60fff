"""The tiny CLIP that is used where none is given: a transformers CLIPModel of 0.6 M numbers, trained on drawn shapes.

Its image feature is the mean of the projected patch tokens, so that these local features live in the space of the
texts; with the usual class token alone they do not, and optimal transport over them hurts.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyml.backend import cache_folder
from pyml.methods._checkpoint import make_folder
from pyml.methods._engine import progress
from pyml.methods._options import check_folder, no_bars
from pyml.methods.enla.clip import POOL_KEY
from pyml.methods.enla.shapes import COLOURS, KINDS, PLACES, SHAPES, SIDE, TEMPLATES, draw, free_places
from pyml.methods.enla.task import fill
from pyml.nn.enla import image_features

if TYPE_CHECKING:
    from transformers import CLIPModel, PreTrainedTokenizerFast

WIDTH, JOINT, PATCH, LENGTH = 96, 64, 8, 20
MEAN = SPREAD = 0.35  # of the pixels
BATCH, RATE, MOST_SCALE = 128, 2e-3, 60.0
STEPS = 800
SPECIAL = ("<pad>", "<unknown>", "<start>", "<end>")


def vocabulary() -> dict[str, int]:
    sentences = [*TEMPLATES, *PLACES, *COLOURS, *SHAPES, "at the and"]
    words = dict.fromkeys(word for sentence in sentences for word in sentence.replace("{}", "").split())
    return {word: index for index, word in enumerate((*SPECIAL, *words))}


def make_tokenizer() -> "PreTrainedTokenizerFast":
    """One token a word; a start and an end around every text, padding behind it."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    known = vocabulary()
    pad, unknown, start, end = SPECIAL
    tokenizer = Tokenizer(WordLevel(known, unk_token=unknown))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(start, known[start]), (end, known[end])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=start, eos_token=end, unk_token=unknown, pad_token=pad,
        model_max_length=LENGTH, padding_side="right",
    )  # fmt: skip


def make_model(seed: int = 0) -> "CLIPModel":
    """The untrained model."""
    from transformers import CLIPConfig, CLIPModel

    known = vocabulary()
    common = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": 4, "hidden_act": "gelu"}
    text = {"vocab_size": len(known), "max_position_embeddings": LENGTH, "num_hidden_layers": 2}
    ends = {"pad_token_id": known[SPECIAL[0]], "bos_token_id": known[SPECIAL[2]], "eos_token_id": known[SPECIAL[3]]}
    vision = {"image_size": SIDE, "patch_size": PATCH, "num_hidden_layers": 3}
    values: dict[str, Any] = {
        "text_config": {**common, **text, **ends}, "vision_config": {**common, **vision}, "projection_dim": JOINT,
        POOL_KEY: "mean",
    }  # fmt: skip
    config = CLIPConfig(**values)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return CLIPModel(config)


def text_features(model: "CLIPModel", tokens: dict[str, Tensor]) -> Tensor:
    """Tokens of K texts -> ``[K, 64]`` of unit length."""
    pooled = model.text_model(**tokens).pooler_output
    return torch.nn.functional.normalize(model.text_projection(pooled), dim=-1)


class Captioned:
    """Drawn images, one half with two objects, and a caption for each that names one object or both."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def _chance(self, count: int) -> Tensor:
        return torch.rand(count, generator=self.generator) < 0.5

    def batch(self, count: int) -> tuple[Tensor, list[str], Tensor]:
        """Pixels ``[B, 3, 32, 32]`` (normalised), captions, and ``[captions, images]``: which of them fit."""
        kinds = torch.randint(len(KINDS), (count, 2), generator=self.generator)
        kinds[:, 1] = (kinds[:, 0] + 1 + kinds[:, 1] % (len(KINDS) - 1)) % len(KINDS)  # two that differ
        single, both, placed = (self._chance(count) for _ in range(3))
        kinds[single, 1] = -1
        places = free_places(count, 2, self.generator)
        pixels = draw(kinds, places, generator=self.generator)
        jitter = 0.12 * torch.randn(2, count, 3, 1, 1, generator=self.generator)
        templates = torch.randint(len(TEMPLATES), (count,), generator=self.generator)
        named = kinds.masked_fill(~torch.stack([torch.ones_like(both), both], 1), -1)
        captions, corners = [], list(PLACES)
        for template, (first, second), corner, near in zip(
            templates.tolist(), named.tolist(), places[:, 0].tolist(), placed.tolist()
        ):
            name = KINDS[first] if second < 0 else f"{KINDS[first]} and {KINDS[second]}"
            where = f" at the {corners[corner]}" if near and second < 0 else ""
            captions.append(fill(TEMPLATES[template], name) + where)
        # one row an image or a caption, one column a kind; the last column takes those that are none
        seen, said = (
            torch.zeros(count, len(KINDS) + 1).scatter_(1, some % (len(KINDS) + 1), 1)[:, :-1]
            for some in (kinds, named)
        )
        # a caption fits every image that has all it names; where they stand is not looked at
        fits = (said @ (1 - seen).T == 0).float()
        return (pixels * (1 + jitter[0]) + jitter[1] - MEAN) / SPREAD, captions, fits


def contrast(logits: Tensor, fits: Tensor) -> Tensor:
    """Cross-entropy both ways of ``[captions, images]`` logits, the target spread over all that fit."""
    losses = []
    for scores, target in ((logits, fits), (logits.T, fits.T)):
        target = target / target.sum(1, keepdim=True)
        losses.append(-(target * scores.log_softmax(1)).sum(1).mean())
    return (losses[0] + losses[1]) / 2


def pretrain(model: "CLIPModel", tokenize: Callable[[list[str]], dict[str, Tensor]], steps: int) -> Iterator[float]:
    """Train in place; gives the loss after every step."""
    data = Captioned(seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.02, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps + 1, pct_start=0.1)
    model.train()
    for _ in range(steps):
        pixels, captions, fits = data.batch(BATCH)
        scale = model.logit_scale.exp().clamp(max=MOST_SCALE)
        images = torch.nn.functional.normalize(image_features(model, pixels, "mean")[0], dim=-1)
        logits = scale * text_features(model, tokenize(captions)) @ images.T
        loss = contrast(logits, fits)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        yield loss.item()
    with torch.no_grad():
        model.logit_scale.clamp_(max=math.log(MOST_SCALE))
    model.eval()


def save_processor(folder: Path) -> None:
    """What an image has to go through, in the form that transformers' image processors read."""
    values: dict[str, Any] = {
        "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True, "do_resize": True,
        "size": {"shortest_edge": SIDE}, "resample": 3, "do_center_crop": True,
        "crop_size": {"height": SIDE, "width": SIDE}, "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": [MEAN] * 3, "image_std": [SPREAD] * 3,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(values, indent=2) + "\n")


def tiny_clip_folder(steps: int = STEPS, *, shown: bool = True) -> Path:
    """The folder of the tiny CLIP in the user's cache; it is trained first where it is not there yet."""
    recipe = [steps, WIDTH, JOINT, PATCH, BATCH, RATE, COLOURS, SHAPES, PLACES, TEMPLATES, torch.__version__]
    key = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:12]
    folder = check_folder(cache_folder(), "PYML_CACHE") / f"tiny-clip-{key}"
    if folder.is_dir():
        return folder
    tokenizer, model = make_tokenizer(), make_model()

    def tokenize(texts: list[str]) -> dict[str, Tensor]:
        return dict(tokenizer(texts, padding=True, return_tensors="pt"))

    def write(made: Path) -> None:
        with progress(shown) as bar:
            line = bar.add_task("tiny CLIP", total=steps, note="")
            for step, loss in enumerate(pretrain(model, tokenize, steps), 1):
                bar.update(line, completed=step, note=f"loss {loss:.3f}")
        with no_bars():
            model.save_pretrained(made, safe_serialization=True)
        tokenizer.save_pretrained(made)
        save_processor(made)

    make_folder(folder, write)
    return folder
