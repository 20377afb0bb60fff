"""EnLa's CLIP: folders and what can be wrong with them, the tiny one, its captions, its cache."""

import json
import shutil

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("transformers")

from PIL import Image

from pyml.methods import UserError
from pyml.methods.enla import tiny
from pyml.methods.enla.clip import POOL_KEY, load_clip, same_clip, tiny_clip
from pyml.methods.enla.shapes import KINDS
from tests.enla_files import STEPS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny CLIP after a few steps, in a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYML_CACHE", str(tmp_path_factory.mktemp("cache")))
        return tiny.tiny_clip_folder(STEPS, shown=False)


@pytest.fixture(scope="module")
def clip(folder):
    return load_clip(folder)


# --- the tiny CLIP ----------------------------------------------------------------------------------------------------


def test_the_cache_is_used_and_training_is_seeded(folder, clip, tmp_path, monkeypatch):
    monkeypatch.setenv("PYML_CACHE", str(tmp_path / "other"))
    again = load_clip(tiny.tiny_clip_folder(STEPS, shown=False))
    assert again.source["fingerprint"] == clip.source["fingerprint"]
    first, second = clip.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert [item.name for item in (tmp_path / "other").iterdir()] == [folder.name]  # nothing half done is left
    monkeypatch.setattr(tiny, "pretrain", lambda *_: pytest.fail("trained again"))
    assert tiny_clip(STEPS, shown=False).source == {"tiny_steps": STEPS, "fingerprint": clip.source["fingerprint"]}
    assert same_clip({"tiny_steps": STEPS, "fingerprint": "x"}, None, shown=False).pool == "mean"


def test_a_cache_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("PYML_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"^PYML_CACHE: expected a folder that can be written, got "):
        tiny.tiny_clip_folder(STEPS, shown=False)


def test_a_stopped_training_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("PYML_CACHE", str(tmp_path))

    def stop(*_):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(tiny, "pretrain", stop)
    with pytest.raises(KeyboardInterrupt):
        tiny.tiny_clip_folder(STEPS, shown=False)
    assert not list(tmp_path.iterdir())


def test_loaded_model_is_frozen_and_says_how_it_pools(clip):
    assert clip.pool == "mean" and clip.side == 32 and not clip.model.training
    assert not any(p.requires_grad for p in clip.model.parameters())
    assert sum(p.numel() for p in clip.model.parameters()) < 1_000_000


def test_tokens_are_words(clip):
    known = tiny.vocabulary()
    tokens = clip.tokenize(["a photo of the red ring at the top left", "the blue zebra"])
    words = ["<start>", "a", "photo", "of", "the", "red", "ring", "at", "the", "top", "left", "<end>"]
    assert tokens["input_ids"][0].tolist() == [known[word] for word in words]
    short = [known[word] for word in ["<start>", "the", "blue", "<unknown>", "<end>"]]
    assert tokens["input_ids"][1].tolist() == short + [known["<pad>"]] * (len(words) - len(short))
    assert tokens["attention_mask"].sum(1).tolist() == [len(words), len(short)]


def test_padding_changes_no_text_feature(clip):
    with torch.no_grad():
        alone = tiny.text_features(clip.model, clip.tokenize(["the red ring"]))
        beside = tiny.text_features(
            clip.model, clip.tokenize(["the red ring", "a photo of the red ring at the top left"])
        )
    torch.testing.assert_close(alone[0], beside[0])
    torch.testing.assert_close(alone.norm(dim=1), torch.ones(1))


def test_pictures_are_made_ready(clip):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    found = clip.preprocess(Image.fromarray(pixels))
    expected = (torch.from_numpy(pixels).permute(2, 0, 1) / 255 - tiny.MEAN) / tiny.SPREAD
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert clip.preprocess(Image.fromarray(pixels).resize((70, 45))).shape == (3, 32, 32)


def test_captions_fit_their_images():
    pixels, captions, fits = tiny.Captioned(seed=3).batch(64)
    assert pixels.shape == (64, 3, 32, 32) and fits.diagonal().eq(1).all()

    def named(caption):
        return {kind for kind in KINDS if f" {kind} " in f" {caption} "}

    sizes = [len(named(caption)) for caption in captions]
    assert set(sizes) == {1, 2} and any(" at the " in caption for caption in captions)
    for row, caption in enumerate(captions):
        for column, other in enumerate(captions):
            if named(caption) <= named(other):
                assert fits[row, column] == 1  # an image has at least what its own caption names
            if sizes[row] == 2 and fits[row, column]:
                assert named(other) <= named(caption)  # no image has a third object


def test_contrast_by_hand():
    logits = torch.randn(5, 5, dtype=torch.float64)
    labels = torch.arange(5)
    both = [torch.nn.functional.cross_entropy(scores, labels) for scores in (logits, logits.T)]
    torch.testing.assert_close(tiny.contrast(logits, torch.eye(5, dtype=torch.float64)), sum(both) / 2)
    torch.testing.assert_close(tiny.contrast(torch.zeros(4, 4), torch.ones(4, 4)), torch.tensor(4.0).log())


def test_pretraining_learns(clip):
    losses = list(tiny.pretrain(tiny.make_model(), clip.tokenize, 25))
    assert sum(losses[-3:]) < sum(losses[:3]) - 0.5


# --- folders ----------------------------------------------------------------------------------------------------------


def spoil(folder, how):
    config = json.loads((folder / "config.json").read_text())
    if how == "no config":
        (folder / "config.json").unlink()
    elif how == "another model":
        config["model_type"] = "bert"
    elif how == "another pool":
        config[tiny.POOL_KEY] = "max"
    elif how == "no weights":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    elif how == "cut weights":
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:1000])
    elif how == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    elif how == "cut tokenizer":
        (folder / "tokenizer.json").write_text("{")
    elif how == "no processor":
        (folder / "preprocessor_config.json").unlink()
    elif how == "another size":
        file = folder / "preprocessor_config.json"
        values = json.loads(file.read_text())
        file.write_text(json.dumps({**values, "crop_size": {"height": 16, "width": 16}}))
    if how in ("another model", "another pool"):
        (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("no config", r"expected the folder of a CLIPModel, got .* without config\.json"),
        ("another model", "expected a model of type 'clip', got 'bert' in "),
        ("another pool", "expected pyml_pool one of cls, mean, got 'max' in "),
        (
            "no weights",
            r"expected the weights as safetensors in .*, got no model\.safetensors or model\.safetensors\.ind",
        ),
        ("cut weights", " cannot be read as a CLIPModel: "),
        ("no tokenizer", r"expected a tokenizer in .*, got no tokenizer\.json or vocab\.json and merges\.txt"),
        ("cut tokenizer", " cannot be read as a CLIPModel: "),
        ("no processor", "expected an image processor in .*, got no preprocessor_config"),
    ],
)
def test_a_wrong_folder_is_one_sentence(folder, tmp_path, how, sentence):
    shutil.copytree(folder, tmp_path / "clip")
    spoil(tmp_path / "clip", how)
    with pytest.raises(UserError, match=f"^clip: .*{sentence}") as caught:
        load_clip(tmp_path / "clip")
    assert "\n" not in str(caught.value)


def test_other_folders_are_one_sentence(folder, tmp_path):
    with pytest.raises(UserError, match="clip: expected the folder of a CLIPModel, got "):
        load_clip(tmp_path / "absent")
    with pytest.raises(UserError, match="clip: expected --clip, as the CLIP of the checkpoint is no longer in "):
        same_clip({"folder": str(tmp_path / "absent")}, None)
    shutil.copytree(folder, tmp_path / "clip")
    spoil(tmp_path / "clip", "another size")
    odd = load_clip(tmp_path / "clip")
    with pytest.raises(UserError, match=r"the image processor of .* gives \[3, 16, 16\], expected \[3, 32, 32\]"):
        odd.preprocess(Image.new("RGB", (40, 40)))


def rewrite(path, change):
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


@pytest.mark.parametrize("part", ["vision", "text", "pool", "heads", "words", "pixels"])
def test_fingerprints_tell_clips_apart(folder, clip, tmp_path, part):
    """By every number and every setting: what a version adds and how a file is laid out are neither."""
    place = tmp_path / "clip"
    shutil.copytree(folder, place)
    rewrite(place / "config.json", {"transformers_version": "0.1"})
    rewrite(place / "preprocessor_config.json", {})
    assert load_clip(place).source["fingerprint"] == clip.source["fingerprint"]
    if part in ("vision", "text"):
        model = load_clip(place).model
        with torch.no_grad():
            next(getattr(model, f"{part}_model").parameters()).flatten()[0] += 1e-3
        model.save_pretrained(place)
    elif part in ("pool", "heads"):
        config = json.loads((place / "config.json").read_text())
        vision = {**config["vision_config"], "num_attention_heads": 8 if part == "heads" else 4}
        rewrite(place / "config.json", {"vision_config": vision, POOL_KEY: "cls" if part == "pool" else "mean"})
    elif part == "words":
        words = json.loads((place / "tokenizer.json").read_text())
        known = words["model"]["vocab"]
        known["red"], known["blue"] = known["blue"], known["red"]
        (place / "tokenizer.json").write_text(json.dumps(words))
    else:
        rewrite(place / "preprocessor_config.json", {"image_mean": [0.3, 0.35, 0.35]})
    assert load_clip(place).source["fingerprint"] != clip.source["fingerprint"]
