"""OTAlignment: PLOT's similarity and loss, views instead of copies, masks, dtypes, wrong input."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyml import ops
from pyml.nn import OTAlignment

B, M, N, K, D = 3, 7, 4, 5, 8


@pytest.fixture
def features() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    local = torch.randn(B, M, D, dtype=torch.float64, generator=generator)
    text = torch.randn(N, K, D, dtype=torch.float64, generator=generator)
    return local.requires_grad_(), text.requires_grad_()


def plot(local: Tensor, text: Tensor, eps: float = 0.1, iterations: int = 100) -> tuple[Tensor, Tensor]:
    """PLOT's loop, image by image and class by class: (similarity, regularised value), each ``[B, K]``."""
    similarity, value = [], []
    for image in F.normalize(local, dim=-1):
        for of_class in F.normalize(text, dim=-1).unbind(1):
            sim = image @ of_class.T
            m, n = sim.shape
            with torch.no_grad():
                kernel = torch.exp((sim - 1) / eps)
                u, v = torch.ones(m, dtype=sim.dtype), torch.ones(n, dtype=sim.dtype)
                for _ in range(iterations):
                    u = (1 / m) / (kernel @ v)
                    v = (1 / n) / (kernel.T @ u)
                plan = u[:, None] * kernel * v
            similarity.append((plan * sim).sum())
            entropy = (plan * torch.log(plan * m * n)).sum() - plan.sum() + 1
            value.append((plan * (1 - sim)).sum() + eps * entropy)
    return torch.stack(similarity).view(len(local), -1), torch.stack(value).view(len(local), -1)


# --- values -----------------------------------------------------------------------------------------------------------


def test_similarity_and_its_gradient_are_those_of_plot(features):
    expected, _ = plot(*features)
    found = OTAlignment()(*features)
    assert found.shape == (B, K)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    weights = torch.linspace(-1, 1, B * K, dtype=torch.float64).view(B, K)
    gradients = [torch.autograd.grad((y * weights).sum(), features) for y in (found, expected)]
    for ours, theirs in zip(*gradients):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_a_match_is_more_similar_than_none():
    local = torch.eye(D)[:4].expand(2, 4, D)
    text = torch.stack([torch.eye(D)[:4], torch.eye(D)[4:]], 1)  # class 0 has the image's parts, class 1 others
    found = OTAlignment(eps=0.01)(local, text)
    torch.testing.assert_close(found, torch.tensor([[1.0, 0.0]] * 2), atol=1e-4, rtol=0)


def test_loss_is_cross_entropy_and_the_value_of_the_own_class(features):
    labels = torch.tensor([4, 0, 2])
    similarity, value = plot(*features)
    own = value[torch.arange(B), labels]
    torch.testing.assert_close(OTAlignment().discrepancy(*features, labels), own, rtol=1e-10, atol=1e-12)
    layer = OTAlignment(as_loss=True, weight=0.3, logit_scale=20)
    expected = F.cross_entropy(20 * similarity, labels) + 0.3 * own.mean()
    torch.testing.assert_close(layer(*features, labels), expected, rtol=1e-9, atol=1e-11)
    logits = torch.randn(B, K, dtype=torch.float64)
    expected = F.cross_entropy(logits, labels) + 0.3 * own.mean()
    found = layer(*features, labels, logits=logits)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    gradients = [torch.autograd.grad(y, features) for y in (found, expected)]  # the plan is a constant in both
    for ours, theirs in zip(*gradients):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


def test_implicit_gradient_against_differences(features):
    layer = OTAlignment(eps=0.3, max_iter=400, plan_grad="implicit")
    local, text = (t[:1].detach() if t.shape[0] == B else t[:, :2].detach() for t in features)
    assert torch.autograd.gradcheck(layer, (local.requires_grad_(), text.requires_grad_()), eps=1e-6, atol=1e-6)


def test_projects_local_features(features):
    local, text = (t.detach().float() for t in features)
    layer = OTAlignment(D, D)
    torch.testing.assert_close(layer(local, text), OTAlignment()(local @ layer.project.weight.T, text))
    layer(local, text).sum().backward()
    assert layer.project.weight.grad.abs().sum() > 0
    assert list(layer.state_dict()) == ["project.weight"]


# --- memory, masks, dtypes --------------------------------------------------------------------------------------------


class Written(TorchDispatchMode):
    """Names of the operations whose results have this many numbers."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.names = size, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        first = out[0] if isinstance(out, (tuple, list)) else out
        if isinstance(first, Tensor) and first.numel() == self.size and not func.is_view:
            self.names.append(func.overloadpacket.__name__)
        return out


def test_the_cost_is_a_view_of_one_product(features, monkeypatch):
    local, text = (t.detach() for t in features)
    seen = []
    solve = ops.sinkhorn

    def watch(cost: Tensor, *args, **options):
        seen.append(cost)
        return solve(cost, *args, **options)

    monkeypatch.setattr(ops, "sinkhorn", watch)
    with Written(B * K * M * N) as written:
        OTAlignment()(local, text)
    (cost,) = seen
    assert cost.shape == (B, K, M, N) and cost.stride() == (M * N * K, 1, N * K, K)
    assert written.names == ["addmm"]


@pytest.mark.parametrize("as_loss", [False, True])
def test_masked_features_are_not_read(features, as_loss):
    local, text = features
    counts, labels = [7, 3, 0], torch.tensor([1, 4, 0])
    mask = torch.arange(M) < torch.tensor(counts)[:, None]
    spoiled = local.detach().masked_fill(~mask.unsqueeze(-1), float("nan")).requires_grad_()
    layer = OTAlignment()

    def call(local: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
        return layer.discrepancy(local, text, labels, mask) if as_loss else layer(local, text, mask=mask)

    found = call(spoiled, labels, mask)
    gradients = torch.autograd.grad(found.sum(), (spoiled, text))
    assert all(g.isfinite().all() for g in gradients)
    assert not gradients[0][~mask].any() and gradients[0][mask].any() and not found[2].any()
    for b, count in enumerate(counts[:2]):
        alone = call(local[b : b + 1, :count], labels[b : b + 1])
        torch.testing.assert_close(found[b], alone[0], rtol=1e-10, atol=1e-12)


def test_a_similarity_depends_on_its_image_alone(features):
    local, text = (t.detach().float() for t in features)
    local = local.repeat(8, 1, 1)
    whole = OTAlignment()(local, text)
    assert torch.equal(whole[:B], whole[B : 2 * B])
    torch.testing.assert_close(OTAlignment()(local[:1], text), whole[:1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_and_autocast(features, dtype):
    local, text = (t.detach().to(dtype) for t in features)
    expected, _ = plot(local.double(), text.double())
    found = OTAlignment()(local, text)
    assert found.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(OTAlignment()(local, text), found)


def test_a_zero_vector_is_like_nothing():
    local, text = torch.zeros(1, 2, D, requires_grad=True), torch.randn(2, 3, D)
    found = OTAlignment()(local, text)
    assert found.abs().max() < 1e-6
    assert torch.autograd.grad(found.sum(), local)[0].isfinite().all()


# --- wrong input ------------------------------------------------------------------------------------------------------

X, T = torch.randn(B, M, D), torch.randn(N, K, D)
LABELS = torch.zeros(B, dtype=torch.int64)
REFUSED = {
    "local: expected [B, M, D]": (X[0], T),
    "text: expected [N, K, D]": (X, T[0]),
    "text: expected [N, K, 8], as wide as local": (X, T[..., :5]),
    "local: expected float32": (X.long(), T),
    "labels: expected None without as_loss=True": (X, T, LABELS),
}


@pytest.mark.parametrize("words", REFUSED)
def test_wrong_features_are_one_sentence(words):
    with pytest.raises((ValueError, TypeError)) as caught:
        OTAlignment()(*REFUSED[words])
    assert str(caught.value).startswith(f"OTAlignment: {words}") and "\n" not in str(caught.value)


def test_wrong_labels_masks_and_options_are_one_sentence():
    loss = OTAlignment(as_loss=True)
    for call, words in (
        (lambda: loss(X, T), "labels: expected the class of each image"),
        (lambda: loss(X, T, LABELS[:2]), r"labels: expected int64 \[B\] = \[3\], got torch.int64 \[2\]"),
        (lambda: loss(X, T, LABELS + K), r"labels: expected classes from 0 to 4, got \[5, 5, 5\]"),
        (lambda: loss(X, T, [0, 1, 2]), r"labels: expected int64 \[B\] = \[3\], got list"),
        (lambda: loss(X, T, LABELS, logits=torch.zeros(3, K + 1)), r"logits: expected shape \[B, K\] = \[3, 5\], got"),
        (lambda: loss(X, T, LABELS - 1), r"labels: expected classes from 0 to 4, got \[-1, -1, -1\]"),
        (lambda: OTAlignment()(X, T, mask=torch.ones(B, M)), r"mask: expected bool \[B, M\] = \[3, 7\], got torch.fl"),
        (lambda: OTAlignment()(X, T, mask=torch.ones(M, dtype=torch.bool)), "mask: expected bool"),
        (lambda: OTAlignment(plan_grad="unroll"), "plan_grad: expected one of detach, implicit"),
        (lambda: OTAlignment(local_dim=4), "joint_dim: expected the width of the joint space beside local_dim"),
        (lambda: OTAlignment(0, D), "local_dim: expected an integer >= 1, got 0"),
        (lambda: OTAlignment(eps=-1), "eps: expected a finite number > 0, got -1"),
        (lambda: OTAlignment(max_iter=0), "max_iter: expected an integer from 1"),
        (lambda: OTAlignment(tol="small"), "tol: expected a finite number >= 0"),
        (lambda: OTAlignment(weight=math.inf), "weight: expected a finite number >= 0, got inf"),
        (lambda: OTAlignment(logit_scale=None), "logit_scale: expected a finite number > 0, got None"),
        (lambda: OTAlignment(4, D)(X, T), r"local: expected \[B, M, 4\], got \[3, 7, 8\]"),
    ):
        with pytest.raises(ValueError, match=f"^OTAlignment: {words}"):
            call()
