"""What a tuner and its optimizer hold: float32 copies, saved states, values while unmerged, the guard."""

import copy
import io

import pytest
import torch

from pyml.heads import HeadTuner, SliceAdamW, merge
from pyml.nn import HeadLinear
from pyml.ops import head_linear
from tests.heads_models import labelled, rows, tiny

HEADS = [(1, 0), (2, 1), (2, 3)]
BATCH = labelled(rows((7, 5, 6)))


def tuned(dtype=torch.float32, name="llama-gqa", **options):
    return HeadTuner(tiny(name, dtype), HEADS, ("q", "k", "v", "o"), verbose=False, **options)


def train(tuner, optimizer, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        tuner.loss(BATCH).backward()
        optimizer.step()


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- the guard against torch's fused optimizers -----------------------------------------------------------------------


def refused(params, weight):
    before = weight.detach().clone()
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"HeadTuner: optimizer: expected .* got a fused AdamW"):
        torch.optim.AdamW(params, 1e-2, fused=True).step()
    assert torch.equal(weight, before)


def test_a_public_layer_alone_is_guarded(unguarded):
    unguarded()
    module = HeadLinear(torch.nn.Linear(8, 12), [3, 1], 2, 1)
    refused(module.slices.all(), module.weight)


def test_the_op_alone_is_guarded(unguarded):
    unguarded()
    weight = torch.randn(12, 8)
    columns = torch.nn.Parameter(weight[:, 2:4])
    head_linear(torch.randn(3, 8), weight, None, [columns], heads=[1], size=2, dim=1)
    refused([columns], weight)
    whole = torch.nn.Parameter(torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last))  # no gaps: not refused
    whole.grad = torch.ones_like(whole)
    torch.optim.AdamW([whole], 1e-2, fused=True).step()
    assert (whole < 1).all()


@pytest.mark.parametrize("how", ["torch.load", "deepcopy"])
def test_a_model_that_comes_from_elsewhere_is_guarded(unguarded, how):
    model = tuned().model
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    unguarded()
    other = torch.load(file, weights_only=False) if how == "torch.load" else copy.deepcopy(model)
    o = other.model.layers[2].self_attn.o_proj
    refused(o.slices.all(), o.weight)


# --- float32 copies ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["restore", "load", "load_state_dict", "unmerge", "by hand"])
def test_copies_follow_what_else_writes_to_the_weights(how, tmp_path):
    tuner = tuned(torch.bfloat16)
    optimizer = tuner.optimizer(1e-2, master_weights=True)
    start, state = tuner.snapshot(), copy.deepcopy(tuner.model.state_dict())
    tuner.save(tmp_path / "start")
    train(tuner, optimizer)
    assert not equal(tuner.snapshot(), start)
    if how == "restore":
        tuner.restore(start)
    elif how == "load":
        tuner.load(tmp_path / "start")
    elif how == "load_state_dict":
        tuner.model.load_state_dict(state)
    elif how == "unmerge":
        tuner.unmerge()
    else:
        with torch.no_grad():
            for name, p in tuner.named_parameters():
                p.copy_(start[name])
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    tuner.model(**BATCH, use_cache=False).loss.backward()
    optimizer.step()
    assert equal(tuner.model.state_dict(), state)
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    if how != "unmerge":
        train(tuner, optimizer, 1)
        assert not equal(tuner.snapshot(), start)


def test_a_copy_keeps_its_digits_where_nothing_was_written():
    p = torch.nn.Parameter(torch.full((4,), 4.0, dtype=torch.bfloat16))
    optimizer = SliceAdamW([p], 1e-4)
    for _ in range(3):
        p.grad = torch.ones_like(p)
        optimizer.step()
    master = optimizer.state[p]["master"].clone()
    assert (p == 4).all() and (master < 4).all()
    with torch.no_grad():
        p[1] = 2.0
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    expected = master.clone()
    expected[1] = 2.0
    assert torch.equal(optimizer.state[p]["master"], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_have_copies_by_default(dtype):
    """At rates of fine-tuning, most steps lie below half a rounding step of the weights."""
    moved = []
    for options in ({}, {"master_weights": True}, {"master_weights": False}, {"stochastic_rounding": True}):
        tuner = tuned(dtype)
        start = tuner.snapshot()
        optimizer = tuner.optimizer(3e-5, **options)
        train(tuner, optimizer, 20)
        end = tuner.snapshot()
        moved.append(sum(int((end[k] != start[k]).sum()) for k in start))
        kept = optimizer.state_bytes()["masters"]
        assert kept == (tuner.report().master_bytes if options in ({}, {"master_weights": True}) else 0)
    assert moved[0] == moved[1] > 2 * moved[2]
    assert f"float32 copies {kept_megabytes(tuner)} MB" in str(tuner.report())
    assert "float32 copies" not in str(tuned().report())


def kept_megabytes(tuner):
    return f"{4 * tuner.report().trained / 1e6:.3g}"


def test_a_resumed_optimizer_has_the_copies_that_it_wants():
    def fresh(**options):
        p = torch.nn.Parameter(torch.full((3, 4), 4.0, dtype=torch.bfloat16))
        return p, SliceAdamW([p], 5e-4, **options)

    def steps(p, optimizer, count):
        for _ in range(count):
            p.grad = torch.ones_like(p)
            optimizer.step()

    p, without = fresh(master_weights=False)
    steps(p, without, 2)
    q, wanting = fresh(master_weights=True)
    wanting.load_state_dict(without.state_dict())
    steps(q, wanting, 80)
    assert wanting.state_bytes()["masters"] == 4 * 12 and wanting.state[q]["step"] == 82
    assert (q < 4).all() and (p == 4).all()
    r, rounding = fresh(stochastic_rounding=True)
    rounding.load_state_dict(wanting.state_dict())
    assert rounding.state_bytes()["masters"] == 0
    steps(r, rounding, 1)
    assert "master" not in rounding.state[r] and rounding.state[r]["step"] == 83


def test_the_state_of_torch_adamw_goes_on():
    a, b = (torch.nn.Parameter(torch.ones(5)) for _ in range(2))
    theirs = torch.optim.AdamW([a], 0.1, weight_decay=0.0)
    for _ in range(2):
        a.grad = torch.arange(5.0)
        theirs.step()
    ours = SliceAdamW([b], 5.0)
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        b.copy_(a)
    for p, optimizer in ((a, theirs), (b, ours)):
        p.grad = torch.ones(5)
        optimizer.step()
    assert torch.allclose(a, b, rtol=1e-6)


def test_a_refused_step_is_none():
    p = torch.nn.Parameter(torch.ones(4))
    optimizer = SliceAdamW([p], 0.1)
    p.grad = torch.ones_like(p)
    optimizer.param_groups[0]["eps"] = float("nan")
    with pytest.raises(ValueError, match="adamw_slices_: eps"):
        optimizer.step()
    assert optimizer.state[p]["step"] == 0 and (p == 1).all()
    optimizer.param_groups[0]["eps"] = 1e-8
    optimizer.step()
    assert optimizer.state[p]["step"] == 1 and torch.allclose(p.detach(), torch.full((4,), 0.9))


# --- values while unmerged --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, 2])
def test_unmerged_the_tuned_values_are_still_what_is_saved(lora, tmp_path):
    tuner = tuned(lora_rank=lora)
    base = tuner.model(**BATCH, use_cache=False).logits.detach()
    start = tuner.snapshot()
    train(tuner, tuner.optimizer(1e-2))
    values = tuner.snapshot()
    logits = tuner.model(**BATCH, use_cache=False).logits.detach()
    tuner.unmerge()
    assert torch.equal(tuner.model(**BATCH, use_cache=False).logits, base)
    assert equal(tuner.snapshot(), values) and equal(tuner.delta(), values) and not equal(values, start)
    tuner.save(tmp_path / "delta")
    with torch.no_grad():
        loss = tuner.loss(BATCH)  # of the model before tuning
    with pytest.raises(ValueError, match=r"HeadTuner: model: expected the tuned values .* \(call merge first\)"):
        tuner.loss(BATCH)
    tuner.restore(start)  # the model has what was asked for, and a merge changes nothing
    tuner.merge()
    assert equal(tuner.snapshot(), start)
    assert torch.equal(tuner.loss(BATCH), loss)
    tuner.unmerge()
    tuner.load(tmp_path / "delta")
    assert torch.equal(tuner.model(**BATCH, use_cache=False).logits, logits)
    assert equal(tuner.snapshot(), values)


def test_steps_on_an_unmerged_model_are_not_overwritten():
    tuner = tuned()
    optimizer = tuner.optimizer(1e-2)
    train(tuner, optimizer)
    values = tuner.snapshot()
    tuner.unmerge()
    optimizer.zero_grad()
    tuner.model(**BATCH, use_cache=False).loss.backward()
    optimizer.step()
    with pytest.raises(ValueError, match=r"HeadTuner\.merge: model: expected slices as unmerge left them"):
        tuner.merge()
    tuner.restore(tuner.snapshot())
    assert equal(tuner.snapshot(), values)
    tuner.merge()
    assert equal({k: p.detach() for k, p in tuner.named_parameters()}, values)


# --- detach -----------------------------------------------------------------------------------------------------------


def test_detach_brings_requires_grad_back_after_assigned_weights():
    model = tiny("llama", torch.float32)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    asked = {name: p.requires_grad for name, p in model.named_parameters()}
    tuner = HeadTuner(model, HEADS, verbose=False)
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    tuner.detach()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == asked


def test_with_lora_whole_mlps_are_unmerged_too(tmp_path):
    tuner = HeadTuner(tiny("llama", torch.float32), [(1, 0)], mlps=(0,), lora_rank=2, verbose=False)
    model, weight = tuner.model, tuner.adapter.mlp(0).up_proj.weight
    before, plain = weight.detach().clone(), model(**BATCH, use_cache=False).logits.detach()
    train(tuner, tuner.optimizer(1e-2))
    after, tuned_logits = weight.detach().clone(), model(**BATCH, use_cache=False).logits.detach()
    assert not torch.equal(before, after)
    tuner.unmerge()
    assert torch.equal(weight, before) and torch.equal(model(**BATCH, use_cache=False).logits, plain)
    tuner.save(tmp_path / "delta.safetensors")  # the tuned values
    tuner.merge()
    assert torch.equal(weight, after) and torch.equal(model(**BATCH, use_cache=False).logits, tuned_logits)
    other = merge(tiny("llama", torch.float32), tmp_path / "delta.safetensors")
    assert torch.allclose(other(**BATCH, use_cache=False).logits, tuned_logits, atol=1e-5)


def test_a_batch_with_what_is_not_read_is_refused():
    tuner = tuned()
    with pytest.raises(ValueError, match="expected input_ids, attention_mask and labels, got atention_mask too"):
        tuner.loss({**BATCH, "atention_mask": BATCH["input_ids"]})


def test_a_file_that_cannot_be_written_leaves_nothing_behind(tmp_path):
    tuner = tuned()
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder", tmp_path / "none" / "delta.safetensors"):
        with pytest.raises(ValueError, match="save: path: expected a file that can be written"):
            tuner.save(path)
    assert [item.name for item in tmp_path.rglob("*")] == ["folder"]
