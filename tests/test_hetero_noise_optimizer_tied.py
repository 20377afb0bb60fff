"""Ghost clipping: no record adds more than its clip norm, whatever a model does with its weights; what is not seen is
refused."""

import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pyml.optim import make_private

pytest.importorskip("opacus", reason="opacus is not installed (pip install 'pyml[privacy]')")
pytest.importorskip("cryptography", reason="cryptography is not installed (pip install 'pyml[privacy]')")

# Opacus' hooks see inputs that need no gradient: torch warns of it.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing", "ignore:grad and param do not obey")
CLIP, RECORDS = 0.01, 6
TOKENS = torch.arange(RECORDS * 4).view(RECORDS, 4) % 20
VECTORS = torch.linspace(-2, 2, RECORDS * 8).view(RECORDS, 8).sin() * 3
SERIES = torch.linspace(-3, 3, RECORDS * 2 * 9).view(RECORDS, 2, 9).cos()
IMAGES = torch.linspace(-3, 3, RECORDS * 2 * 25).view(RECORDS, 2, 5, 5).cos()


def private(model, **named):
    loader = DataLoader(TensorDataset(torch.zeros(RECORDS, 1)), batch_size=RECORDS)
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    options = {"clip": CLIP, "noise_multiplier": 0.0, "loss_reduction": "sum", "seed": 1, **named}
    return make_private(model, inner, loader, **{"grad_sample_mode": "ghost", **options})[:2]


def released(model, x, target=None, cast=False, **named):
    """The sum of what the records add, as it is stepped with."""
    made, optimizer = private(model, **named)
    with torch.autocast("cpu", torch.bfloat16, enabled=cast):
        out = made(x)
    out = out.float().flatten(1)
    losses = 100 * (F.cross_entropy(out, target, reduction="none") if target is not None else out.sum(1))
    optimizer.backward(losses) if hasattr(optimizer, "backward") else losses.sum().backward()
    optimizer.step()
    return [p.grad.detach() for p in optimizer.params]


def length(gradients):
    return float(torch.stack([g.norm() for g in gradients]).norm())


class Tied(nn.Module):
    """An output layer that is the embedding."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.emb, self.lin = nn.Embedding(20, 8), nn.Linear(8, 8)

    def forward(self, x):
        return F.linear(torch.tanh(self.lin(100 * self.emb(x)).mean(1)), self.emb.weight)


class Custom(nn.Module):
    """A layer that Opacus has no rule for; its weight is used twice."""

    def __init__(self, weight=None, loud=1.0):
        super().__init__()
        torch.manual_seed(1)
        self.weight = nn.Parameter(torch.randn(8, 8)) if weight is None else weight
        self.loud = loud

    def forward(self, x, factor=1.0):
        loud, self.loud = self.loud, 1.0
        return factor * loud * torch.tanh(x @ self.weight) @ self.weight.t()


class Keyword(Custom):
    def forward(self, x):
        return self.inner(x, factor=100.0)

    def __init__(self):
        super(Custom, self).__init__()
        self.inner = Custom()


class Louder(nn.Linear):
    """Of another type than nn.Linear, and with a hook of its own."""


def hooked():
    model = nn.Sequential(nn.Linear(8, 8), Louder(8, 3))
    model[0].register_forward_hook(lambda layer, given, out: 100 * out)
    model[1].register_forward_hook(lambda layer, given, out: 100 * out)
    return model


def repeated():
    torch.manual_seed(0)
    conv = nn.Conv1d(2, 2, 3, padding=1)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv

        def forward(self, x):
            return self.conv(torch.tanh(self.conv(x)))

    return Twice()


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        from opacus.layers import DPLSTM

        torch.manual_seed(0)
        self.rnn, self.out = DPLSTM(2, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        return self.out(self.rnn(x.transpose(1, 2))[0][:, -1])


def convolutions(**named):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3, **named), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3))


def ready(model, x):
    with torch.no_grad():
        model(x)
    return model


MODELS = {
    "two uses in a layer": (Custom, VECTORS),
    "another result at each call": (lambda: Custom(loud=100.0), VECTORS),
    "a keyword argument": (Keyword, VECTORS),
    "hooks of others": (hooked, VECTORS),
    "two calls": (repeated, SERIES),
    "recurrent": (Recurrent, SERIES),
    "stride and groups": (lambda: convolutions(stride=2, groups=2, padding=1), IMAGES),
    "dilation": (lambda: convolutions(dilation=2, bias=False), IMAGES),
    "padded by a name": (lambda: convolutions(padding="same"), IMAGES),
    "padding index": (
        lambda: nn.Sequential(nn.Embedding(20, 8, padding_idx=3), nn.Flatten(), nn.Linear(32, 3)),
        TOKENS,
    ),
}


@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_no_record_adds_more_than_the_clip_norm(name, cast):
    build, x = MODELS[name]
    one = [released(ready(build(), x), x[n : n + 1], cast=cast) for n in range(RECORDS)]
    assert all(length(g) <= CLIP * (1 + 1e-5) for g in one)
    assert max(length(g) for g in one) > 0.98 * CLIP, "the clip is what they have"


@pytest.mark.parametrize(
    "name", ["two uses in a layer", "two calls", "recurrent", "stride and groups", "dilation", "padded by a name"]
)
def test_the_sum_is_that_of_gradients_of_samples(name):
    build, x = MODELS[name]
    hooks = released(ready(build(), x), x, grad_sample_mode="hooks")
    for a, b in zip(released(ready(build(), x), x), hooks):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("size", [1e1, 1e2, 1e3, 1e4, 1e5])
def test_places_of_a_sequence_that_cancel(size):
    """Their products are much larger than the gradient: its norm is not to be lost in rounding."""
    generator = torch.Generator().manual_seed(int(size))
    a, b = (torch.randn(1, 1, 64, generator=generator).repeat(1, 2, 1) for _ in range(2))
    b[:, 1] = torch.randn(64, generator=generator) / size - b[:, 1]

    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(64, 64)

        def forward(self, x):
            return self.lin(x * size) * b

    model, optimizer = private(Weighted(), clip=0.5)
    optimizer.backward(model(a).flatten(1).sum(1))
    optimizer.step()
    assert 0 < model._module.lin.weight.grad.double().norm() <= 0.5 * (1 + 1e-4)


@pytest.mark.parametrize("cast", [False, True])
def test_a_use_that_no_hook_sees_is_refused(cast):
    """The norm of a record was 0.027 here, at a clip norm of 0.01."""
    with pytest.raises(
        ValueError, match=r"losses: expected each use of a weight in a call of its layer, .* \(1 calls\)"
    ):
        released(Tied(), TOKENS[:1], torch.tensor([3]), cast=cast)
    bounded = released(Tied(), TOKENS[:1], torch.tensor([3]), grad_sample_mode="hooks")
    assert length(bounded) <= CLIP * (1 + 1e-5), "gradients of samples are clipped themselves"


def test_gradients_that_change_after_their_norm_are_refused():
    def louder(given):
        given[0].mul_(100)

    class Hooked(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(8, 3)

        def forward(self, x):
            found = self.lin(x)
            found.grad_fn.next_functions[0][0].register_prehook(louder)  # after the hook of the layer
            return found

    model, optimizer = private(Hooked())
    with pytest.raises(ValueError, match="losses: expected the numbers that the norms were made of, got another input"):
        optimizer.backward(model(VECTORS).square().sum(1))


def test_a_weight_of_two_layers_is_refused():
    emb = nn.Embedding(20, 8)
    for other in (Custom(emb.weight), nn.Linear(8, 20, bias=False)):
        other.weight = emb.weight
        with pytest.raises(ValueError, match="module: expected weights that each belong to one layer"):
            private(nn.Sequential(emb, nn.Tanh(), other))
    shared = nn.Linear(8, 8)
    with pytest.raises(ValueError, match=r"one layer, under ghost clipping, got one of '0\.0' and '0\.0'"):
        private(nn.Sequential(nn.Sequential(shared, nn.Tanh()), nn.Sequential(shared)))
    frozen = nn.Sequential(emb.requires_grad_(False), nn.Flatten(), nn.Linear(32, 3), nn.Tanh(), emb)
    assert private(frozen)[1].steps == 0


def test_a_forward_pass_alone_is_no_part_of_the_next():
    """Gradients of its calls would be taken for those of the next pass."""
    model, optimizer = private(repeated())
    model(100 * SERIES)
    losses = model(SERIES).flatten(1).sum(1)
    with pytest.raises(ValueError, match=r"losses: expected each use .* in one forward pass \(4 calls\), got 2 uses"):
        optimizer.backward(losses)
    optimizer.backward(100 * model(SERIES).flatten(1).sum(1))
    optimizer.step()
    for p, g in zip(optimizer.params, released(repeated(), SERIES)):
        torch.testing.assert_close(p.grad, g)
    model(SERIES)
    optimizer.discard()
    optimizer.backward(model(SERIES).flatten(1).sum(1))
    assert optimizer.steps == 1


def test_looking_for_uses_takes_no_time():
    """Against a whole step of a small network, whose share is the largest."""
    torch.manual_seed(0)
    layers = [layer for _ in range(3) for layer in (nn.Linear(512, 512), nn.Tanh())]
    model, optimizer = private(nn.Sequential(*layers, nn.Linear(512, 1)))
    x, looking, whole = torch.randn(64, 512), [], []
    for _ in range(8):
        losses = model(x).squeeze(1)
        start = time.perf_counter()
        optimizer._records.check_uses(losses)
        looking.append(time.perf_counter() - start)
        optimizer.backward(losses)
        optimizer.step()
        whole.append(time.perf_counter() - start)
    assert min(looking) < 0.05 * min(whole)


def one_rank(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    try:
        torch.manual_seed(0)
        model, optimizer = private(nn.Sequential(nn.Linear(8, 3)), noise_multiplier=1.0)
        found = []
        for bad in (True, False):
            x = VECTORS[:2].clone()
            x[0, 0] = torch.nan if bad and rank == 1 else 1.0
            for _ in range(1 + rank):  # ranks may have more parts of a batch than others
                optimizer.backward(model(x).sum(1))
                optimizer.virtual_step()
            optimizer.backward(model(x).sum(1))
            try:
                optimizer.step()
            except ValueError as error:
                found.append(str(error))
        torch.save((found, optimizer.steps, model._module[0].weight.detach()), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_a_bad_record_of_one_process_stops_all(tmp_path):
    processes.spawn(one_rank, (2, str(tmp_path)), nprocs=2)
    (first, steps, weight), (second, others, other) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert len(first) == len(second) == 1 and steps == others == 1 and torch.equal(weight, other)
    assert "expected a backward pass in every process, got one that failed in another process" in first[0]
    assert "expected records with finite gradients" in second[0]
