"""The arms of ``--arms``: what is learned on top of a frozen CLIP, all with one interface.

An arm gives ``forward(images, labels) -> (loss of each image [B], logits [B, K])`` for training and ``logits(images,
split)`` for every split of its task, whatever its classes. Parameters and state are the learned tensors alone.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyml.methods import UserError
from pyml.methods._checkpoint import load_checkpoint
from pyml.methods._recipe import among, require
from pyml.methods.enla.clip import Clip
from pyml.methods.enla.task import Task
from pyml.nn.enla import EnLa, Features, class_logits, image_features

TRAIN = "<train>"  # no data set is called so, whatever its folder (the names are of letters, digits and -)
ENLA: dict[str, dict[str, Any]] = {  # what differs from EnLa with the transport in its logits
    "enla": {},
    "enla-ot-loss": {"ot": "loss"},
    "enla-no-ot": {"ot": None},
    "enla-no-strengthening": {"strengthen": False},
    "enla-no-visual": {"visual_prompts": False},
}
ARMS = ("zero-shot", "coop", *ENLA)
TEXTS = 256  # texts at a time
Images = Tensor | Features  # [B, 3, R, R], or what `image_features` gives for them


def pooled_texts(clip: Clip, tokens: dict[str, Tensor]) -> Tensor:
    """Tokens of texts -> their features ``[texts, D]`` of unit length."""
    found = clip.model.text_model(**{name: t.to(clip.model.device) for name, t in tokens.items()})
    return F.normalize(clip.model.text_projection(found.pooler_output), dim=-1)


@torch.no_grad()
def text_features(clip: Clip, texts: list[list[str]]) -> Tensor:
    """``[N][K]`` texts -> their features ``[N, K, D]`` of unit length."""
    flat = [text for row in texts for text in row]
    parts = [pooled_texts(clip, clip.tokenize(flat[i : i + TEXTS])) for i in range(0, len(flat), TEXTS)]
    return torch.cat(parts).view(len(texts), len(texts[0]), -1)


class Arm(nn.Module):
    """What all arms have: the texts of every split, and the frozen CLIP, hidden from the state."""

    def __init__(self, clip: Clip, task: Task) -> None:
        super().__init__()
        clip.model.requires_grad_(False).eval()
        self._clip = (clip,)
        self.classes = {TRAIN: task.train.classes} | {name: split.classes for name, split in task.evals.items()}
        self._texts: dict[tuple[str, ...], Tensor] = {}
        self._task = task

    @property
    def clip(self) -> Clip:
        return self._clip[0]

    @property
    def frozen_images(self) -> bool:
        """Whether the image tower is CLIP's own, so that its features can be computed once."""
        return True

    def texts(self, split: str) -> Tensor:
        """The frozen text features of a split's classes, ``[N, K, D]``, computed once."""
        key = tuple(self.classes[split])
        if key not in self._texts:
            self._texts[key] = text_features(self.clip, self._task.texts(key))
        return self._texts[key]

    def encode(self, pixel_values: Tensor) -> Features:
        """The features of images by CLIP's own tower, which stand for them where ``frozen_images``."""
        with torch.no_grad():
            return image_features(self.clip.model, pixel_values, self.clip.pool)

    def logits(self, images: Images, split: str = TRAIN) -> Tensor:
        """``[B, K]`` for the classes of a split."""
        raise NotImplementedError

    def forward(self, images: Images, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of each image and the logits, on the training classes."""
        logits = self.logits(images)
        return F.cross_entropy(logits, labels, reduction="none"), logits

    def _cosine(self, images: Images, text: Tensor) -> Tensor:
        image = (self.encode(images) if isinstance(images, Tensor) else images)[0]
        return class_logits(image, text, self.clip.model.logit_scale.exp())


class ZeroShot(Arm):
    """CLIP as it is: the cosine of an image and the mean of a class's texts. Learns nothing."""

    def logits(self, images: Images, split: str = TRAIN) -> Tensor:
        return self._cosine(images, self.texts(split))


class Context(Arm):
    """CoOp's idea (Zhou et al., arXiv 2109.01134): the embeddings of the words before the class name are learned.

    They start as those of the first template's words, so step 0 is zero-shot CLIP with that template alone. The frozen
    text tower runs in every step.
    """

    def __init__(self, clip: Clip, task: Task) -> None:
        super().__init__(clip, task)
        words = task.templates[0].partition("{")[0].strip()
        if not words:
            raise UserError(f"templates: the arm coop needs words before the class name, got {task.templates[0]!r}")
        first = self._tokens(TRAIN)["input_ids"]
        prefix, names = (clip.tokenize(texts)["input_ids"] for texts in ([words], task.train.classes))
        self.start = int((names[:, 0] == prefix[0, 0]).all())  # after the token that starts every text, if there is one
        length = min(prefix.shape[1], first.shape[1])
        same = (first[:, :length] == prefix[0, :length]).all(0)
        self.stop = int(same.long().cumprod(0).sum())
        if self.stop <= self.start:
            raise UserError(f"templates: the arm coop needs words that are tokens of their own, got {words!r}")
        embeddings = self._embedding.weight[first[0, self.start : self.stop].to(clip.model.device)]
        self.context = nn.Parameter(embeddings.detach().clone())

    @property
    def _embedding(self) -> nn.Embedding:
        tower: Any = self.clip.model.text_model
        return getattr(tower, "text_model", tower).embeddings.token_embedding

    def _tokens(self, split: str) -> dict[str, Tensor]:
        return self.clip.tokenize(self._task.texts(self.classes[split])[0])

    def logits(self, images: Images, split: str = TRAIN) -> Tensor:
        def with_context(_: nn.Module, __: Any, words: Tensor) -> Tensor:
            context = self.context.expand(len(words), -1, -1)
            return torch.cat([words[:, : self.start], context, words[:, self.stop :]], 1)

        hook = self._embedding.register_forward_hook(with_context)
        try:
            text = pooled_texts(self.clip, self._tokens(split))
        finally:
            hook.remove()
        return self._cosine(images, text.unsqueeze(0))


class Adapted(Arm):
    """`pyml.nn.EnLa` on the texts of a task."""

    def __init__(self, clip: Clip, task: Task, **options: Any) -> None:
        super().__init__(clip, task)
        self.enla = EnLa(clip.model, self.texts(TRAIN), pool=clip.pool, **options)

    @property
    def frozen_images(self) -> bool:
        return self.enla.prompts is None

    def logits(self, images: Images, split: str = TRAIN) -> Tensor:
        return self.enla(images, self.texts(split))

    def forward(self, images: Images, labels: Tensor) -> tuple[Tensor, Tensor]:
        return self.enla.loss_and_logits(images, labels, reduction="none")


def build(arm: str, clip: Clip, task: Task, **options: Any) -> Arm:
    """The network of one arm, on the device of the CLIP.

    Args:
        options: of `pyml.nn.EnLa`: n_prompts, depth, hidden, ot_weight, eps, max_iter, plan_grad, backend. The other
            arms have none and pass over them.
    """
    require("arms", arm, among(ARMS))
    if arm in ENLA:
        return Adapted(clip, task, **{**options, **ENLA[arm]})
    return ZeroShot(clip, task) if arm == "zero-shot" else Context(clip, task)


def load_arm(path: Path, clip: Clip, task: Task) -> Arm:
    """The arm of a checkpoint of `pyml train enla`, in evaluation mode, for the classes of ``task``.

    Raises:
        UserError: no such file, of another method, learned on another CLIP, or not for this network.
    """
    checkpoint = load_checkpoint(path)
    info = checkpoint.info
    if info.get("method") != "enla" or info.get("arm") not in ARMS:
        raise UserError(f"checkpoint: {path} belongs to the method {info.get('method')!r}, expected 'enla'")
    if info["clip"].get("fingerprint") != clip.source.get("fingerprint"):
        raise UserError(f"checkpoint: {path} was learned on the CLIP {info['clip']}, got {clip.source}")
    arm = build(info["arm"], clip, task, **info["network"])
    try:
        arm.load_state_dict(checkpoint.part("model"))
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"checkpoint: {path} does not fit its own network: {reason}") from error
    return arm.eval()
