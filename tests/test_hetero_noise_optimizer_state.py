"""make_private: what a model keeps of its records beside gradients would leave without noise, and is refused."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pyml.optim import make_private

pytest.importorskip("opacus", reason="opacus is not installed (pip install 'pyml[privacy]')")
pytest.importorskip("cryptography", reason="cryptography is not installed (pip install 'pyml[privacy]')")

# Opacus' hooks see inputs that need no gradient: torch warns of it.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing", "ignore:grad and param do not obey")
X = torch.linspace(-1, 1, 4 * 3 * 5).view(4, 3, 5)


def private(*layers, mode="hooks"):
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(15, 2))
    loader = DataLoader(TensorDataset(X), batch_size=2)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    return make_private(model, inner, loader, clip=1.0, noise_multiplier=1.0, grad_sample_mode=mode)


class Keeps(nn.Module):
    """A floating buffer, and what a forward pass does with it."""

    def __init__(self, act, dtype=torch.float32):
        super().__init__()
        self.act = act
        self.register_buffer("mean", torch.zeros(3, dtype=dtype))

    def forward(self, x):
        self.act(self, x)
        return x


def writes(layer, x):
    layer.mean.mul_(0.9).add_(0.1 * x.detach().mean((0, 2)))


def replaces(layer, x):
    layer.mean = x.detach().mean((0, 2))


def adds(layer, x):
    layer.register_buffer("other", x.detach().mean((0, 2)))


@pytest.mark.parametrize("mode", ["hooks", "functorch", "ghost"])
def test_running_statistics_are_refused(mode):
    for layer in (nn.InstanceNorm1d(3, track_running_stats=True), nn.LazyInstanceNorm1d(track_running_stats=True)):
        with pytest.raises(ValueError, match=r"^make_private: model: expected no running statistics, .* '0'$"):
            private(layer, mode=mode)
    with pytest.raises(ValueError, match="expected no batch norm, which mixes samples"):
        private(nn.LazyBatchNorm1d(), mode=mode)
    model, _, _ = private(nn.InstanceNorm1d(3), mode=mode)
    assert model(X).shape == (4, 2)


@pytest.mark.parametrize("mode", ["hooks", "functorch", "ghost"])
@pytest.mark.parametrize("act", [writes, replaces, adds])
def test_a_forward_pass_that_keeps_of_its_records_is_an_error(act, mode):
    model, optimizer, _ = private(Keeps(act), mode=mode)
    name = "other" if act is adds else "mean"
    with pytest.raises(
        ValueError, match=f"model: expected no forward pass that writes to its state, .*'{name}' of Keeps"
    ):
        model(X)
    with pytest.raises(ValueError, match="expected no forward pass that writes to its state"):
        model._module[0](X)  # alone
    assert optimizer.steps == 0


def test_rows_that_are_looked_up_are_not_shown_by_their_norm():
    """With max_norm a forward pass rescales the rows of its records."""
    model, _, _ = private(nn.Embedding(9, 5, max_norm=0.1))
    with pytest.raises(ValueError, match=r"writes to its state, which gets no noise, got '(0.)?weight'"):
        model(torch.tensor([[1, 2, 3]]))


def test_what_a_forward_pass_may_do():
    """Count, read, and write in evaluation; who loads a state or moves a model is no forward pass."""
    model, optimizer, _ = private(Keeps(lambda layer, x: layer.mean.add_(1), torch.int64), Keeps(lambda layer, x: None))
    state = {name: t.clone() for name, t in model.state_dict().items()}
    for _ in range(2):
        model.load_state_dict(state)
        model(X).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.steps == 2 and model._module[0].mean[0] == 1
    other = private(Keeps(writes))[0].eval()
    assert other(X).shape == (4, 2) and other._module[0].mean.any()


def test_paddings_that_opacus_does_not_know_are_refused():
    """Its rule pads with zeros; functorch asks the layer itself."""

    def conv():
        torch.manual_seed(0)
        return nn.Conv1d(3, 3, 3, padding=1, padding_mode="circular")

    for mode in ("hooks", "ghost"):
        with pytest.raises(
            ValueError, match=r"model: expected convolutions padded with zeros, .* 'circular' of Conv1d '0'"
        ):
            private(conv(), mode=mode)
    model, _, _ = private(conv(), mode="functorch")
    model(X).square().sum(1).mean().backward()
    for p in model.parameters():
        torch.testing.assert_close(p.grad_sample.mean(0), p.grad)


def test_paddings_of_layers_that_no_rule_has_wrong():
    """A frozen weight has no gradient, a layer of another type is asked itself, and any layer may have such a name."""

    class Padded(nn.Conv1d):
        """Of another type than nn.Conv1d."""

    class Other(nn.Flatten):
        padding_mode = "edge"

    kind = {"padding": 1, "padding_mode": "reflect"}
    for mode in ("hooks", "ghost"):
        frozen = nn.Conv1d(3, 3, 3, **kind)
        frozen.weight.requires_grad_(False)
        model, optimizer, _ = private(Padded(3, 3, 3, **kind), frozen, Other(), mode=mode)
        found = model(X).square().sum(1)
        optimizer.backward(found) if mode == "ghost" else found.mean().backward()
        if mode == "hooks":
            for p in optimizer.params:
                torch.testing.assert_close(p.grad_sample.mean(0), p.grad)
        optimizer.step()
        assert optimizer.steps == 1 and len(optimizer.params) == 5


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_a_buffer_that_the_first_pass_makes(mode):
    class Rotary(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("cos", None, persistent=False)

        def forward(self, x):
            if self.cos is None:
                self.cos = torch.linspace(0, 1, 5).cos()
            return x * self.cos

    with pytest.raises(ValueError, match=r"got '(0.)?cos' of .*, which it made \(a pass before make_private"):
        private(Rotary(), mode=mode)[0](X)
    layer = Rotary()
    layer(X)
    assert private(layer, mode=mode)[0](X).shape == (4, 2)
