"""Hooks and wrappers of others on a model: they outlive a tuner, and what they change is not overlooked."""

import functools

import pytest
import torch

from pyml.heads import (
    HeadSteering,
    HeadTuner,
    LayerSteering,
    ablate,
    adapter,
    attribution_patch,
    path_patch,
    path_patch_loop,
)
from tests import heads_models
from tests.heads_models import ALL, labelled, rows, tiny

HEADS = [(1, 0), (2, 1), (2, 3)]
POSITIVE, NEGATIVE = rows((7, 5, 6, 7), seed=3), rows((4, 7, 7, 6), "left", seed=4)
BATCH = labelled(rows((7, 5, 6)))


def logits(model):
    with torch.no_grad():
        return adapter(model).last_logits(POSITIVE)


@pytest.mark.parametrize("lora", [None, 2])
def test_steering_outlives_a_tuner(lora):
    model = tiny("llama-gqa")
    plain = logits(model)
    steering = HeadSteering(model)
    steering.add("a", HEADS, POSITIVE, NEGATIVE, strength=3.0)
    with steering:
        steered = logits(model)
        tuner = HeadTuner(model, HEADS, verbose=False, lora_rank=lora)
        assert torch.allclose(logits(model), steered, rtol=0, atol=1e-12)
        tuner.detach()
        assert torch.allclose(logits(model), steered, rtol=0, atol=1e-12)
    assert (steered - plain).abs().max() > 1e-3
    assert torch.allclose(logits(model), plain, rtol=0, atol=1e-12)
    tuner = HeadTuner(model, HEADS, verbose=False, lora_rank=lora)
    with ablate(model, HEADS):
        silent = logits(model)
        tuner.detach()
        assert torch.allclose(logits(model), silent, rtol=0, atol=1e-12)
    assert torch.allclose(logits(model), plain, rtol=0, atol=1e-12)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_hooks_of_the_user_outlive_a_tuner():
    model = tiny("gpt2")
    seen = {"before": 0, "after": 0, "backward": 0, "late": 0}

    def count(name, *_, **__):
        seen[name] += 1

    o = model.transformer.h[2].attn.c_proj
    handles = [
        o.register_forward_pre_hook(functools.partial(count, "before"), with_kwargs=True),
        o.register_forward_hook(functools.partial(count, "after"), always_call=True),
        o.register_full_backward_hook(functools.partial(count, "backward")),
    ]
    tuner = HeadTuner(model, HEADS, verbose=False)
    late = model.transformer.h[2].attn.c_proj.register_forward_hook(functools.partial(count, "late"))
    tuner.loss(BATCH).backward()
    assert seen == {"before": 1, "after": 1, "backward": 1, "late": 1}
    tuner.detach()
    model(**BATCH, use_cache=False).loss.backward()
    assert seen == {"before": 2, "after": 2, "backward": 2, "late": 2}
    for handle in (*handles, late):
        handle.remove()
    model(**BATCH, use_cache=False).loss.backward()
    assert set(seen.values()) == {2}


def test_a_projection_with_a_wrapped_forward_is_refused():
    model = tiny("llama")
    o = model.model.layers[1].self_attn.o_proj
    o.forward = functools.partial(type(o).forward, o)
    with pytest.raises(ValueError, match=r"HeadTuner: model: expected projections that run the forward of their class"):
        HeadTuner(model, HEADS, verbose=False)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_prefix_leaves_the_forward_of_a_block(name):
    tuner = HeadTuner(tiny(name), [(2, 1)], verbose=False)
    block, counted = tuner.adapter.layers[0], []
    inner = block.forward

    def wrapped(*args, **kwargs):
        counted.append(1)
        return inner(*args, **kwargs)

    block.forward = wrapped
    prefix = tuner.prefix(BATCH)
    assert len(counted) == 1
    first = tuner.loss(BATCH, prefix=prefix)
    assert block.__dict__["forward"] is wrapped and "forward" not in tuner.adapter.layers[1].__dict__
    counted.clear()
    assert torch.allclose(tuner.loss(BATCH), first, rtol=1e-9)
    assert len(counted) == 1


def test_finding_out_what_blocks_return_draws_no_random_number():
    tuner = HeadTuner(tiny("gpt2", torch.float32, resid_pdrop=0.3, embd_pdrop=0.3), [(2, 1)], verbose=False)
    prefix = tuner.prefix(BATCH)
    tuner.model.train()
    losses = []
    for _ in range(2):
        torch.manual_seed(5)
        losses.append(tuner.loss(BATCH, prefix=prefix).item())
    assert losses[0] == losses[1] and all(m.training for m in tuner.model.modules())


@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("name", ALL)
def test_the_last_block_runs_at_labelled_tokens_alone(name, checkpointed):
    few = {**BATCH, "labels": BATCH["labels"].clone()}
    few["labels"][:, :4] = -100
    count = int((few["labels"][:, 1:] != -100).sum())
    assert 0 < count < few["labels"].numel() // 2
    tuner = HeadTuner(tiny(name), HEADS, ("q", "k", "v", "o"), mlps=(2,), verbose=False)
    everywhere = {key: few[key] for key in ("input_ids", "attention_mask")}
    target, logits = few["labels"][:, 1:], tuner.model(**everywhere, use_cache=False).logits[:, :-1]
    torch.nn.functional.cross_entropy(logits[target != -100], target[target != -100]).backward()
    expected = {key: p.grad.clone() for key, p in tuner.named_parameters()}
    tuner.model.zero_grad()
    a, seen, sizes = tuner.adapter, [], []
    prefix = tuner.prefix(few)
    tuner.loss(few, prefix=prefix)  # the first such loss asks blocks what they return
    if checkpointed:
        heads_models.checkpointed(tuner.model)
    for module in (a.output(2), a.mlp(2)):
        module.register_forward_hook(lambda m, args, out: seen.append(out.shape[:-1]))  # others' hooks see every token
    inside = next(m for m in a.mlp(2).children() if hasattr(m, "weight"))
    multiply = inside.forward
    inside.forward = lambda x: (sizes.append(x.shape[:-1].numel()), multiply(x))[1]  # a hook would see every token
    tuner.loss(few, prefix=prefix).backward()
    shape = few["labels"].shape
    assert set(seen) == {shape} and len(seen) >= 2
    assert sizes == ([shape.numel()] * 2 if checkpointed else [count])
    for key, p in tuner.named_parameters():
        assert torch.allclose(p.grad, expected[key], rtol=1e-6, atol=1e-10), key
    sizes.clear()
    tuner.model(**everywhere, use_cache=False)
    assert sizes == [shape.numel()]


@pytest.mark.parametrize("place", ["below", "first", "entering", "inside"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "neox"])
def test_hooks_of_others_act_once_in_a_loss(name, place):
    tuner = HeadTuner(tiny(name), [(1, 0), (2, 1)], verbose=False)
    few = {**BATCH, "labels": BATCH["labels"].clone()}
    few["labels"][:, :4] = -100
    everywhere = {key: few[key] for key in ("input_ids", "attention_mask")}

    def expected():
        target, found = few["labels"][:, 1:], tuner.model(**everywhere, use_cache=False).logits[:, :-1]
        return torch.nn.functional.cross_entropy(found[target != -100], target[target != -100])

    plain = expected()
    prefix = tuner.prefix(few)
    tuner.loss(few, prefix=prefix)  # the first such loss asks blocks what they return
    a = tuner.adapter
    if place == "below":
        LayerSteering(tuner.model, 0, POSITIVE, NEGATIVE).enable()
    elif place == "first":
        a.layers[1].register_forward_hook(lambda m, args, out: (1.5 * out[0],) if isinstance(out, tuple) else 1.5 * out)
    elif place == "entering":
        a.layers[1].register_forward_pre_hook(lambda m, args: (1.5 * args[0], *args[1:]))
    else:
        silence = torch.ones(*few["labels"].shape, 1).double()
        silence[:, 5] = 0
        next(iter(a.mlp(2).children())).register_forward_hook(lambda m, args, out: out * silence)
    changed = expected()
    assert (changed - plain).abs() > 1e-4
    assert torch.allclose(tuner.loss(few), changed, rtol=0, atol=1e-10)
    assert torch.allclose(tuner.loss(few, prefix=tuner.prefix(few)), changed, rtol=0, atol=1e-10)


def test_wrapped_blocks_are_checkpointed_as_they_run():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    few = {**BATCH, "labels": BATCH["labels"].clone()}
    few["labels"][:, :4] = -100
    model = tiny("llama")
    block = type(model.model.layers[0])
    apply_activation_checkpointing(model, check_fn=lambda m: isinstance(m, block))
    plain, wrapped = (HeadTuner(m, HEADS, verbose=False) for m in (tiny("llama"), model))
    for tuner in (plain, wrapped):
        tuner.loss(few).backward()
    assert hasattr(wrapped.adapter.layers[2], "_checkpoint_wrapped_module")
    for (_, p), (_, q) in zip(plain.named_parameters(), wrapped.named_parameters()):
        assert torch.allclose(p.grad, q.grad, rtol=1e-9, atol=1e-12)


def test_a_prefix_is_what_a_checkpointed_block_is_called_with():
    """Versions of transformers differ in whether its hooks run again in the backward."""
    tuner = HeadTuner(tiny("llama"), [(2, 1)], verbose=False)
    prefix, called = tuner.prefix(BATCH), []
    tuner.loss(BATCH, prefix=prefix)
    tuner.adapter.layers[2].register_forward_pre_hook(lambda m, args: called.append(args[0]))
    tuner.loss(BATCH, prefix=prefix)
    assert len(called) == 1 and called[0] is prefix


# --- path patching knows what it cannot see ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-gqa", "gemma2", "gpt2", "neox"])
def test_path_patching_refuses_what_changes_the_residual_stream(name):
    model = tiny(name)
    steering = LayerSteering(model, 1, rows(seed=3), rows(seed=4))
    for options in ({}, {"budget": 1, "batch_size": 2, "mlps": True}):
        with steering, pytest.raises(ValueError, match=r"path_patch: model: expected blocks of .* \(no hooks on"):
            path_patch(model, rows(), rows(seed=2), (5, 9), **options)
    expected = path_patch(tiny(name), rows(), rows(seed=2), (5, 9)).heads
    assert torch.equal(path_patch(model, rows(), rows(seed=2), (5, 9)).heads, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ALL)
def test_rounding_is_no_change_of_the_residual_stream(name, dtype):
    model = tiny(name, dtype)
    found = path_patch(model, rows((7, 5, 6)), rows(seed=2), (5, 9), difference="plain").heads
    assert found.isfinite().all()
    tuner = HeadTuner(model, HEADS, ("q", "k", "v", "o"), lora_rank=2, verbose=False)
    with torch.no_grad():
        for key, p in tuner.named_parameters():
            p.add_(0.3 * torch.randn_like(p) * key.endswith(".b"))
    found = path_patch(model, rows((7, 5, 6)), rows(seed=2), (5, 9), difference="plain").heads
    assert found.isfinite().all()
    if dtype == torch.float32:
        with torch.autocast("cpu", torch.bfloat16):
            cast = path_patch(model, rows((7, 5, 6)), rows(seed=2), (5, 9), difference="plain")
        assert cast.clean.dtype == torch.float32 and cast.heads.isfinite().all()


@pytest.mark.parametrize("how", ["hook", "forward"])
@pytest.mark.parametrize("name", ALL)
def test_path_patching_refuses_what_changes_an_output_projection(name, how):
    """A patch goes through its weight alone."""
    model = tiny(name)
    given = rows((7, 5, 6, 7)), rows((7, 6, 5, 4), seed=2), (5, 9)
    expected, o = path_patch(model, *given).heads, adapter(model).output(1)
    seen = o.register_forward_hook(lambda m, args, out: None)
    assert torch.equal(path_patch(model, *given).heads, expected)
    seen.remove()
    inner = o.forward
    if how == "hook":
        o.register_forward_hook(lambda m, args, out: 3 * out)
    else:
        o.forward = lambda x: 3 * inner(x)
    for options in ({}, {"budget": 1, "batch_size": 2, "mlps": True}):
        with pytest.raises(
            ValueError, match=r"path_patch: model: expected output projections .* \(no hooks.* 66\.7 % .* layer 1$"
        ):
            path_patch(model, *given, **options)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "neox"])
def test_attribution_goes_through_hooks_of_an_output_projection(name):
    model, other = tiny(name), tiny(name)
    given = rows((7, 5, 6)), rows((7, 6, 5), seed=2), (5, 9)
    adapter(model).output(1).register_forward_hook(lambda m, args, out: 3 * out)
    o = adapter(other).output(1)
    with torch.no_grad():
        for p in o.parameters():
            p.mul_(3)
    found, expected = (attribution_patch(m, *given, mlps=True) for m in (model, other))
    assert torch.allclose(found.heads, expected.heads, rtol=1e-9, atol=1e-12)
    assert torch.allclose(found.mlps, expected.mlps, rtol=1e-9, atol=1e-12)
    for size in (1, 2):
        cut = attribution_patch(other, *given, mlps=True, batch_size=size)
        assert torch.allclose(cut.heads, expected.heads, rtol=1e-9, atol=1e-12)
        assert torch.allclose(cut.mlps, expected.mlps, rtol=1e-9, atol=1e-12)
        assert torch.allclose(cut.clean, expected.clean, rtol=1e-12)


@pytest.mark.parametrize("name", ["llama-gqa", "gemma2", "gpt2", "neox"])
def test_path_patching_knows_hooks_on_inputs_norms_and_mlps(name):
    """Steered heads, and what a user puts on other parts of a block, are there for the sweep as they are for a run."""
    model = tiny(name)
    a = adapter(model)
    steering = HeadSteering(model)
    steering.add("a", HEADS, rows(seed=3), rows(seed=4), strength=2.0)
    for module in (a.mlp(1), getattr(a.layers[2], a.norm_name)):
        module.register_forward_hook(lambda m, args, out: 1.5 * out)
    given = rows((7, 5, 6)), rows((7, 6, 5), seed=2), (5, 9)
    with steering:
        found, expected = (f(model, *given, mlps=True) for f in (path_patch, path_patch_loop))
    assert torch.allclose(found.heads, expected.heads, rtol=0, atol=1e-9)
    assert torch.allclose(found.mlps, expected.mlps, rtol=0, atol=1e-9)


# --- with -------------------------------------------------------------------------------------------------------------


def test_an_inner_with_leaves_the_outer_one_on():
    model = tiny("llama")
    plain = logits(model)
    for steering in (HeadSteering(model), LayerSteering(model, 1, POSITIVE, NEGATIVE)):
        if isinstance(steering, HeadSteering):
            steering.add("a", HEADS, POSITIVE, NEGATIVE)
        with steering:
            steered = logits(model)
            with steering:
                assert torch.equal(logits(model), steered)
            assert torch.equal(logits(model), steered)
        assert torch.equal(logits(model), plain) and not torch.equal(steered, plain)
        steering.enable()
        with steering:
            pass
        assert torch.equal(logits(model), steered)
        steering.disable()
        assert torch.equal(logits(model), plain)


# --- layers of others -------------------------------------------------------------------------------------------------


class Sum(torch.nn.Linear):
    """A Linear with a forward of its own, as packages of adapters have them."""

    def forward(self, x):
        return super().forward(x) + x.sum(-1, keepdim=True)


@pytest.mark.parametrize("act", [HeadTuner, path_patch], ids=lambda act: act.__name__)
def test_a_linear_with_another_forward_is_refused(act):
    model = tiny("llama")
    model.model.layers[1].self_attn.o_proj.__class__ = Sum
    given = (HEADS,) if act is HeadTuner else (POSITIVE, NEGATIVE, (5, 9))
    with pytest.raises(ValueError, match=r"run the forward of nn.Linear, got Sum, .* layer 1"):
        act(model, *given)
