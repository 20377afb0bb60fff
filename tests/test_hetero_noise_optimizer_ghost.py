"""Ghost clipping: the same step as with gradients of samples, without them; what it cannot do is said."""

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pyml.optim import GhostNoiseOptimizer, make_private
from pyml.privacy import History

pytest.importorskip("opacus", reason="opacus is not installed (pip install 'pyml[privacy]')")
pytest.importorskip("cryptography", reason="cryptography is not installed (pip install 'pyml[privacy]')")
pytest.importorskip("dp_accounting", reason="dp-accounting is not installed (pip install 'pyml[privacy]')")

# Opacus' hooks see inputs that need no gradient: torch warns of it.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing", "ignore:grad and param do not obey")
RECORDS, NUMBERS = 24, [0.5, 2.0, 1.0, 0.25, 3.0, 1.5]


def network(dtype=torch.float32):
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 3)
    return nn.Sequential(*layers).to(dtype)


def records(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(RECORDS, 1, 4, 4, generator=generator).to(dtype), torch.arange(RECORDS) % 3)


def private(grads="ghost", model=None, inner=torch.optim.SGD, **named):
    model = network() if model is None else model
    options = {"noise_multiplier": 0.8, "clip": 0.4, "seed": 4} | named
    loader = DataLoader(records(next(model.parameters()).dtype), batch_size=6, shuffle=True)
    return make_private(model, inner(model.parameters(), lr=0.2), loader, grad_sample_mode=grads, **options)


def losses(model, x, y, reduction="none"):
    return nn.functional.cross_entropy(model(x), y, reduction=reduction)


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


SCALES = {"none": {}, "numbers": {"scale": NUMBERS, "provenance": "public"},
          "dropped": {"scale": [0.5, 2.0, 0.0, 0.25, 3.0, torch.tensor(1.5)], "provenance": "public"},
          "l2": {"scale": NUMBERS, "provenance": "public", "mode": "l2"}, "sum": {"loss_reduction": "sum"}}  # fmt: skip


@pytest.mark.parametrize("inner", [torch.optim.SGD, torch.optim.Adagrad])
@pytest.mark.parametrize("kind", SCALES)
def test_a_step_is_that_of_gradients_of_samples(kind, inner):
    """Empty batches too; both have the same batches and the same noise."""
    found, reduction = {}, SCALES[kind].get("loss_reduction", "mean")
    for mode in ("ghost", "hooks"):
        model, optimizer, loader = private(mode, inner=inner, **SCALES[kind])
        assert isinstance(optimizer, GhostNoiseOptimizer) == (mode == "ghost")
        seen = []
        for x, y in (*loader, (torch.zeros(0, 1, 4, 4), torch.zeros(0, dtype=torch.long))):
            seen.append(y.tolist())
            optimizer.zero_grad()
            if mode == "ghost":
                optimizer.backward(losses(model, x, y))
                assert all(p.grad is None and p.grad_sample is None for p in optimizer.params)
                assert all(p._norm_sample is None for p in optimizer.params)
            else:
                losses(model, x, y, reduction).backward()
            optimizer.step()
        found[mode] = seen, weights(model), optimizer.steps, optimizer.history.phases
    assert found["ghost"][0] == found["hooks"][0] and found["ghost"][2:] == found["hooks"][2:]
    for a, b in zip(found["ghost"][1], found["hooks"][1]):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


@pytest.mark.parametrize("sequence", [False, True])
def test_the_sum_is_that_of_gradients_cut_to_the_clip_norm(sequence):
    """In float64, against autograd on one record after the other."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x = torch.randn(5, *([7] if sequence else []), 4, dtype=torch.float64)
    scale, clip = [0.5, 2.0, 1.0, 0.25], 0.3

    def loss(net, batch):
        return net(batch).square().flatten(1).sum(1)

    params, expected, norms = list(model.parameters()), 0, []
    for n in range(5):
        g = torch.autograd.grad(loss(model, x[n : n + 1]).sum(), params)
        norms.append(math.sqrt(sum(float((part / s).square().sum()) for part, s in zip(g, scale))))
        expected = [min(1, clip / norms[-1]) * part + before for part, before in zip(g, expected or [0] * 4)]
    assert min(norms) > clip
    made, optimizer, _ = make_private(
        model, torch.optim.Adam(params), DataLoader(TensorDataset(x), batch_size=5), clip=clip, noise_multiplier=0.0,
        scale=scale, provenance="public", grad_sample_mode="ghost", seed=1, loss_reduction="sum",
    )  # fmt: skip
    optimizer.backward(loss(made, x))
    optimizer.step()
    for p, t in zip(params, expected):
        torch.testing.assert_close(p.grad, t, rtol=1e-9, atol=1e-12)


def test_virtual_steps_are_one_batch():
    x, y = records()[:6]
    whole, parts = (private()[:2] for _ in range(2))
    whole[1].backward(losses(whole[0], x, y))
    whole[1].step()
    for part, last in ((slice(0, 2), False), (slice(2, 6), True)):
        parts[1].backward(losses(parts[0], x[part], y[part]))
        parts[1].step() if last else parts[1].virtual_step()
    assert parts[1].steps == whole[1].steps == 1
    for a, b in zip(weights(whole[0]), weights(parts[0])):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_secure_noise_on_float_sums_is_hardened():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 100), nn.Tanh(), nn.Linear(100, 1))
    data = DataLoader(TensorDataset(torch.randn(20, 200)), batch_size=10)
    scale = [0.5, 2.0, 1.0, 0.0]
    made, optimizer, loader = make_private(
        model, torch.optim.Adam(model.parameters()), data, clip=0.3, noise_multiplier=50.0, scale=scale,
        provenance="public", grad_sample_mode="ghost", secure=True,
    )  # fmt: skip
    assert optimizer.history.noise == "hardened" and loader.batch_sampler.key is None
    (x,) = data.dataset[:10]
    seen = []
    for _ in range(2):
        optimizer.backward(made(x).squeeze(1))
        optimizer.step()
        seen.append(model[0].weight.grad.clone())
    assert not torch.equal(*seen)
    assert model[0].weight.grad.std() == pytest.approx(50 * 0.3 * 0.5 / 10, rel=0.03)
    assert model[0].bias.grad.std() == pytest.approx(50 * 0.3 * 2.0 / 10, rel=0.3)
    assert not model[2].bias.grad.any(), "a parameter of scale 0 takes no part"
    found = optimizer.epsilon(1e-5)
    assert found.noise == "hardened" and "a mitigation and no proof" in str(found)
    again = History(provenance="public", noise="fast")
    again.record(50.0, 0.5, 2)
    assert float(found) == float(again.epsilon(1e-5)), "the label differs, the number does not"
    optimizer.empty_step()
    assert optimizer.steps == 3 and optimizer.history.steps == 3


def test_a_run_goes_on_where_it_was_saved():
    x, y = records()[:6]
    model, optimizer, _ = private()
    optimizer.backward(losses(model, x, y))
    optimizer.step()
    state, at = optimizer.state_dict(), weights(model)
    other, resumed, _ = private(seed=5)
    resumed.load_state_dict(state)
    other.load_state_dict(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(at, weights(other)))
    for net, steps in ((model, optimizer), (other, resumed)):
        steps.backward(losses(net, x, y))
        steps.step()
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(other)))


def test_what_ghost_clipping_cannot_do_is_refused():
    ones = [torch.ones(p.shape) for p in network().parameters()]
    hooked = private("hooks")[0]
    for build, sentence in (
        (lambda: private(scale=ones, provenance="public"), r"scale\[0\]: expected one number for the parameter"),
        (lambda: private(clip=[0.1, 0.2], groups=[0, 0, 0, 1, 1, 1]), "clip: expected one clip norm"),
        (lambda: private(global_clip=0.3), "clip: expected one clip norm .*, got clip 0.4, .*, global_clip 0.3"),
        (lambda: private(model=network(torch.bfloat16)), "optimizer: expected parameters in float32 or float64"),
        (lambda: private(model=hooked), "bare module, or Opacus' GradSampleModuleFastGradientClipping"),
    ):
        with pytest.raises(ValueError, match=sentence):
            build()
    x, y = records()[:6]
    for bad in (lambda t: t.mean(), lambda t: 1.0, lambda t: t.detach()):
        model, optimizer, _ = private()
        with pytest.raises(ValueError, match=r"losses: expected \[B\], one a record, with a gradient"):
            optimizer.backward(bad(losses(model, x, y)))
        with pytest.raises(ValueError, match=r"step: expected backward\(losses\) before it, got none"):
            optimizer.step()
        assert optimizer.steps == 0 and all(p.grad is None for p in model.parameters())


def broken(x):
    bad = x.clone()
    bad[2, 0, 0, 0] = math.nan
    return bad


X, Y = records()[:6]
FINITE, THROUGH = "records with finite gradients", "one a record, through every parameter"


@pytest.mark.parametrize(
    ("loss", "sentence"),
    [
        (lambda model: losses(model, broken(X), Y), FINITE),
        (lambda model: 1e30 * losses(model, X, Y), FINITE),
        (lambda model: losses(model, X, Y)[:4], THROUGH),
        (lambda model: model._module[3](torch.zeros(6, 12)).sum(1), THROUGH),
    ],
)
def test_a_pass_that_failed_leaves_nothing(loss, sentence):
    model, optimizer, _ = private()
    with pytest.raises(ValueError, match=f"^GhostNoiseOptimizer: losses: expected {sentence}"):
        optimizer.backward(loss(model))
    assert all(p.grad is None and p._norm_sample is None for p in model.parameters())
    with pytest.raises(ValueError, match="step: expected backward"):
        optimizer.step()
    assert optimizer.steps == 0


def test_a_pass_is_used_once():
    model, optimizer, _ = private()
    optimizer.backward(losses(model, X, Y))
    with pytest.raises(ValueError, match="backward: expected a step, or a virtual one, after each backward pass"):
        optimizer.backward(losses(model, X, Y))
    for forget in (optimizer.discard, optimizer.zero_grad):
        forget()
        with pytest.raises(ValueError, match="step: expected backward"):
            optimizer.step()
    model = network()
    alone = GhostNoiseOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), noise_multiplier=1.0, clip=1.0,
                                sample_rate=0.1, expected_batch_size=4)  # fmt: skip
    with pytest.raises(ValueError, match="module: expected Opacus' GradSampleModuleFastGradientClipping"):
        alone.backward(losses(model, X, Y))


def test_the_ghost_steps_of_the_benchmark_are_the_same_work(monkeypatch):
    from pyml.benchmarks.cases import dp_step
    from pyml.benchmarks.registry import Setup

    monkeypatch.setattr(dp_step, "NOISE", 0.0)
    monkeypatch.setattr(dp_step, "RATE", 1.0)
    made = dp_step.ghost_setup(dp_step._digits, (64, 1, dp_step.SIDE, dp_step.SIDE), Setup())
    losses = {}
    for name, contender in made.items():
        call = contender.build(dp_step.STEP)
        losses[name] = torch.stack([call() for _ in range(4)])
    assert losses["pyml"][-1] < losses["pyml"][0] - 0.05
    torch.testing.assert_close(losses["pyml"], losses[dp_step.OPACUS], rtol=0, atol=2e-6)
    assert losses[dp_step.BARE][0] == losses["pyml"][0] and losses[dp_step.BARE][-1] != losses["pyml"][-1]
    assert sum(p.numel() for p in dp_step._mlp().parameters()) == dp_step.MLP_SIZE
