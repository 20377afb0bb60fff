"""Ghost clipping: which backward passes, layers and number types the sum of a step is made of."""

import copy
import io

import pytest
import torch
from torch import nn

from tests.test_hetero_noise_optimizer_tied import CLIP, RECORDS, VECTORS, length, private, released

# Opacus' hooks see inputs that need no gradient: torch warns of it.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing", "ignore:grad and param do not obey")


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3))


def losses(model, x):
    return 100 * model(x).flatten(1).sum(1)


def stepped(model, optimizer, x):
    optimizer.backward(losses(model, x))
    optimizer.step()
    return [p.grad.detach() for p in optimizer.params]


def close(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def in_evaluation(model, x):
    torch.autograd.grad(losses(model.eval(), x).sum(), x)
    model.train()


EARLIER = {
    "backward": lambda model, x: losses(model, x).sum().backward(),
    "gradients of inputs": lambda model, x: torch.autograd.grad(losses(model, x).sum(), x),
    "evaluation": in_evaluation,
}


@pytest.mark.parametrize("cleared", [False, True])
@pytest.mark.parametrize("earlier", EARLIER)
def test_an_earlier_backward_pass_is_no_part_of_the_sum(earlier, cleared):
    """An adversarial example needs one; its inputs came with the factors of the pass after it."""
    model, optimizer = private(network())
    EARLIER[earlier](model, (1e4 * VECTORS[:1]).requires_grad_())
    if cleared:
        optimizer.zero_grad()
    found = stepped(model, optimizer, VECTORS[:1])
    assert 0.98 * CLIP < length(found) <= CLIP * (1 + 1e-5)
    close(found, released(network(), VECTORS[:1]))


@pytest.mark.parametrize("swapped", [False, True])
def test_a_backward_pass_between_is_refused(swapped):
    """Which of the two forward passes it took the inputs of is not known."""
    model, optimizer = private(network())
    first, second = losses(model, VECTORS), losses(model, 3 * VECTORS)
    if swapped:
        first, second = second, first
    second.sum().backward()
    with pytest.raises(ValueError, match="losses: expected one forward pass, and no other backward pass through the"):
        optimizer.backward(first)
    close(stepped(model, optimizer, VECTORS), released(network(), VECTORS))


def test_one_forward_pass_has_one_backward_pass():
    for layer in (nn.Linear(8, 8), nn.LayerNorm(8)):
        model, optimizer = private(nn.Sequential(layer))
        found = losses(model, VECTORS)
        found.sum().backward(retain_graph=True)
        with pytest.raises(ValueError, match=r"losses: expected (each use of a weight|one backward pass for each)"):
            optimizer.backward(found)


def test_a_forward_pass_that_was_not_used_is_named():
    """It was an error of every later forward pass, about tied parameters."""
    model, optimizer = private(network())
    model(VECTORS)
    with pytest.raises(ValueError, match=r"\(2 calls\), got 1 uses of .*; discard\(\) forgets a forward pass"):
        optimizer.backward(losses(model, VECTORS))
    optimizer.backward(losses(model, VECTORS))
    optimizer.zero_grad()
    model(VECTORS)
    optimizer.discard()
    close(stepped(model, optimizer, VECTORS), released(network(), VECTORS))


def test_two_calls_of_a_linear_layer_are_refused():
    """Its norm is that of one call."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(8, 8)

        def forward(self, x):
            return self.lin(torch.tanh(self.lin(x)))

    model, optimizer = private(Twice())
    with pytest.raises(ValueError, match=r"losses: expected one call of each linear layer .* \(2 calls\), got 2 uses"):
        optimizer.backward(losses(model, VECTORS))
    assert optimizer.steps == 0


class Attention(nn.Module):
    """A bias for one more place of the sequence: Opacus' rule takes the places for records."""

    def __init__(self):
        from opacus.layers import DPMultiheadAttention

        super().__init__()
        self.att = DPMultiheadAttention(6, 2, batch_first=True, add_bias_kv=True)
        self.lin = nn.Linear(6, 3)

    def forward(self, x):
        return self.lin(self.att(x, x, x)[0].mean(1))


@pytest.mark.parametrize("places", [4, 5, 6])
def test_places_are_not_taken_for_records(places):
    """As many places as records, and one more: a record moved the sum by twice the clip norm."""
    model, optimizer = private(Attention())
    with pytest.raises(ValueError, match=r"expected gradients of . records, batch first, got . of SequenceBias"):
        optimizer.backward(losses(model, torch.randn(5, places, 6)))


def test_an_autocast_does_not_round_the_sum():
    """At 256, bfloat16 has steps of 2."""
    sums = []
    for count in range(256, 264):
        torch.manual_seed(0)
        model, optimizer = private(nn.Sequential(nn.Linear(1, 1, bias=False)), clip=1.0)
        with torch.autocast("cpu", torch.bfloat16):
            optimizer.backward(model(torch.full((count, 1, 1), 3.0)).float().sum((1, 2)))
        assert optimizer._clipped[0].dtype == torch.float32
        sums.append(float(optimizer._clipped[0]))
    assert sums == pytest.approx(list(range(256, 264)), rel=1e-5)


def test_losses_in_16_bits_do_not_round_the_factors():
    for seed in range(60):
        torch.manual_seed(seed)
        model, optimizer = private(nn.Sequential(nn.Linear(6, 3)), clip=1.0)
        with torch.autocast("cpu", torch.bfloat16):
            found = (model(torch.randn(1, 6) * 20) - 1).square().sum(1)
        optimizer.backward(found.bfloat16())
        assert length(optimizer._clipped) <= 1 + 1e-5


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_a_model_may_be_copied_and_saved(mode):
    model, optimizer = private(network(), grad_sample_mode=mode)
    found = losses(model, 1e4 * VECTORS)  # waits for its backward pass
    expected = model.eval()(VECTORS)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (
        copy.deepcopy(model), copy.deepcopy(model._module), torch.optim.swa_utils.AveragedModel(model),
        torch.load(file, weights_only=False),
    ):  # fmt: skip
        torch.testing.assert_close(other(VECTORS), expected)
        assert not {id(p) for p in other.parameters()} & {id(p) for p in model.parameters()}
    model.train()
    if mode == "ghost":
        inputs = copy.deepcopy(model).capture_backprops_hook.__self__._inputs
        assert optimizer._records._inputs and not inputs, "what waits is of one model"
        optimizer.backward(found)
        optimizer.zero_grad()
        close(stepped(model, optimizer, VECTORS), released(network(), VECTORS))


def test_attributes_of_a_model_are_its_own():
    class Net(nn.Linear):
        def __init__(self):
            super().__init__(8, 3)
            self.activations, self.max_batch_len = [torch.tanh], 7

        def forward(self, x):
            return self.activations[0](super().forward(x))

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.activations = Net(), [torch.relu]

        def forward(self, x):
            return self.activations[0](self.inner(x))

    model, optimizer = private(Outer())
    for _ in range(2):
        optimizer.discard()
        stepped(model, optimizer, VECTORS)
    assert model._module.activations == [torch.relu] and model._module.inner.activations == [torch.tanh]
    assert model._module.inner.max_batch_len == 7 and optimizer.steps == 2


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_an_empty_batch_of_tokens(mode):
    model, optimizer = private(nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 3)), grad_sample_mode=mode)
    found = losses(model, torch.zeros(0, 3, dtype=torch.long))
    optimizer.backward(found) if mode == "ghost" else found.sum().backward()
    optimizer.step()
    assert optimizer.steps == 1 and not any(p.grad.any() for p in optimizer.params)


@pytest.mark.parametrize("mode", ["hooks", "ghost", "functorch"])
def test_packed_sequences_are_in_the_order_of_the_batch(mode):
    """Rows of the LSTM are those of the sorted batch, rows of the other layers are not."""
    from opacus.layers import DPGRU, DPLSTM, DPRNN

    class Packed(nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.rnn, self.out = kind(2, 5, batch_first=True), nn.Linear(5, 3)

        def forward(self, x, sizes):
            packed = nn.utils.rnn.pack_padded_sequence(x, sizes, batch_first=True, enforce_sorted=False)
            last = self.rnn(input=packed)[1]
            return self.out((last[0] if isinstance(last, tuple) else last)[-1])

    x, sizes = torch.randn(RECORDS, 4, 2), torch.tensor([2, 4, 1, 3, 4, 2])
    for kind in (DPLSTM, DPGRU, DPRNN):
        model, optimizer = private(Packed(kind), grad_sample_mode=mode)
        with pytest.raises(ValueError, match="model: expected packed sequences of a batch in order of length, got"):
            model(x, sizes)
        assert model.eval()(x, sizes).shape == (RECORDS, 3)
        model.train()
        order = torch.sort(sizes, descending=True, stable=True).indices
        found = model(x[order], sizes[order]).sum(1)
        optimizer.backward(found) if mode == "ghost" else found.sum().backward()
        optimizer.step()
        assert optimizer.steps == 1
