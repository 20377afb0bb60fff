"""Scales: values, the predicted gain against a search, refusals."""

import math

import pytest
import torch

from pyml.privacy import Scale, dp, from_parameters, from_public_gradients, noise_power_gain, uniform


def gradients(*shapes, samples=64):
    spread = [10 ** (2 * torch.rand(shape) - 1) for shape in shapes]
    return [torch.randn(samples, *s.shape) * s for s in spread]


def flat(tensors):
    return torch.cat([t.double().flatten() for t in tensors])


def test_uniform_is_isotropic():
    scale = uniform([torch.randn(3, 2), torch.randn(4)])
    assert [t.tolist() for t in scale.tensors] == [[[1.0, 1.0]] * 3, [1.0] * 4]
    assert scale.gain == 1 and scale.provenance[0].kind == "public"


def test_public_gradients_give_the_root_of_their_rms():
    given = gradients((3, 2), (5,), ())
    scale = from_public_gradients(given, floor=0.0)
    rms = flat([g.double().square().mean(0).sqrt() for g in given])
    s = flat(scale.tensors)
    assert [t.shape for t in scale.tensors] == [(3, 2), (5,), ()] and scale.tensors[0].dtype == torch.float32
    torch.testing.assert_close(s**2 / rms, (s**2 / rms)[0].expand_as(s), rtol=1e-6, atol=0)
    assert s.square().mean().item() == pytest.approx(1, rel=1e-6)
    assert scale.gain == pytest.approx((rms.square().mean() / rms.mean() ** 2).item(), rel=1e-9)
    assert f"gain {scale.gain:.3g}" in str(scale) and "public" in str(scale)


def test_the_floor_keeps_an_element_that_no_sample_moves():
    still = torch.ones(4, 3)
    still[:, 1] = 0
    (s,) = from_public_gradients([still]).tensors
    rms = torch.tensor([1.0, 1e-2 * 2 / 3, 1.0])
    torch.testing.assert_close(s / s[0], rms.sqrt(), rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="from_public_gradients: per_sample: expected a floor above 0"):
        from_public_gradients([still], floor=0)


@pytest.mark.parametrize("seed", range(4))
def test_no_scale_gains_more_than_the_root_of_the_rms(seed):
    torch.manual_seed(seed)
    rms = [torch.rand(4, 2) + 0.05, torch.rand(3)]
    best = noise_power_gain(rms)
    root = [r.sqrt() for r in rms]
    assert noise_power_gain(rms, root) == pytest.approx(best, rel=1e-6)
    for _ in range(200):
        other = [s * torch.exp(0.3 * torch.randn(s.shape)) for s in root]
        assert noise_power_gain(rms, other) <= best * (1 + 1e-9)
    assert noise_power_gain(rms, [torch.ones(4, 2), torch.ones(3)]) == pytest.approx(1)
    assert noise_power_gain([torch.ones(5)]) == 1


def test_the_gain_is_what_it_says_on_gradients():
    """Scaled so that the mean squared whitened norm is the same, the noise power falls by the predicted factor."""
    (g,) = gradients((50,), samples=4000)
    scale = from_public_gradients([g], floor=0.0)
    s = scale.tensors[0].double()
    g = g.double()
    power = s.square().sum() * (g / s).square().sum(1).mean() / (len(s) * g.square().sum(1).mean())
    assert scale.gain == pytest.approx(1 / power.item(), rel=1e-6)
    assert scale.gain > 1.3


def test_larger_weights_get_less_noise():
    weights = [torch.tensor([[0.0, -2.0], [1.0, 0.5]]), torch.tensor([-0.1])]
    scale = from_parameters(weights, provenance="released_iterate")
    w, s = flat(weights).abs(), flat(scale.tensors)
    assert torch.equal(w.argsort(), s.argsort(descending=True)) and s.square().mean().item() == pytest.approx(
        1, rel=1e-6
    )
    ratio = (w / w.mean() + 0.1) ** -0.5
    torch.testing.assert_close(s / s[0], ratio / ratio[0], rtol=1e-5, atol=0)
    assert scale.gain is None and "not predicted" in str(scale) and "released_iterate" in str(scale)
    assert from_parameters(weights, provenance="public", power=0).tensors[0].unique().tolist() == [1.0]


def test_a_guide_carries_its_provenance_and_can_be_worse_than_none():
    weights = [torch.tensor([1.0, 10.0])]
    scale = from_parameters(weights, provenance=dp(1.0, 1e-6), rms=[torch.tensor([1.0, 10.0])])
    assert scale.provenance == (dp(1.0, 1e-6),)
    assert scale.gain < 1, "the larger weight has the larger gradient here"
    helpful = from_parameters(weights, provenance="public", rms=[torch.tensor([10.0, 1.0])])
    assert helpful.gain > 1


def test_permuted_keeps_the_values_and_loses_their_places():
    scale = from_public_gradients(gradients((40, 3), (7,)))
    mixed = scale.permuted(torch.Generator().manual_seed(1))
    assert isinstance(mixed, Scale) and [t.shape for t in mixed.tensors] == [(40, 3), (7,)]
    assert torch.equal(flat(mixed.tensors).sort().values, flat(scale.tensors).sort().values)
    assert not torch.equal(flat(mixed.tensors), flat(scale.tensors))
    assert mixed.gain is None and "permuted" in str(mixed) and mixed.provenance == scale.provenance


BAD = torch.tensor([1.0, math.nan])


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: uniform([]), "uniform: tensors: expected at least one element, got none"),
        (lambda: uniform(torch.ones(2)), "uniform: tensors: expected a list of tensors, got a tensor"),
        (lambda: uniform([1.0]), "uniform: tensors: expected a tensor, got float"),
        (lambda: from_public_gradients([torch.ones(2, 2), torch.ones(3, 2)]),
         r"from_public_gradients: per_sample: expected the same number of samples in each tensor, got \[2, 3\]"),
        (lambda: from_public_gradients([torch.tensor(1.0)]), "from_public_gradients: per_sample: expected tensors"),
        (lambda: from_public_gradients([torch.zeros(2, 2)]), "per_sample: expected gradients of which some are not 0"),
        (lambda: from_public_gradients([BAD[None]]), "per_sample: expected finite entries, got a NaN or an infinity"),
        (lambda: from_public_gradients([torch.ones(2, 2)], floor=-1), "floor: expected a finite number >= 0, got -1"),
        (lambda: from_public_gradients([torch.ones(2, 2).long()]), "per_sample: expected float32"),
        (lambda: from_parameters([torch.zeros(3)], provenance="public"), "parameters: expected weights of which some"),
        (lambda: from_parameters([BAD], provenance="public"), "from_parameters: parameters: expected finite entries"),
        (lambda: from_parameters([torch.ones(3)], provenance="mine"), "from_parameters: provenance: expected one of"),
        (lambda: from_parameters([torch.ones(3)], provenance="public", floor=0), "floor: expected a finite number"),
        (lambda: noise_power_gain([-torch.ones(2)]), "noise_power_gain: rms: expected entries >= 0, got -1"),
        (lambda: noise_power_gain([torch.zeros(2)]), "rms: expected entries of which some are not 0"),
        (lambda: noise_power_gain([torch.ones(2)], [torch.ones(3)]), "scale: expected as many entries as rms, 2, got"),
        (lambda: noise_power_gain([torch.ones(2)], [-torch.ones(2)]), "scale: expected entries >= 0, some above, got"),
    ],
)  # fmt: skip
def test_refusals_are_one_sentence(call, sentence):
    with pytest.raises((ValueError, TypeError), match=sentence):
        call()
