"""HeteroNoiseOptimizer: one step is what it says, parts of a batch are the batch, a resumed run is the run."""

import copy

import pytest
import torch
from torch import nn

from pyml.ops import clip_sum, hetero_noise_
from pyml.optim import HeteroNoiseOptimizer
from pyml.privacy import Scale, dp, effective_multiplier, from_public_gradients, uniform

SEED = 11
KEY = torch.tensor([SEED])


def parameters(dtype=torch.float32):
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((5, 3), (5,), (2, 5), ())]


def gradients(params, samples=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn((samples, *p.shape), generator=generator).to(p.dtype) for p in params]


def give(params, grads):
    for p, g in zip(params, grads):
        p.grad_sample, p.grad = g.clone(), torch.full_like(p, 1e9)  # what autograd leaves there is never used


def made(params, inner=None, **named):
    options = {"noise_multiplier": 0.7, "clip": 0.9, "sample_rate": 0.1, "expected_batch_size": 8.0, "seed": SEED}
    if named.get("mode") == "group":
        options |= {"clip": [0.5, 0.8], "groups": [0, 0, 1, 1]}
    if "secure" in named:
        del options["seed"]
    return HeteroNoiseOptimizer(inner or torch.optim.SGD(params, lr=0.3), **(options | named))


def scales(params, kind):
    torch.manual_seed(3)
    if kind == "none":
        return {}
    if kind == "element":
        return {"scale": [torch.rand(p.shape) + 0.2 for p in params], "provenance": "public"}
    rows, columns = torch.rand(5) + 0.2, torch.rand(3) + 0.2
    return {"scale": [(rows, columns), 0.5, [torch.ones(2), torch.rand(5) + 0.2], torch.tensor(2.0)],
            "provenance": "released_iterate"}  # fmt: skip


def full(params, scale):
    if scale is None:
        return [torch.ones(p.shape) for p in params]
    return [torch.outer(*s).reshape(p.shape) if isinstance(s, tuple | list) else torch.as_tensor(s).expand(p.shape)
            for s, p in zip(scale, params)]  # fmt: skip


def by_hand(params, grads, mode, scale, sigma=0.7, step=0):
    """The noisy sums, in the plain words of the definition."""
    s = full(params, scale)
    white = [g / t for g, t in zip(grads, s)] if mode == "whitened" else grads
    squares = torch.stack([w.reshape(len(w), -1).square().sum(1) for w in white])
    if mode == "group":
        clips, norms = [0.5, 0.8], [squares[:2].sum(0).sqrt(), squares[2:].sum(0).sqrt()]
        factors = [(clips[k] / norms[k]).clamp(max=1) for k in (0, 0, 1, 1)]
        least = [min(float(t.min()) for t in s[:2]), min(float(t.min()) for t in s[2:])]
        std = sigma * sum((c / m) ** 2 for c, m in zip(clips, least)) ** 0.5
    else:
        factors = [(0.9 / squares.sum(0).sqrt()).clamp(max=1)] * 4
        std = sigma * 0.9 / (min(float(t.min()) for t in s) if mode == "l2" else 1.0)
    sums = [torch.einsum("b,b...->...", f, g) for f, g in zip(factors, grads)]
    noise = [torch.zeros(p.shape) for p in params]
    hetero_noise_(noise, 1.0, 1.0, key=KEY, step=step)
    return [t + std * m * z for t, m, z in zip(sums, s, noise)]


@pytest.mark.parametrize("kind", ["none", "element", "factors"])
@pytest.mark.parametrize("mode", ["whitened", "l2", "group"])
def test_a_step_is_clip_sum_noise_divide(mode, kind):
    params = parameters()
    given, grads = scales(params, kind), gradients(params)
    before = [p.detach().clone() for p in params]
    optimizer = made(params, mode=mode, **given)
    give(params, grads)
    optimizer.step()
    for p, b, t in zip(params, before, by_hand(params, grads, mode, given.get("scale"))):
        assert torch.allclose(p, b - 0.3 * t / 8, atol=2e-6)
        assert p.grad is None and p.grad_sample is None, "nobody sees a sum without noise"
    assert optimizer.history.phases == ((0.7, 0.1, 1),), "every mode has the same multiplier"
    multiplier = effective_multiplier(optimizer.std, 0.9, mode, given.get("scale")) if mode != "group" else 0.7
    assert multiplier == pytest.approx(0.7, rel=1e-6)


@pytest.mark.parametrize("kind", ["none", "factors"])
def test_every_optimizer_sees_the_same_noisy_gradient(kind):
    ways = (
        lambda p: torch.optim.SGD(p, lr=0.3),
        lambda p: torch.optim.SGD(p, lr=0.3, weight_decay=1e-30),  # not the fused way
        lambda p: torch.optim.SGD([{"params": p[:1]}, {"params": p[1:], "lr": 0.3}], lr=0.3),
    )
    found = []
    for way in ways:
        params = parameters()
        optimizer = made(params, way(params), **scales(params, kind))
        for step in range(2):
            give(params, gradients(params, seed=step))
            optimizer.step()
        found.append(params)
    for other in found[1:]:
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found[0], other))
    params = parameters()
    optimizer = made(params, torch.optim.Adam(params, lr=0.1))
    give(params, gradients(params))
    optimizer.step()
    expected = by_hand(params, gradients(params), "whitened", None)
    assert all(torch.allclose(p.grad, t / 8, atol=1e-6) for p, t in zip(params, expected))


def test_low_precision_parameters():
    params = parameters(torch.bfloat16)
    optimizer = made(params, torch.optim.Adam(params))
    grads = gradients(params)
    give(params, grads)
    optimizer.step()
    expected = by_hand(params, [g.float() for g in grads], "whitened", None)
    assert all(p.grad.dtype == p.dtype and torch.allclose(p.grad.float(), t / 8, rtol=2**-7, atol=1e-6)
               for p, t in zip(params, expected))  # fmt: skip


def test_learning_rates_may_be_scheduled():
    params = parameters()
    optimizer = made(params)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for _ in range(2):
        before = [p.detach().clone() for p in params]
        give(params, gradients(params))
        optimizer.step()
        lr = schedule.get_last_lr()[0]
        expected = by_hand(params, gradients(params), "whitened", None, step=optimizer.steps - 1)
        assert all(torch.allclose(p, b - lr * t / 8, atol=2e-6) for p, b, t in zip(params, before, expected))
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.075)


def test_without_noise_it_is_clip_sum():
    params = parameters()
    optimizer = made(params, torch.optim.Adam(params), noise_multiplier=0.0, loss_reduction="sum")
    grads = gradients(params)
    give(params, grads)
    optimizer.step()
    assert all(torch.equal(p.grad, t) for p, t in zip(params, clip_sum(grads, 0.9)[0]))


@pytest.mark.parametrize("signalled", [False, True])
def test_virtual_steps_are_one_batch(signalled):
    ends = []
    for parts in ([7], [3, 0, 4]):
        params = parameters()
        optimizer = made(params, **scales(params, "element"))
        pieces = zip(*(g.split(parts) for g in gradients(params)))
        for n, piece in enumerate(pieces):
            give(params, piece)
            last = n == len(parts) - 1
            optimizer.signal_skip_step(not last) if signalled else None
            optimizer.step() if signalled or last else optimizer.virtual_step()
            optimizer.zero_grad()
        assert optimizer.steps == optimizer.history.steps == 1
        ends.append(params)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*ends))


def test_what_was_not_released_can_be_forgotten():
    params = parameters()
    optimizer = made(params, torch.optim.Adam(params))
    give(params, gradients(params, seed=5))
    optimizer.virtual_step()
    optimizer.signal_skip_step()
    assert optimizer.discard() == 0
    give(params, gradients(params))
    optimizer.step()
    expected = by_hand(params, gradients(params), "whitened", None)
    assert all(torch.allclose(p.grad, t / 8, atol=1e-6) for p, t in zip(params, expected))


def test_an_empty_batch_gets_noise_and_counts():
    for way in ("empty_step", "step"):
        params = parameters()
        optimizer = made(params, torch.optim.Adam(params))
        give(params, [g[:0] for g in gradients(params)])
        getattr(optimizer, way)()
        noise = [torch.zeros(p.shape) for p in params]
        hetero_noise_(noise, 1.0, 0.7 * 0.9, key=KEY, step=0)
        assert all(torch.allclose(p.grad, z / 8, atol=1e-7) for p, z in zip(params, noise))
        assert optimizer.steps == optimizer.history.steps == 1


def test_bad_samples_are_counted_and_take_no_part():
    params = parameters()
    optimizer = made(params, torch.optim.Adam(params), noise_multiplier=0.0)
    grads = gradients(params)
    grads[2][1, 0, 0], grads[1][4, 0] = torch.nan, torch.inf
    give(params, grads)
    optimizer.step()
    good = [g[[0, 2, 3, 5, 6]] for g in grads]
    assert optimizer.bad == 2
    assert all(torch.allclose(p.grad, t / 8, atol=1e-6) for p, t in zip(params, clip_sum(good, 0.9)[0]))


def test_secure_noise():
    pytest.importorskip("cryptography", reason="cryptography is not installed (pip install 'pyml[privacy]')")
    params = parameters()
    optimizer = made(params, torch.optim.Adam(params), secure=True, noise_multiplier=2.0, **scales(params, "factors"))
    whole = gradients(params)
    for part in zip(*(g.split([4, 3]) for g in whole)):
        give(params, part)
        optimizer.virtual_step() if len(part[0]) == 4 else optimizer.step()
    (phase,) = optimizer.history.phases
    assert 1.999 < phase[0] <= 2.0 and phase[1:] == (0.1, 1)
    assert optimizer.history.total_variation > 0 and optimizer.history.noise == "secure"
    expected = clip_sum(whole, 0.9, scale=full(params, scales(params, "factors")["scale"]))[0]
    for p, t, s in zip(params, expected, full(params, scales(params, "factors")["scale"])):
        assert ((p.grad * 8 - t) / (2.0 * 0.9 * s)).abs().max() < 6, "noise of the std that was asked for"
        assert not torch.allclose(p.grad * 8, t, atol=1e-4)


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", [torch.optim.SGD, torch.optim.Adam])
def test_a_resumed_run_is_the_run(inner, tmp_path):
    params = parameters()
    optimizer = made(params, inner(params, lr=0.1), **scales(params, "element"))
    for step in range(6):
        if step == 3:
            saved = {"params": [p.detach().clone() for p in params], "optimizer": optimizer.state_dict()}
            torch.save(saved, tmp_path / "run.pt")
        give(params, gradients(params, seed=step))
        optimizer.step()
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    twins = [nn.Parameter(p) for p in saved["params"]]
    other = made(twins, inner(twins, lr=0.1), **scales(twins, "element"))
    other.load_state_dict(saved["optimizer"])
    assert other.steps == 3 and other.history.steps == 3
    for step in range(3, 6):
        give(twins, gradients(twins, seed=step))
        other.step()
    assert all(torch.equal(a, b) for a, b in zip(params, twins))
    assert other.history.state_dict() == optimizer.history.state_dict()


def test_no_noise_comes_twice():
    params = parameters()
    optimizer = made(params, seed=None)
    early = copy.deepcopy(optimizer.state_dict())
    optimizer.empty_step()
    late = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="step of the state: expected at least 1, as earlier noise"):
        optimizer.load_state_dict(early)
    optimizer.load_state_dict(late)
    stranger = made(params, seed=None)
    stranger.empty_step()
    with pytest.raises(ValueError, match="key of the state: expected that of this run"):
        stranger.load_state_dict(late)
    fresh = made(params, seed=None, resume="repeat")
    fresh.load_state_dict(late)
    key = fresh.state_dict()["privacy"]["key"]
    assert torch.equal(key, late["privacy"]["key"])
    fresh.renew_key()
    assert not torch.equal(fresh.state_dict()["privacy"]["key"], key) and fresh.steps == 1


def test_a_broken_state_changes_nothing():
    params = parameters()
    optimizer = made(params)
    good = optimizer.state_dict()
    for change, sentence in (
        ({"format": 9}, "state: expected one of state_dict"),
        ({"key": 4}, r"key of the state: expected torch.int64 of shape \[1\], got int"),
        ({"batches": torch.zeros(32)}, r"batches of the state: expected torch.uint8 of shape \[32\]"),
        ({"step": -1}, "step of the state: expected an integer >= 0"),
        ({"step": 2}, "history of the state: expected at least 2 steps"),
        ({"noise": "fast"}, "noise of the state: expected 'seeded'"),
        ({"history": {}}, "state: expected the entries of state_dict"),
    ):
        with pytest.raises(ValueError, match=sentence):
            optimizer.load_state_dict({**good, "privacy": {**good["privacy"], **change}})
    with pytest.raises(ValueError, match="state: expected one of state_dict"):
        optimizer.load_state_dict(optimizer.optimizer.state_dict())
    assert optimizer.steps == 0 and optimizer.history.steps == 0


# --- what is said about it --------------------------------------------------------------------------------------------


def test_labels_and_provenance():
    pytest.importorskip("dp_accounting", reason="dp-accounting is not installed (pip install 'pyml[privacy]')")
    params = parameters()
    for seed, label in ((SEED, "reproducible, not private"), (None, "proven for real numbers")):
        optimizer = made(params, seed=seed)
        optimizer.empty_step()
        bound = optimizer.epsilon(1e-5)
        assert 0 < bound < 20 and label in str(bound)
    given = [torch.ones(p.shape) for p in params]
    unknown = made(params, scale=given, provenance="unknown")
    unknown.empty_step()
    assert unknown.epsilon(1e-5) == torch.inf and "unknown" in str(unknown.epsilon(1e-5))
    shuffled = made(params, sampling="shuffled")
    shuffled.empty_step()
    assert shuffled.epsilon(1e-5) == torch.inf


def test_another_scale_has_its_price_and_no_other_multiplier():
    params = parameters()
    optimizer = made(params, mode="l2", scale=from_public_gradients(gradients(params)))
    optimizer.empty_step()
    optimizer.set_scale([torch.rand(p.shape) + 0.1 for p in params], dp(0.5, 1e-6))
    optimizer.empty_step()
    assert optimizer.history.phases == ((0.7, 0.1, 2),)
    assert [p.kind for p in optimizer.history.provenance] == ["public", "dp"]
    smallest = min(float(t.min()) for t in optimizer._scales.forms)
    assert optimizer.std * smallest / 0.9 == pytest.approx(0.7, rel=1e-6)
    again = made(parameters(), mode="l2", scale=uniform(params))
    again.load_state_dict(optimizer.state_dict())
    assert [p.kind for p in again.history.provenance] == ["public", "dp"]


def test_refusals():
    params = parameters()
    sgd = torch.optim.SGD(params, lr=0.1)
    ones = [torch.ones(p.shape) for p in params]
    zero = [torch.zeros(p.shape) for p in params]
    for named, sentence in (
        ({"inner": torch.optim.LBFGS(params)}, "optimizer: expected a torch optimizer"),
        ({"inner": made(params)}, "optimizer: expected a torch optimizer that is not private yet"),
        ({"inner": torch.optim.SGD([torch.zeros(3)], lr=1.0)}, "optimizer: expected at least one parameter"),
        ({"mode": "ghost"}, "mode: expected one of whitened, l2, group"),
        ({"clip": 0.0}, "clip: expected a finite number above 0"),
        ({"noise_multiplier": -1.0}, "noise_multiplier: expected a finite number >= 0"),
        ({"sample_rate": 1.5}, "sample_rate: expected a number from 0 to 1"),
        ({"expected_batch_size": 0}, "expected_batch_size: expected a finite number above 0"),
        ({"scale": ones}, "provenance: expected where the scale comes from"),
        ({"scale": uniform(params), "provenance": "public"}, "provenance: expected none beside a Scale"),
        ({"scale": ones[:2], "provenance": "public"}, "scale: expected a number, a pyml.privacy.Scale or a list of 4"),
        ({"scale": ones[::-1], "provenance": "public"}, r"scale\[1\]: expected no dimensions, or shape \[5\]"),
        ({"scale": [-t for t in ones], "provenance": "public"}, "scale: expected finite entries >= 0"),
        ({"scale": zero, "provenance": "public", "mode": "l2"}, "scale: expected entries above 0"),
        ({"clip": [1.0]}, "groups: expected the group of each parameter beside a list of clip norms, else none"),
        ({"clip": [1.0], "mode": "l2"}, 'clip: expected one clip norm, for mode "l2"'),
        ({"clip": "1"}, "clip: expected a number, or one for each group"),
        ({"global_clip": 0.5, "mode": "l2"}, 'global_clip: expected none, for mode "l2"'),
        ({"groups": [0, 0, 0, 0]}, "groups: expected the group of each parameter"),
        ({"mode": "group", "clip": 1.0}, "clip: expected a list of one clip norm a group"),
        ({"mode": "group", "groups": [0, 0, 0, 0]}, "groups: expected a parameter in each group"),
        ({"mode": "group", "groups": [0, 0, 1]}, "groups: expected 4 integers"),
        ({"resume": "same"}, "resume: expected one of fresh, repeat"),
        ({"loss_reduction": "none"}, "loss_reduction: expected one of mean, sum"),
        ({"seed": 0.5}, "seed: expected None, or an integer of 64 bits"),
        ({"secure": True, "seed": 3}, "seed: expected none"),
        ({"secure": True, "mode": "l2"}, 'secure: expected mode "whitened" in one process'),
    ):
        with pytest.raises((ValueError, TypeError), match=sentence):
            made(params, **({"inner": sgd} | named))


def test_steps_without_per_sample_gradients_are_refused():
    params = parameters()
    optimizer = made(params)
    for wrong, sentence in (
        (None, "grad_sample of parameter 1: expected per-sample gradients from a backward pass"),
        ([torch.zeros(7, 5)] * 2, "expected one backward pass before step.. or virtual_step.., got 2 of them"),
        (torch.zeros(7, 4), r"grad_sample of parameter 1: expected \[B, \*\[5\]\], got \[7, 4\]"),
    ):
        give(params, gradients(params))
        params[1].grad_sample = wrong
        with pytest.raises(ValueError, match=sentence):
            optimizer.step()
    give(params, gradients(params))
    optimizer.step()
    with pytest.raises(ValueError, match="grad_sample of parameter 0: expected per-sample gradients"):
        optimizer.step()
    with pytest.raises(ValueError, match="add_param_group: expected all parameters"):
        optimizer.add_param_group({"params": []})
    optimizer.signal_skip_step()
    give(params, gradients(params))
    optimizer.step()
    with pytest.raises(ValueError, match="scale: expected the same scale within a batch"):
        optimizer.set_scale(2.0)
    assert optimizer.steps == 1


def test_a_scale_object_is_taken_with_its_provenance():
    params = parameters()
    scale = from_public_gradients(gradients(params, 50))
    assert isinstance(scale, Scale)
    optimizer = made(params, scale=scale)
    assert [p.kind for p in optimizer.history.provenance] == ["public"]
    assert optimizer.history.facts["scale"] == str(scale) and optimizer.std == pytest.approx(0.63)
