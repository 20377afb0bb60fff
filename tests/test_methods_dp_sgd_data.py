"""pyml train dp_sgd: idx files, splits, networks, scales of the arms, guides of earlier runs."""

import gzip
import json
import math
import os
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from pyml.methods import UserError
from pyml.methods._engine import epoch_generator
from pyml.methods._measure import parameters
from pyml.methods.dp_sgd import arms, data, guides
from pyml.methods.dp_sgd.model import build, load_model, save_model
from pyml.privacy import dp, effective_multiplier, from_parameters, noise_power_gain
from tests.dp_sgd_runs import digits
from tests.method_runs import ROOT, TRAINING, needs

needs(*TRAINING, "sklearn", "opacus", "dp_accounting")

MNIST = Path(os.environ.get("PYML_DATA", ROOT.parent / "shared" / "data")) / "mnist"


@pytest.fixture(scope="module")
def task():
    return digits()


# --- files and splits -------------------------------------------------------------------------------------------------


def idx(values):
    """An idx file of a uint8 tensor."""
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    return bytes((0, 0, 8, values.dim())) + sizes + values.numpy().tobytes()


def write_mnist(folder, count=30, side=8):
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for name, packed in (("train", True), ("t10k", False)):
        images = torch.randint(256, (count, side, side), generator=generator, dtype=torch.uint8)
        labels = torch.arange(count, dtype=torch.uint8) % 10
        for values, kind in ((images, "images-idx3"), (labels, "labels-idx1")):
            path = folder / f"{name}-{kind}-ubyte{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(idx(values)) if packed else idx(values))
    return folder


def test_idx_files(tmp_path):
    train, test = data.load_idx_folder(write_mnist(tmp_path / "mnist"))
    generator = torch.Generator().manual_seed(0)
    for records in (train, test):
        images = torch.randint(256, (30, 8, 8), generator=generator, dtype=torch.uint8)
        assert torch.equal(records.images, images.unsqueeze(1) / 255) and records.images.dtype == torch.float32
        assert records.labels.tolist() == [n % 10 for n in range(30)]


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("t10k-images-idx3-ubyte", lambda b: b[:-1], r"^data: expected 1920 values after the header of \S+, got 1919$"),
        ("t10k-images-idx3-ubyte", lambda b: b + b"x", "after the header of .*, got more than 1920$"),
        ("t10k-images-idx3-ubyte", lambda b: b[:9], r"^data: expected an idx file .* 3 dimensions, got \S+ubyte$"),
        ("t10k-images-idx3-ubyte", lambda b: b"\0\0\x0d" + b[3:], "expected an idx file of unsigned bytes"),
        ("t10k-images-idx3-ubyte", lambda b: b[:4] + b"\xff" * 12 + b[16:], "expected at most 2147483648 values"),
        ("t10k-labels-idx1-ubyte", lambda b: idx(torch.zeros(29, dtype=torch.uint8)), "as images, 30, got 29$"),
        ("train-images-idx3-ubyte.gz", lambda b: b[:40], "t10k|ended before"),
        ("train-images-idx3-ubyte.gz", lambda b: b"no gzip", "Not a gzipped file"),
        ("t10k-images-idx3-ubyte", lambda b: idx(torch.zeros(30, 8, 9, dtype=torch.uint8)), "got 30 of 8 x 9$"),
        ("t10k-images-idx3-ubyte", lambda b: idx(torch.zeros(30, 9, 9, dtype=torch.uint8)), r"of one size, got \[8"),
    ],
)  # fmt: skip
def test_broken_idx_files_are_one_sentence(tmp_path, name, change, sentence):
    path = write_mnist(tmp_path / "mnist") / name
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=sentence):
        data.load_idx_folder(tmp_path / "mnist")


def test_missing_idx_files_are_one_sentence(tmp_path):
    folder = write_mnist(tmp_path / "mnist")
    (folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(UserError, match=r"no file t10k-labels-idx1-ubyte or t10k-labels-idx1-ubyte\.gz in"):
        data.load_idx_folder(folder)
    with pytest.raises(UserError, match="expected a folder with MNIST's idx files, got"):
        data.load_idx_folder(tmp_path / "none")


def test_parts_share_no_record(task):
    assert {name: len(getattr(task, name)) for name in ("private", "public", "valid", "test")} == {
        "private": 988, "public": 180, "valid": 270, "test": 359,
    }  # fmt: skip
    whole = data.load_digits()
    parts = [getattr(task, name) for name in ("private", "public", "valid", "test")]
    rows = torch.cat([torch.cat([p.images.flatten(1), p.labels[:, None]], 1) for p in parts])
    again = torch.cat([whole.images.flatten(1), whole.labels[:, None]], 1)
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, again.tolist()))
    assert (task.side, task.classes) == (8, 10)


def test_a_split_follows_from_its_seed(task):
    again, other = digits(0), digits(1)
    assert torch.equal(again.private.images, task.private.images) and again.facts() == task.facts()
    assert not torch.equal(other.private.images, task.private.images)
    assert other.source == task.source and other.facts() != task.facts()


def test_splits_that_leave_too_little_are_one_sentence():
    few = data.load_digits().take(torch.arange(200))
    with pytest.raises(UserError, match="expected at least 100 private records, got 90 of 200"):
        data.split("few", few, None, public=0.1, valid=0.25, test_share=0.2, seed=0)
    with pytest.raises(UserError, match="expected at least one validation record, got none of 200"):
        data.split("few", few, None, public=0.1, valid=0.001, test_share=0.2, seed=0)


@pytest.mark.skipif(not MNIST.exists(), reason="MNIST is not here (PYML_DATA names the folder that holds it)")
def test_mnist():
    train, test = data.load_idx_folder(MNIST)
    assert train.images.shape == (60000, 1, 28, 28) and test.images.shape == (10000, 1, 28, 28)
    assert train.labels.bincount()[:3].tolist() == [5923, 6742, 5958]


@pytest.mark.parametrize(("side", "count"), [(8, 9258), (28, 26010)])
def test_networks(side, count):
    net = build(side, 10)
    assert parameters(net) == count
    assert net(torch.rand(3, 1, side, side)).shape == (3, 10)


@pytest.mark.parametrize("side", [4, 5, 19, 20, 64])
def test_networks_of_other_sides(side):
    assert build(side, 3)(torch.rand(2, 1, side, side)).shape == (2, 3)


# --- scales -----------------------------------------------------------------------------------------------------------


def scales(task, arm, net):
    from opacus.grad_sample import GradSampleModule

    torch.manual_seed(1)
    guide = guides.Guide([torch.ones_like(p) + i for i, p in enumerate(net.parameters())], dp(1.0, 1e-6), "made")

    def twin():
        return GradSampleModule(build(task.side, task.classes))

    return arms.Scales(arms.ARMS[arm], twin, task.public, guide, seed=3)


@pytest.fixture
def net(task):
    torch.manual_seed(0)
    return build(task.side, task.classes)


def test_public_gradients_are_those_of_the_network(task, net):
    found = scales(task, "whitened", net).gradients(net)
    weights = {name: p.detach() for name, p in net.named_parameters()}

    def loss(w, image, label):
        return nn.functional.cross_entropy(functional_call(net, w, (image[None],)), label[None])

    truth = vmap(grad(loss), (None, 0, 0))(weights, task.public.images, task.public.labels)
    for one, two in zip(found, truth.values()):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)
    assert all(p.grad is None and not hasattr(p, "grad_sample") for p in net.parameters())


def test_provenance_of_scales(task, net):
    kinds = {arm: scales(task, arm, net).scale(net) for arm in arms.ARMS if arms.ARMS[arm].mode and arm != "group"}
    assert kinds.pop("isotropic") is None
    assert {arm: [str(p) for p in scale.provenance] for arm, scale in kinds.items()} == {
        "l2": ["public", "released_iterate"], "whitened": ["public", "released_iterate"],
        "whitened-permuted": ["public", "released_iterate"], "parameters": ["dp(epsilon=1, delta=1e-06)"],
        "parameters-permuted": ["dp(epsilon=1, delta=1e-06)"], "iterate": ["released_iterate"],
        "iterate-permuted": ["released_iterate"],
    }  # fmt: skip
    assert kinds["whitened"].gain > 1.2
    own = from_parameters(list(net.parameters()), provenance="released_iterate").tensors
    assert all(torch.equal(a, b) for a, b in zip(kinds["iterate"].tensors, own))


def test_a_permuted_scale_has_the_same_values_elsewhere(task, net):
    plain, one, two = (scales(task, arm, net).scale(net) for arm in ("whitened", *["whitened-permuted"] * 2))
    flat = [torch.cat([t.flatten() for t in scale.tensors]) for scale in (plain, one, two)]
    assert torch.equal(flat[0].sort().values, flat[1].sort().values) and torch.equal(flat[1], flat[2])
    assert (flat[0] != flat[1]).float().mean() > 0.9


def test_the_last_weights_are_permuted_the_same_way_in_every_epoch(task, net):
    """Else the permuted scales would average out; and all permuted arms of a seed have one permutation."""
    made = [scales(task, arm, net) for arm in ("iterate", "iterate-permuted")]
    assert made[1].changes, "it follows the weights"
    order = torch.randperm(sum(p.numel() for p in net.parameters()), generator=epoch_generator(3, 0))
    before = []
    for _ in range(2):
        plain, mixed = (torch.cat([t.flatten() for t in one.scale(net).tensors]) for one in made)
        assert torch.equal(mixed, plain[order]) and not any(torch.equal(mixed, old) for old in before)
        before.append(mixed)
        with torch.no_grad():
            for p in net.parameters():
                p.mul_(torch.linspace(0.5, 2, p.numel()).view_as(p))


def test_groups_have_the_least_noise_of_their_epsilon(task, net):
    how = arms.clipping(arms.ARMS["group"], scales(task, "group", net), net, 0.3)
    sizes = [sum(p.numel() for p, g in zip(net.parameters(), how["groups"]) if g == k) for k in range(4)]
    chosen = [next(s for s, g in zip(how["scale"], how["groups"]) if g == k) for k in range(4)]
    assert how["groups"] == [0, 0, 1, 1, 2, 2, 3, 3] and math.hypot(*how["clip"]) == pytest.approx(0.3)

    def power(scale):
        std = 1 / effective_multiplier(1.0, how["clip"], "group", list(scale))
        return sum(n * (std * s) ** 2 for n, s in zip(sizes, scale))

    generator = torch.Generator().manual_seed(0)
    for spread in (0.01, 0.3, 1.0):
        for _ in range(20):
            other = [s * math.exp(spread * v) for s, v in zip(chosen, torch.randn(4, generator=generator).tolist())]
            assert power(chosen) <= power(other) * (1 + 1e-9)


def test_predicted_gains(task, net):
    made = {arm: scales(task, arm, net) for arm in ("isotropic", "whitened", "whitened-permuted", "l2", "group")}
    how = {arm: arms.clipping(arms.ARMS[arm], one, net, 0.3) for arm, one in made.items()}
    gains = {arm: one.gain(net, how[arm]) for arm, one in made.items()}
    rms = [g.double().square().mean(0).sqrt() for g in made["whitened"].gradients(net)]
    best = float(noise_power_gain(rms))
    assert gains["isotropic"] == 1 and 1.2 < gains["whitened"] <= best * (1 + 1e-9)
    assert gains["whitened"] == pytest.approx(best, rel=0.05), "all but the floor of the scale"
    assert gains["whitened-permuted"] < 1
    s = torch.cat([t.double().flatten() for t in how["l2"]["scale"].tensors])
    assert gains["l2"] == pytest.approx(float(s.min() ** 2 / s.square().mean()), rel=1e-6)
    sizes = torch.tensor([p.numel() for p in net.parameters()]).double()
    stds = torch.tensor(how["group"]["scale"]).double() * math.sqrt(
        sum((c / s) ** 2 for c, s in zip(how["group"]["clip"], how["group"]["scale"][::2]))
    )  # with a multiplier of 1
    assert gains["group"] == pytest.approx(float(sizes.sum() * 0.3**2 / (sizes * stds**2).sum()), rel=1e-6)
    bare = arms.Scales(arms.ARMS["iterate"], made["l2"].make_twin, task.public.take(torch.arange(0)), None, seed=3)
    assert bare.gain(net, {}) is None, "nothing public tells how large gradients are"


# --- names and guides -------------------------------------------------------------------------------------------------


def test_rows():
    assert arms.row_names(("non-private", "l2"), (1.0, 0.5)) == ("non-private", "l2@1", "l2@0.5")
    assert [arms.parse_row(name) for name in ("non-private", "l2@0.5")] == [("non-private", None), ("l2", 0.5)]


def test_provenance_options():
    assert str(guides.parse_provenance("public")) == "public"
    assert guides.parse_provenance("dp:0.5:1e-6") == dp(0.5, 1e-6)
    for text in ("unknown", "private_batch"):
        sentence = f"guide-provenance: expected public or dp:EPSILON:DELTA, as {text} leaves no finite epsilon"
        with pytest.raises(UserError, match=f"^{sentence}$"):
            guides.parse_provenance(text)
    for text in (
        "",
        "dp",
        "dp:1",
        "dp:inf:0",
        "dp:nan:0",
        "dp:-1:0",
        "dp:1:2",
        "dp:a:b",
        "public:1",
        "released_iterate",
    ):
        with pytest.raises(UserError, match=f"^guide-provenance: expected .*, got {text!r}"):
            guides.parse_provenance(text)


def guide_file(folder, task, source=None, **changes):
    """A released model in its run folder."""
    info = {"side": 8, "classes": 10, "arm": "isotropic", "epsilon": 0.9, "delta": 1e-6, "noise": "fast",
            "unit": "record", **changes}  # fmt: skip
    torch.manual_seed(5)
    path = folder / "isotropic@3" / "seed0" / "model.safetensors"
    save_model(path, build(info["side"], info["classes"]), info)
    config = {"method": "dp_sgd", "source": source or task.source, "private_checksum": task.private_checksum}
    (folder / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("changes", "provenance", "unit", "sentence"),
    [
        ({}, "public", "record", "guide-provenance: expected at least dp:0.9:1e-06, which {} spent on the same data"),
        ({}, "dp:0.8:1e-6", "record", "guide-provenance: expected at least dp:0.9:1e-06"),
        ({}, "dp:0.9:1e-7", "record", "guide-provenance: expected at least dp:0.9:1e-06"),
        ({}, "dp:0.9:1e-6", "client of 9, split 0", "guide: expected an epsilon of one client of 9, split 0, got"),
        ({"unit": "client of 9, split 0"}, "dp:9:1e-3", "record", "guide: expected an epsilon of one record, got one"),
        ({"noise": "seeded"}, "dp:0.9:1e-6", "record", "guide: expected noise without a seed beside --private"),
        ({"epsilon": None}, "dp:9:1e-3", "record", "guide: expected a model with a finite epsilon"),
        ({"classes": 9}, "public", "record", "guide: expected a network for images of side 8 and 10 classes, got 8"),
    ],
)  # fmt: skip
def test_guides_whose_price_is_not_paid_are_refused(tmp_path, task, changes, provenance, unit, sentence):
    path = guide_file(tmp_path, task, **changes)
    with pytest.raises(UserError, match="^" + re.escape(sentence.format(path))):
        guides.load_guide(path, provenance, task, private=True, unit=unit)


def test_guides_that_are_paid_for(tmp_path, task):
    path = guide_file(tmp_path / "one", task)
    paid = guides.load_guide(path, "dp:0.9:1e-6", task, private=True, unit="record")
    assert paid.provenance == dp(0.9, 1e-6)
    assert all(torch.equal(a, b) for a, b in zip(paid.weights, load_model(path)[0].parameters()))
    other = guide_file(tmp_path / "two", task, source="other data", epsilon=None)
    assert guides.load_guide(other, "public", task, private=True, unit="record").provenance.kind == "public"
    client = guide_file(tmp_path / "three", task, unit="client of 9, split 0")
    same = guides.load_guide(client, "dp:1:1e-6", task, private=True, unit="client of 9, split 0")
    assert same.provenance.epsilon == 1
