"""Steering: the map carries one Gaussian onto the other; controls go on and off, together, in generate()."""

import pytest
import torch

from pyml.heads import HeadSteering, LayerSteering, adapter
from pyml.heads.steering import along, gaussian, transport
from tests.heads_models import ALL, rows, tiny

HEADS = [(0, 1), (2, 0), (2, 3)]
POSITIVE, NEGATIVE = rows((7, 5, 6, 7), seed=3), rows((4, 7, 7, 6), "left", seed=4)


def outputs(model, batch, heads):
    """Outputs of heads at the last real token, as they enter o_proj behind all edits."""
    a = adapter(model)
    found = {}
    handles = [
        a.output(layer).register_forward_pre_hook(lambda m, args, n=layer: found.__setitem__(n, args[0].clone()))
        for layer in {layer for layer, _ in heads}
    ]
    with torch.no_grad():
        batch = a.batch("test", batch)
        a.hidden(batch)
    for handle in handles:
        handle.remove()
    index = torch.arange(len(batch["input_ids"]))
    return {
        (layer, h): found[layer].unflatten(-1, (a.num_heads, a.head_dim))[index, a.last(batch), h] for layer, h in heads
    }


def test_the_map_carries_mean_and_covariance():
    torch.manual_seed(0)
    minus, plus = (torch.randn(500, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64) for _ in range(2))
    (m0, s0), (m1, s1) = gaussian(minus, 0.2), gaussian(plus + 3, 0.2)
    matrix, shift = transport(m0, s0, m1, s1)
    assert torch.allclose(matrix @ m0 + shift, m1, atol=1e-10)
    assert torch.allclose(matrix @ s0 @ matrix.t(), s1, atol=1e-9)
    assert torch.allclose(s0, 0.8 * minus.t().cov() + 0.2 * minus.var(0).mean() * torch.eye(6, dtype=torch.float64))
    same, none = transport(m0, s0, m0, s0)
    assert torch.allclose(same, torch.eye(6, dtype=torch.float64), atol=1e-10) and none.abs().max() < 1e-10


@pytest.mark.parametrize("name", ALL)
def test_outputs_are_moved_by_the_map(name):
    model = tiny(name)
    steering = HeadSteering(model)
    head = (0, 1)  # nothing before it is edited
    steering.add("a", [head], POSITIVE, NEGATIVE)
    plain = outputs(model, NEGATIVE, [head])[head]
    plus = outputs(model, POSITIVE, [head])[head]
    matrix, shift = transport(*gaussian(plain, 0.1), *gaussian(plus, 0.1))
    with steering:
        moved = outputs(model, NEGATIVE, [head])[head]
        steering.on("a", 0.25)
        part = outputs(model, NEGATIVE, [head])[head]
    scale = moved.abs().max()
    assert torch.allclose(moved, plain @ matrix.t() + shift, atol=float(1e-5 * scale))
    assert torch.allclose(moved.mean(0), plus.mean(0), atol=float(1e-5 * scale))
    assert torch.allclose(part, plain + 0.25 * (moved - plain), atol=float(1e-5 * scale))
    assert torch.equal(outputs(model, NEGATIVE, [head])[head], plain)


def test_the_direction_is_the_only_thing_that_moves():
    torch.manual_seed(0)
    minus, plus = (torch.randn(500, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64) for _ in range(2))
    (m0, s0), (m1, s1) = gaussian(minus, 0.2), gaussian(plus + 3, 0.2)
    matrix, shift = along(m0, s0, m1, s1)
    assert torch.allclose(matrix @ m0 + shift, m1, atol=1e-10) and torch.allclose(matrix @ m1 + shift, m1, atol=1e-10)
    d, moved = m1 - m0, minus @ matrix.t() + shift - minus
    assert torch.allclose(moved, torch.outer(moved @ d / (d @ d), d), atol=1e-10)
    w = torch.linalg.solve(s0 + s1, d)
    assert torch.allclose((moved + minus) @ w, (m1 @ w).expand(500), atol=1e-9)  # all end at one coordinate
    flat = torch.zeros(6, 6, dtype=torch.float64)
    for sides, expected in (((m0, flat, m1, flat), d), ((m0, s0, m0, s1), torch.zeros_like(d))):
        matrix, shift = along(*sides)
        assert torch.equal(matrix, torch.eye(6, dtype=torch.float64)) and torch.equal(shift, expected)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "neox"])
def test_what_is_kept_moves_less(name):
    """Kept prompts whose outputs differ in few directions are left alone, where the plain direction moves them."""
    model, head, kept = tiny(name), (0, 1), rows((5, 6, 7), "left", seed=8)
    plain = outputs(model, kept, [head])[head]
    moves = []
    for more in ({}, {"kept": kept}):
        steering = HeadSteering(model)
        steering.add("a", [head], POSITIVE, NEGATIVE, map="direction", shrinkage=1e-6, **more)
        plus, minus = (outputs(model, batch, [head])[head] for batch in (POSITIVE, NEGATIVE))
        with steering:
            moves.append(float((outputs(model, kept, [head])[head] - plain).norm()))
            moved = outputs(model, NEGATIVE, [head])[head]
        assert torch.allclose(moved.mean(0), plus.mean(0), atol=float(1e-4 * plus.abs().max()))
        samples = torch.cat([plus, plain]) if more else plus
        spread = gaussian(samples, 1e-6)[1]
        matrix, shift = along(*gaussian(minus, 1e-6), plus.mean(0), spread)
        expected = minus @ matrix.t() + shift
        assert torch.allclose(moved, expected, atol=float(1e-4 * expected.abs().max()))
    assert moves[1] < moves[0]


def test_several_controls_on_and_off():
    model = tiny("llama-gqa")
    a = adapter(model)
    base = a.last_logits(POSITIVE)
    steering = HeadSteering(model)
    steering.add("a", HEADS[:2], POSITIVE, NEGATIVE)
    steering.add("b", HEADS[1:], NEGATIVE, POSITIVE, strength=0.5, positions="all")
    assert steering.controls == {"a": 1.0, "b": 0.5}
    assert torch.equal(a.last_logits(POSITIVE), base)  # not enabled yet
    with torch.no_grad(), steering:
        both = a.last_logits(POSITIVE)
        steering.off("b")
        only_a = a.last_logits(POSITIVE)
        steering.off("a")
        assert torch.equal(a.last_logits(POSITIVE), base)
        steering.on("b")
        only_b = a.last_logits(POSITIVE)
        steering.on("a")
        assert torch.equal(a.last_logits(POSITIVE), both)
        steering.on("a", 0.0)
        assert torch.equal(a.last_logits(POSITIVE), only_b) and steering.controls == {"a": 0.0, "b": 0.5}
    different = [base, both, only_a, only_b]
    assert all((x - y).abs().max() > 1e-6 for i, x in enumerate(different) for y in different[:i])
    assert torch.equal(a.last_logits(POSITIVE), base)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_shared_head_takes_one_map_after_the_other():
    model = tiny("llama")
    steering = HeadSteering(model)
    steering.add("a", [(0, 1)], POSITIVE, NEGATIVE)
    steering.add("b", [(0, 1)], NEGATIVE, POSITIVE, strength=0.5)
    (first, second) = steering._controls.values()
    z = outputs(model, NEGATIVE, [(0, 1)])[0, 1]
    with steering:
        moved = outputs(model, NEGATIVE, [(0, 1)])[0, 1]
    for control in (first, second):
        matrix, shift = control.map(0)
        z = z @ matrix.double().t() + shift.double()
    assert torch.allclose(moved, z, atol=float(1e-5 * z.abs().max()))


def test_gradients_pass_through_the_edits():
    """With gradients on, the edit is functional: what attention saved stays as it was."""
    model = tiny("gpt2")
    a = adapter(model)
    steering = HeadSteering(model)
    steering.add("a", HEADS, POSITIVE, NEGATIVE)
    with steering:
        a.last_logits(POSITIVE).sum().backward()
        with torch.no_grad():
            silent = a.last_logits(POSITIVE)
        assert torch.allclose(a.last_logits(POSITIVE), silent, atol=1e-10)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_generation(tmp_path):
    model = tiny("llama-gqa", torch.float32)
    prompt = rows((4, 6), "left")

    def generate():
        return model.generate(**prompt, max_new_tokens=6, do_sample=False, pad_token_id=0)[:, 6:]

    plain = generate()
    steering = HeadSteering(model)
    steering.add("a", HEADS, POSITIVE, NEGATIVE, strength=3.0)
    with steering:
        steered = generate()
        logits = adapter(model).last_logits(prompt)
    assert not torch.equal(steered, plain) and torch.equal(generate(), plain)
    file = tmp_path / "control.safetensors"
    steering.save(file)
    other = HeadSteering(tiny("llama-gqa", torch.float32))
    other.load(file)
    with other:
        assert torch.equal(adapter(other.adapter.model).last_logits(prompt), logits)
    with pytest.raises(ValueError, match="path: expected controls with model_type gpt2, got llama"):
        HeadSteering(tiny("gpt2")).load(file)


@pytest.mark.parametrize("name", ["llama-gqa", "gemma3", "gpt2", "neox"])
def test_layer_steering_adds_the_difference_of_means(name):
    model = tiny(name)
    a = adapter(model)
    seen = []

    def means(batch):
        handle = a.layers[1].register_forward_hook(
            lambda m, args, out: seen.append(out[0] if isinstance(out, tuple) else out)
        )
        checked = a.batch("test", batch)
        a.hidden(checked)
        handle.remove()
        return seen.pop()[torch.arange(len(checked["input_ids"])), a.last(checked)].mean(0).detach()

    steering = LayerSteering(model, 1, POSITIVE, NEGATIVE, strength=0.5)
    plus, minus = means(POSITIVE), means(NEGATIVE)
    assert torch.allclose(steering.vector, plus - minus, atol=1e-12)
    with steering:
        assert torch.allclose(means(NEGATIVE), minus + 0.5 * (plus - minus), atol=1e-12)
    assert torch.allclose(means(NEGATIVE), minus, atol=1e-14)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda s: s.add("a", [], POSITIVE, NEGATIVE), "heads: expected at least one head"),
        (lambda s: s.add("a", HEADS, POSITIVE, NEGATIVE, shrinkage=0.0), "shrinkage: expected a number"),
        (lambda s: s.add("a", HEADS, POSITIVE, NEGATIVE, positions="first"), "positions: expected one of"),
        (lambda s: s.add("a", HEADS, POSITIVE, NEGATIVE, map="x"), "map: expected one of gaussian, direction, got 'x'"),
        (lambda s: s.add("a", HEADS, POSITIVE, NEGATIVE, kept=POSITIVE), 'kept: expected map="direction" beside it'),
        (lambda s: s.add("a", HEADS, POSITIVE, NEGATIVE, kept=[], map="direction"), "kept: expected at least one"),
        (lambda s: s.add("a", HEADS, [], NEGATIVE), "positive: expected at least one batch"),
        (lambda s: s.add("a", HEADS, rows((7,)), NEGATIVE), "expected at least two samples"),
        (lambda s: s.add("a", HEADS, POSITIVE, NEGATIVE, strength=float("nan")), "strength: expected a finite"),
        (lambda s: s.on("b"), "name: expected one of"),
        (lambda s: LayerSteering(s.adapter, 3, POSITIVE, NEGATIVE), "layer: expected a layer in 0..2"),
    ],
)
def test_bad_arguments(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call(HeadSteering(tiny("llama")))


def test_prompts_without_finite_outputs_are_refused():
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="expected prompts with finite outputs"):
        HeadSteering(model).add("a", HEADS, POSITIVE, NEGATIVE)


def test_a_model_in_bfloat16_is_steered_by_maps_in_float32():
    model = tiny("llama", torch.bfloat16)
    steering = HeadSteering(model)
    steering.add("a", [(0, 1)], POSITIVE, NEGATIVE, strength=2.0**-10)  # a map that bfloat16 cannot tell from none
    plain = outputs(model, NEGATIVE, [(0, 1)])[0, 1]
    with steering:
        moved = outputs(model, NEGATIVE, [(0, 1)])[0, 1]
        assert moved.dtype == torch.bfloat16
        steering.on("a", 1.0)
        whole = outputs(model, NEGATIVE, [(0, 1)])[0, 1].float()
    matrix, shift = steering._controls["a"].map(0)
    expected = plain.float() @ matrix.t() + shift
    assert (whole - expected).abs().max() <= 2.0**-8 * expected.abs().max()  # one rounding
    assert (moved - plain).abs().max() <= 2.0**-7 * plain.abs().max()
