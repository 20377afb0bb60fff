"""HeteroNoiseOptimizer: what is left to the wrapped optimizer, a bound over groups, what a loaded history owes."""

import warnings

import pytest
import torch

from pyml.ops import clip_sum
from pyml.privacy import dp, effective_multiplier
from tests.test_hetero_noise_optimizer import by_hand, give, gradients, made, parameters


@pytest.mark.parametrize("options", [{"momentum": 0.9}, {"weight_decay": 0.1}, {"maximize": True}])
def test_other_sgd_is_that_of_torch(options):
    params, twins = parameters(), parameters()
    optimizer = made(params, torch.optim.SGD(params, lr=0.3, **options))
    inner = torch.optim.SGD(twins, lr=0.3, **options)
    for step in range(2):
        give(params, gradients(params, seed=step))
        optimizer.step()
        for p, t in zip(twins, by_hand(twins, gradients(twins, seed=step), "whitened", None, step=step)):
            p.grad = t / 8
        inner.step()
        assert all(torch.allclose(a, b, atol=2e-6) for a, b in zip(params, twins))


def test_hooks_see_noisy_gradients():
    params, seen = parameters(), []
    optimizer = made(params)
    optimizer.register_step_pre_hook(lambda *_: seen.append([p.grad.clone() for p in params]))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    give(params, gradients(params))
    optimizer.step()
    expected = by_hand(params, gradients(params), "whitened", None)
    assert len(seen) == 2 and seen[1] == "after"
    assert all(torch.allclose(g, t / 8, atol=1e-6) for g, t in zip(seen[0], expected))


def test_a_schedule_of_the_inner_optimizer_does_not_warn():
    params = parameters()
    optimizer = made(params)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer.optimizer, 1)
    optimizer.empty_step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedule.step()


def test_a_closure_is_called_once_before_the_step():
    params = parameters()
    optimizer = made(params)

    def closure():
        assert torch.is_grad_enabled()
        give(params, gradients(params))
        return 4.0

    assert optimizer.step(closure) == 4.0 and optimizer.steps == 1


def test_a_bound_over_all_groups():
    params = parameters()
    optimizer = made(
        params, torch.optim.Adam(params), mode="group", global_clip=0.6, scale=[1.0, 2.0, 3.0, 3.0], provenance="public"
    )
    grads = gradients(params)
    give(params, grads)
    optimizer.step()
    assert optimizer.std == pytest.approx(0.7 / effective_multiplier(1.0, [0.5, 0.8], "group", [1.0, 3.0], 0.6))
    optimizer = made(params, torch.optim.Adam(params), mode="group", global_clip=0.6, noise_multiplier=0.0)
    give(params, grads)
    optimizer.step()
    expected = clip_sum(grads, [0.5, 0.8], groups=[0, 0, 1, 1], global_clip=0.6)[0]
    assert all(torch.equal(p.grad, t / 8) for p, t in zip(params, expected))
    one = [g[:1] for g in grads]
    give(params, one)
    optimizer.step()
    assert sum(float((8 * p.grad).square().sum()) for p in params) ** 0.5 == pytest.approx(0.6, rel=1e-5)


def test_groups_may_be_whitened():
    params = parameters()
    scale = [torch.rand(p.shape) + 0.2 for p in params]
    named = {"clip": [0.5, 0.8], "groups": [0, 0, 1, 1], "scale": scale, "provenance": "public", "global_clip": 0.7}
    assert made(params, **named).std == pytest.approx(0.7 * 0.7), "noise multiplier times the bound over all groups"
    assert made(params, **(named | {"global_clip": None})).std == pytest.approx(0.7 * (0.5**2 + 0.8**2) ** 0.5)
    optimizer = made(params, torch.optim.Adam(params), noise_multiplier=0.0, **named)
    give(params, gradients(params))
    optimizer.step()
    expected = clip_sum(gradients(params), [0.5, 0.8], scale=scale, groups=[0, 0, 1, 1], global_clip=0.7)[0]
    assert all(torch.equal(p.grad, t / 8) for p, t in zip(params, expected))
    one = [g[:1] for g in gradients(params)]
    give(params, one)
    optimizer.step()
    white = sum(float((8 * p.grad / s).square().sum()) for p, s in zip(params, scale)) ** 0.5
    assert white == pytest.approx(0.7, rel=1e-5), "a record far outside has exactly the norm that the noise is for"
    alone = made(params, global_clip=0.3, clip=0.5)
    assert alone.std == pytest.approx(0.7 * 0.3), "a bound on all of a whole is the lesser of the two"
    secure = 'secure: expected mode "whitened" in one process, with one clip norm'
    for wrong in ({"global_clip": 1.0}, {"clip": [0.5, 0.8], "groups": [0, 0, 1, 1]}):
        with pytest.raises(ValueError, match=secure):
            made(params, secure=True, **wrong)


def test_a_number_may_be_one_of_the_records():
    params = parameters()
    for free in (None, 1, 1.0):
        assert made(params, scale=free).history.provenance[0].kind == "public"
    with pytest.raises(ValueError, match="provenance: expected where the scale comes from"):
        made(params, scale=0.3)
    assert made(params, scale=0.3, provenance="unknown").epsilon(1e-5) == float("inf")


def test_a_report_says_how_uneven_a_scale_is():
    params = parameters()
    scale = [0.5, torch.ones(()), (torch.ones(2), torch.full((5,), 3.0)), 1.0]
    scale = [s if i != 2 else 3.0 for i, s in enumerate(scale)]
    text = made(params, scale=scale, provenance="public").history.facts["scale"]
    sizes = [p.numel() for p in params]
    rms = (sum(n * s * s for n, s in zip(sizes, (0.5, 1.0, 3.0, 1.0))) / sum(sizes)) ** 0.5
    assert text == f"given: min 0.5, max 3, RMS {rms:.3g}"
    pairs = [(torch.tensor([1.0, 2.0] * 9)[: p.shape[0]], torch.tensor([3.0])) if p.dim() == 1 else 3.0 for p in params]
    assert "max 6" in made(params, scale=pairs, provenance="public").history.facts["scale"]
    assert made(params).history.facts["scale"] == "1 everywhere"


def test_a_loaded_history_owes_for_this_scale_and_these_batches():
    params = parameters()
    first = made(params)
    first.empty_step()
    paid = made(parameters(), scale=[torch.ones(p.shape) for p in params], provenance=dp(0.5, 1e-6))
    paid.load_state_dict(first.state_dict())
    assert [p.kind for p in paid.history.provenance] == ["public", "dp"]
    again = made(parameters(), scale=[torch.ones(p.shape) for p in params], provenance=dp(0.5, 1e-6))
    again.load_state_dict(paid.state_dict())
    assert [p.kind for p in again.history.provenance] == ["public", "dp"], "the same scale is paid for once"
    shuffled = made(parameters(), sampling="shuffled")
    shuffled.load_state_dict(first.state_dict())
    assert shuffled.history.sampling == "shuffled" and shuffled.history.steps == 1
