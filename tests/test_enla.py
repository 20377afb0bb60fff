"""EnLa: step 0 is CLIP, what learns and what does not, prompts against a formula, state, wrong input."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pyml.nn import EnLa, OTAlignment
from pyml.nn.enla import image_features
from tests.enla_tiny import JOINT, SIDE, make_model

N, K = 3, 5
ALL = {"ot": [None, "logit", "loss"], "visual_prompts": [True, False], "strengthen": [True, False]}
ARMS = [{"ot": ot, "visual_prompts": v, "strengthen": s} for ot in ALL["ot"] for v, s in ((1, 1), (1, 0), (0, 0))]


@pytest.fixture(scope="module")
def clip():
    return make_model()


@pytest.fixture
def images() -> Tensor:
    """Four colours with noise."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, SIDE, SIDE, generator=generator) + 2 * torch.randn(4, 3, 1, 1, generator=generator)


@pytest.fixture
def texts() -> Tensor:
    return torch.randn(N, K, JOINT, generator=torch.Generator().manual_seed(1))


LABELS = torch.tensor([0, 4, 2, 2])


def awake(model: EnLa) -> EnLa:
    """With numbers in what starts at 0."""
    torch.manual_seed(5)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    return model


# --- the image tower --------------------------------------------------------------------------------------------------


def test_features_are_those_of_transformers(clip, images):
    found = clip.vision_model(pixel_values=images)
    tower = getattr(clip.vision_model, "vision_model", clip.vision_model)
    patches = clip.visual_projection(tower.post_layernorm(found.last_hidden_state[:, 1:]))
    for pool, expected in (("cls", clip.visual_projection(found.pooler_output)), ("mean", patches.mean(1))):
        image, local = image_features(clip, images, pool)
        torch.testing.assert_close(image, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(local, patches, rtol=1e-4, atol=1e-5)
    assert local.shape == (4, 16, JOINT)


def test_prompts_are_keys_and_values_behind_a_gate(clip, images, texts):
    """Layer by layer in other words: softmax over the tokens plus gate times softmax over the prompts."""
    model = awake(EnLa(clip, texts, n_prompts=3, depth=1, ot=None))
    text = model.external(F.normalize(texts, dim=-1))
    prompts = model.prompts[0] + text.mean((0, 1)) @ model.strengthen.weight.T
    tower = getattr(clip.vision_model, "vision_model", clip.vision_model)
    x = tower.pre_layrnorm(tower.embeddings(images))
    for i, layer in enumerate(tower.encoder.layers):
        attention, seen = layer.self_attn, layer.layer_norm1(x)
        read = []
        for head in range(4):
            part = slice(8 * head, 8 * head + 8)

            def looked_up(tokens: Tensor, seen: Tensor = seen, attention=attention, part: slice = part) -> Tensor:
                logits = attention.q_proj(seen)[..., part] @ attention.k_proj(tokens)[..., part].transpose(-1, -2)
                return torch.softmax(logits / 8**0.5, -1) @ attention.v_proj(tokens)[..., part]

            out = looked_up(seen)
            if i == 0:
                out = out + model.gates[0, head] * looked_up(layer.layer_norm1(prompts))
            read.append(out)
        x = x + attention.out_proj(torch.cat(read, -1))
        x = x + layer.mlp(layer.layer_norm2(x))
    image = clip.visual_projection(tower.post_layernorm(x[:, 0]))
    mean = F.normalize(F.normalize(text, dim=-1).mean(0), dim=-1)
    expected = clip.logit_scale.exp() * F.normalize(image, dim=-1) @ mean.T
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)


# --- step 0 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("ot", ALL["ot"])
def test_step_0_is_zero_shot(clip, images, texts, pool, ot):
    """Whatever is switched on, bit for bit; and what transformers itself gives, up to rounding."""
    plain = EnLa(clip, texts, pool=pool, ot=ot, visual_prompts=False)
    image, local = image_features(clip, images, pool)
    scale = clip.logit_scale.exp()
    mean = F.normalize(F.normalize(texts, dim=-1).mean(0), dim=-1)
    expected = scale * F.normalize(image, dim=-1) @ mean.T
    if ot == "logit":
        expected = expected + scale * OTAlignment()(local, texts)
    torch.testing.assert_close(plain(images), expected, rtol=1e-5, atol=1e-5)
    for strengthen in (True, False):
        full = EnLa(clip, texts, pool=pool, ot=ot, strengthen=strengthen)
        assert torch.equal(full(images), plain(images))
    if ot is None and pool == "cls":
        embedded = F.normalize(clip.visual_projection(clip.vision_model(pixel_values=images).pooler_output), dim=-1)
        torch.testing.assert_close(full(images), scale * embedded @ mean.T, rtol=1e-4, atol=1e-4)


def test_the_discrepancy_is_added_to_the_loss_alone(clip, images, texts):
    plain, full = (EnLa(clip, texts, pool="mean", ot=ot, ot_weight=0.5) for ot in (None, "loss"))
    text = F.normalize(texts, dim=-1)
    value = OTAlignment().discrepancy(image_features(clip, images, "mean")[1], text, LABELS)
    assert torch.equal(full(images), plain(images))
    torch.testing.assert_close(full.loss(images, LABELS), plain.loss(images, LABELS) + 0.5 * value.mean())
    each, logits = full.loss_and_logits(images, LABELS, reduction="none")
    torch.testing.assert_close(each.mean(), full.loss(images, LABELS))
    torch.testing.assert_close(each, F.cross_entropy(logits, LABELS, reduction="none") + 0.5 * value)


# --- what learns ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: "-".join(str(value) for value in arm.values()))
def test_every_learned_tensor_moves_and_nothing_else(clip, images, texts, arm):
    model = EnLa(copy.deepcopy(clip), texts, pool="mean", **arm)
    frozen = {name: t.clone() for name, t in model.clip.state_dict().items()}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for step in range(3):  # the first moves gates and the outer layer only: what is behind them follows
        optimizer.zero_grad()
        loss = model.loss(images, LABELS)
        loss.backward()
        losses.append(loss.item())
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        if step == 0 and arm["visual_prompts"]:
            assert model.gates.grad.any() and model.external.up.weight.grad.any()
        optimizer.step()
    assert [name for name, p in model.named_parameters() if torch.equal(p, before[name])] == []
    assert all(torch.equal(t, frozen[name]) for name, t in model.clip.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in model.clip.parameters())


def test_training_lowers_the_loss(clip, images, texts):
    model = EnLa(copy.deepcopy(clip), texts, pool="mean")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    first = model.loss(images, LABELS).item()
    for _ in range(100):
        optimizer.zero_grad()
        model.loss(images, LABELS).backward()
        optimizer.step()
    assert model.loss(images, LABELS).item() < 0.5 * first
    assert torch.equal(model(images).argmax(1), LABELS)


# --- state ------------------------------------------------------------------------------------------------------------


def test_the_state_holds_what_is_learned(clip, images, texts):
    model = awake(EnLa(clip, texts))
    names = {
        "prompts", "gates", "strengthen.weight", "external.down.weight", "external.down.bias", "external.up.weight",
        "external.up.bias",
    }  # fmt: skip
    assert model.state_dict().keys() == names == {name for name, _ in model.named_parameters()}
    other = EnLa(clip, texts)
    assert not torch.equal(other(images), model(images))
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other(images), model(images))
    with pytest.raises(RuntimeError, match="Unexpected key"):
        EnLa(clip, texts, strengthen=False).load_state_dict(model.state_dict())


def test_other_classes(clip, images, texts):
    model = awake(EnLa(clip, texts, strengthen=False))
    more = torch.cat([texts, torch.randn(N, 4, JOINT)], 1)
    assert model(images, more).shape == (4, K + 4)
    torch.testing.assert_close(model(images, more)[:, :K], model(images))


def test_features_in_place_of_images(clip, images, texts):
    model = awake(EnLa(clip, texts, visual_prompts=False, pool="mean"))
    assert torch.equal(model(image_features(clip, images, "mean")), model(images))


def test_to_takes_the_clip_along(clip, images, texts):
    model = awake(EnLa(copy.deepcopy(clip), texts, pool="mean"))
    expected = model(images).double()
    model.double()
    assert model.clip.visual_projection.weight.dtype == torch.float64
    torch.testing.assert_close(model(images.double()), expected, rtol=1e-3, atol=1e-3)


# --- wrong input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pool": "max"}, "pool: expected one of cls, mean, got 'max'"),
        ({"ot": "both"}, "ot: expected one of logit, loss, None, got 'both'"),
        ({"n_prompts": 0}, "n_prompts: expected at least 1, got 0"),
        ({"depth": 3}, "depth: expected an integer from 1 to 2, got 3"),
        ({"hidden": 0}, "hidden: expected at least 1, got 0"),
        ({"plan_grad": "x"}, "plan_grad: expected one of detach, implicit, got 'x'"),
        ({"text_features": torch.ones(K, JOINT)}, "text_features: expected [N, K, 12], not empty, got [5, 12]"),
        ({"text_features": torch.ones(1, 0, JOINT)}, "text_features: expected [N, K, 12], not empty, got [1, 0, 12]"),
        ({"text_features": torch.ones(1, K, 3)}, "text_features: expected [N, K, 12], not empty, got [1, 5, 3]"),
        ({"text_features": [1]}, "text_features: expected a tensor, got list"),
        ({"clip": torch.nn.Linear(2, 2)}, "clip: expected a CLIPModel of transformers, got Linear"),
    ],
)
def test_wrong_options_are_one_sentence(clip, texts, change, words):
    with pytest.raises((ValueError, TypeError), match=f"^(EnLa|OTAlignment): {re.escape(words)}$"):
        EnLa(**{"clip": clip, "text_features": texts, **change})


def test_wrong_images_are_one_sentence(clip, images, texts):
    model = EnLa(clip, texts)
    for given, words in (
        (images[0], r"image_features: pixel_values: expected \[B, 3, 16, 16\], got \[3, 16, 16\]"),
        (images[..., :8], r"image_features: pixel_values: expected \[B, 3, 16, 16\], got \[4, 3, 16, 8\]"),
        (image_features(clip, images), r"EnLa: images: expected \[B, 3, R, R\], as visual prompts"),
    ):
        with pytest.raises(ValueError, match=f"^{words}"):
            model(given)
    with pytest.raises(ValueError, match="reduction: expected one of mean, none, got 'sum'"):
        model.loss(images, LABELS, reduction="sum")
