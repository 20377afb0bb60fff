"""EnLa-style prompt learning for a frozen CLIP: a layer on its text features, prompts in its image tower, transport.

`image_features` runs the image tower of a ``transformers.CLIPModel`` by its submodules, whose names are the same in
transformers 4.45 and 5.23; the calls between them are not.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyml.nn.batched_ot import OTAlignment
from pyml.ops import _check

POOLS = ("cls", "mean")
TRANSPORT = ("logit", "loss", None)
Features = tuple[Tensor, Tensor]  # of images [B, D], of their places [B, M, D]


def image_features(
    clip: Any, pixel_values: Tensor, pool: str = "cls", prompts: Tensor | None = None, gates: Tensor | None = None
) -> Features:
    """The features of images and of their patches in the joint space, neither of unit length.

    Args:
        clip: a ``transformers.CLIPModel``.
        pixel_values: ``[B, 3, R, R]``, as its image processor gives them.
        pool: ``"cls"``: the image feature is that of the class token, as in CLIP; ``"mean"``: the mean of the patches.
        prompts: ``[depth, P, Dv]`` for the first layers: more keys and values for their attention. They form a softmax
            of their own, which ``gates`` ``[depth, heads]`` add to that of the tokens.

    Returns:
        ``[B, D]`` and ``[B, M, D]``: visual_projection(post_layernorm(tokens)).
    """
    tower = _vision_tower(clip)
    size = clip.config.vision_config.image_size
    if pixel_values.dim() != 4 or pixel_values.shape[2:] != (size, size):
        _check.fail("image_features", "pixel_values", f"[B, 3, {size}, {size}]", list(pixel_values.shape))
    x = tower.pre_layrnorm(tower.embeddings(pixel_values))
    for i, layer in enumerate(tower.encoder.layers):
        if prompts is not None and gates is not None and i < len(prompts):
            x = _encoder_layer(layer, x, prompts[i], gates[i])
        else:
            x = _encoder_layer(layer, x)
    tokens = clip.visual_projection(tower.post_layernorm(x))
    places = tokens[:, 1:]
    return (tokens[:, 0] if pool == "cls" else places.mean(1)), places


def class_logits(image: Tensor, text: Tensor, scale: Tensor | float) -> Tensor:
    """scale * cos(image, mean of the unit text features of a class): ``[B, D]``, ``[N, K, D]`` -> ``[B, K]``."""
    mean = F.normalize(F.normalize(text, dim=-1).mean(0), dim=-1)
    return scale * (F.normalize(image, dim=-1) @ mean.T)


def _vision_tower(clip: Any) -> Any:
    """What holds embeddings and layers; some versions wrap it once more."""
    return getattr(clip.vision_model, "vision_model", clip.vision_model)


def _encoder_layer(layer: Any, x: Tensor, prompts: Tensor | None = None, gates: Tensor | None = None) -> Tensor:
    """A layer of CLIP on tokens ``[B, L, Dv]``; prompts ``[P, Dv]`` are seen by all of them, gates ``[heads]``."""
    attention = layer.self_attn

    def heads(project: nn.Linear, tokens: Tensor) -> Tensor:
        return project(tokens).unflatten(-1, (attention.num_heads, -1)).transpose(-3, -2)

    seen = layer.layer_norm1(x)
    q, k, v = (heads(project, seen) for project in (attention.q_proj, attention.k_proj, attention.v_proj))
    found = F.scaled_dot_product_attention(q, k, v)
    if prompts is not None and gates is not None:
        seen = layer.layer_norm1(prompts)
        k, v = (heads(project, seen).expand(len(x), -1, -1, -1) for project in (attention.k_proj, attention.v_proj))
        found = found + gates.view(-1, 1, 1) * F.scaled_dot_product_attention(q, k, v)
    x = x + attention.out_proj(found.transpose(1, 2).flatten(2))
    return x + layer.mlp(layer.layer_norm2(x))


class ExternalLayer(nn.Module):
    """What EnLa learns on frozen text features: T + up(GELU(down(T))), ``[..., D]`` -> the same; ``up`` starts at 0."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, text: Tensor) -> Tensor:
        return text + self.up(F.gelu(self.down(text)))


class EnLa(nn.Module):
    """EnLa-style prompt learning for a frozen CLIP, with PLOT's recipe for optimal transport.

    - Text: the features T0 of frozen prompts ("a photo of a {}") go through `ExternalLayer`, T = T0 + layer(T0).
    - Images: learnable prompts V_l in each of the first ``depth`` layers of the image tower, new ones for each layer.
      The strengthening feature s = Linear(mean of T) is added to all of them and connects the towers.
    - Logits: scale * cos(image, mean over the texts of T), and with ``ot="logit"`` + scale * ot_weight * the transport
      similarity of the local features (`OTAlignment`). With ``ot="loss"`` the loss gets ot_weight * the transport value
      between an image and its class instead.

    Step 0 is CLIP itself: the external layer ends in zeros, and so do the prompts' ways into the tower. Deep prompts
    (VPT) are keys and values for the tokens of their layer and nothing else, since their own outputs are thrown away;
    but even prompts of zeros would take attention from the tokens. So they form a softmax of their own here, and one
    gate a head, 0 at the start, adds what it reads to that of the tokens (zero-initialised attention, Zhang et al.,
    arXiv 2303.16199). The gates have a gradient from the first step on, prompts and strengthening from the second.
    With ``ot="logit"`` step 0 is zero-shot CLIP with the transport similarity in its logits.

    Args:
        clip: a ``transformers.CLIPModel``; it is frozen in place, and is no submodule: parameters and ``state_dict`` of
            this module are the learned tensors alone. ``to`` moves it along.
        text_features: ``[N, K, D]``, N texts of each of K classes; brought to unit length. Not part of the state.
        pool: which image feature the CLIP was trained with, see `image_features`.
        n_prompts: prompts V_l of a layer.
        depth: layers with prompts, from the first on; None: all.
        hidden: width of the external layer; None: a quarter of D.
        strengthen: whether s is added; it needs visual prompts.
        visual_prompts: whether the image tower has prompts. Without them its features are constants, and forward takes
            them in place of images.
        ot: ``"logit"``, ``"loss"`` or None.
        ot_weight: weight of the transport.
        eps, max_iter, plan_grad, backend: see `OTAlignment`.

    Shapes: images ``[B, 3, R, R]`` -> logits ``[B, K]``.
    Sources: Cui et al., "EnLa", arXiv 2407.19674 (the parts; its sizes and weights are not known to us, so those here
    are ours); Chen et al., "PLOT", arXiv 2210.01253 (the transport); Jia et al., "VPT", arXiv 2203.12119 (the prompts).

    Raises:
        ValueError, TypeError: one sentence naming the argument, what was expected and what came.
    """

    text_features: Tensor

    def __init__(
        self,
        clip: Any,
        text_features: Tensor,
        *,
        pool: str = "cls",
        n_prompts: int = 4,
        depth: int | None = None,
        hidden: int | None = None,
        strengthen: bool = True,
        visual_prompts: bool = True,
        ot: str | None = "logit",
        ot_weight: float = 1.0,
        eps: float = 0.1,
        max_iter: int = 100,
        plan_grad: str = "detach",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if not all(hasattr(clip, name) for name in ("vision_model", "visual_projection", "logit_scale", "config")):
            _check.fail("EnLa", "clip", "a CLIPModel of transformers", type(clip).__name__, TypeError)
        _check.member("EnLa", "pool", pool, POOLS)
        _check.member("EnLa", "ot", ot, TRANSPORT)
        config, layers = clip.config.vision_config, len(_vision_tower(clip).encoder.layers)
        depth = layers if depth is None else depth
        hidden = max(clip.config.projection_dim // 4, 1) if hidden is None else hidden
        for name, value, most in (("n_prompts", n_prompts, None), ("depth", depth, layers), ("hidden", hidden, None)):
            if value < 1 or (most is not None and value > most):
                _check.fail("EnLa", name, f"an integer from 1 to {most}" if most else "at least 1", value)
        self._clip = (clip.requires_grad_(False).eval(),)  # a tuple hides it from nn.Module
        self.pool, self.ot, self.ot_weight = pool, ot, ot_weight
        self.register_buffer("text_features", self._texts(text_features), persistent=False)
        joint = text_features.shape[-1]
        self.external = ExternalLayer(joint, hidden)
        self.prompts: nn.Parameter | None = None
        self.gates: nn.Parameter | None = None
        self.strengthen: nn.Linear | None = None
        if visual_prompts:
            self.prompts = nn.Parameter(0.02 * torch.randn(depth, n_prompts, config.hidden_size))
            self.gates = nn.Parameter(torch.zeros(depth, config.num_attention_heads))
            if strengthen:
                self.strengthen = nn.Linear(joint, config.hidden_size, bias=False)
                nn.init.zeros_(self.strengthen.weight)
        self.alignment = OTAlignment(eps=eps, max_iter=max_iter, plan_grad=plan_grad, backend=backend)
        self.to(clip.logit_scale.device, clip.logit_scale.dtype)

    @property
    def clip(self) -> Any:
        """The frozen CLIPModel."""
        return self._clip[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "EnLa":
        self.clip._apply(fn)
        return super()._apply(fn, recurse)

    def _texts(self, given: Tensor) -> Tensor:
        _check.tensors("EnLa", given, first_name="text_features")
        dim = self.clip.config.projection_dim
        if given.dim() != 3 or given.shape[-1] != dim or 0 in given.shape:
            _check.fail("EnLa", "text_features", f"[N, K, {dim}], not empty", list(given.shape))
        return F.normalize(given.detach().to(self.clip.logit_scale), dim=-1)

    def forward(self, images: Tensor | Features, text_features: Tensor | None = None) -> Tensor:
        """Logits ``[B, K]``.

        Args:
            images: ``[B, 3, R, R]``; without visual prompts also what `image_features` gives for them.
            text_features: of other classes, ``[N, K', D]``.
        """
        return self._forward(images, text_features)[0]

    def loss(
        self, images: Tensor | Features, labels: Tensor, text_features: Tensor | None = None, reduction: str = "mean"
    ) -> Tensor:
        """Cross entropy, with ``ot="loss"`` + ot_weight * transport value; ``[B]`` with ``reduction="none"``."""
        return self.loss_and_logits(images, labels, text_features, reduction)[0]

    def loss_and_logits(
        self, images: Tensor | Features, labels: Tensor, text_features: Tensor | None = None, reduction: str = "mean"
    ) -> tuple[Tensor, Tensor]:
        """`loss` and `forward` in one go."""
        _check.member("EnLa", "reduction", reduction, ("mean", "none"))
        logits, local, text = self._forward(images, text_features)
        each = F.cross_entropy(logits, labels, reduction="none")
        if self.ot == "loss":
            each = each + self.ot_weight * self.alignment.discrepancy(local, text, labels)
        return (each.mean() if reduction == "mean" else each), logits

    def _forward(self, images: Tensor | Features, text_features: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, local features, adapted text features."""
        text = self.external(self.text_features if text_features is None else self._texts(text_features))
        if isinstance(images, Tensor):
            prompts = self.prompts
            if prompts is not None and self.strengthen is not None:
                prompts = prompts + self.strengthen(text.mean((0, 1)))
            image, local = image_features(self.clip, images, self.pool, prompts, self.gates)
        elif self.prompts is not None:
            _check.fail("EnLa", "images", "[B, 3, R, R], as visual prompts change the features", "a pair of features")
        else:
            image, local = images
        scale = self.clip.logit_scale.exp()
        logits = class_logits(image, text, scale)
        if self.ot == "logit":
            logits = logits + scale * self.ot_weight * self.alignment.similarity(local, text)
        return logits, local, text

    def extra_repr(self) -> str:
        texts, classes, _ = self.text_features.shape
        return f"{classes} classes of {texts} texts, pool={self.pool!r}, ot={self.ot!r}, ot_weight={self.ot_weight:g}"
