"""HeadTuner on every layout: the right gradients, nothing else moves, deltas."""

import copy

import pytest
import torch

from pyml.heads import HeadSteering, HeadTuner, SliceAdamW, adapter, detach, merge
from pyml.nn.head_update import HeadLinear
from tests.heads_models import ALL, SHARED, checkpointed, labelled, rows, tiny

HEADS = [(1, 0), (2, 1), (2, 3)]
QKVO = ("q", "k", "v", "o")
BATCH = labelled(rows((7, 5, 6)))


def tuned(name="llama-gqa", heads=HEADS, projections=QKVO, dtype=torch.float64, **options):
    model = tiny(name, dtype)
    return HeadTuner(model, heads, projections, verbose=options.pop("verbose", False), **options)


def full_gradients(model, batch):
    """d loss / d weight of every projection, as [out, in], by (layer, projection); fused ones cut into q, k and v."""
    a = adapter(model)
    model.requires_grad_(True)
    loss = model(**batch, use_cache=False).loss
    found = {}
    for layer in range(a.num_layers):
        for name in QKVO:
            module = getattr(a.attention(layer), a.places[name].attribute)
            (grad,) = torch.autograd.grad(loss, module.weight, retain_graph=True)
            grad = grad if type(module).__name__ != "Conv1D" else grad.t()
            heads, d = a.heads_of(name), a.head_dim
            if type(module).__name__ == "Conv1D" and name != "o":  # q of all heads, then k, then v
                grad = grad.unflatten(0, (3, heads, d))["qkv".index(name)].flatten(0, 1)
            elif a.places[name].attribute == "query_key_value":  # q, k and v of each head side by side
                grad = grad.unflatten(0, (heads, 3, d))[:, "qkv".index(name)].flatten(0, 1)
            found[layer, name] = grad
    return loss, found, a


@pytest.mark.parametrize("name", ALL)
def test_gradients_are_the_slices_of_the_full_ones(name):
    tuner = tuned(name)
    loss = tuner.model(**BATCH, use_cache=False).loss
    loss.backward()
    expected, grads, a = full_gradients(tiny(name), BATCH)
    assert torch.equal(loss, expected) or torch.allclose(loss, expected, rtol=1e-12)
    seen = 0
    for key, p in tuner.named_parameters():
        layer, projection, head = key.split(".")
        part = grads[int(layer), projection].narrow(int(projection == "o"), int(head) * a.head_dim, a.head_dim)
        assert part.abs().max() > 1e-7, key
        assert torch.allclose(p.grad, part, rtol=1e-6, atol=1e-9), key  # norms of transformers are float32 inside
        seen += 1
    groups = {(layer, a.group(head)) for layer, head in HEADS}
    assert seen == 2 * len(HEADS) + 2 * len(groups)


@pytest.mark.parametrize("name", ALL)
def test_everything_else_stays_bit_for_bit(name):
    """With weight decay, momentum and clipping, N steps."""
    tuner = tuned(name, dtype=torch.float32)
    model = tuner.model
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = tuner.optimizer(1e-2, weight_decay=0.1)
    model.train()
    for _ in range(4):
        loss = model(**BATCH, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tuner.parameters(), 0.5)
        optimizer.step()
    changed = {k: (v != before[k]) for k, v in model.state_dict().items()}
    own = {id(p) for p in tuner.parameters()}
    assert sum(int(c.sum()) for c in changed.values()) == tuner.report().trained
    expected = {k: torch.zeros_like(c) for k, c in changed.items()}
    for path, module in model.named_modules():
        if isinstance(module, HeadLinear):
            view = expected[f"{path}.weight"]
            view = view.t() if module.transposed else view
            for block, p in zip(module.blocks, module.slices.all()):
                assert id(p) in own
                view.narrow(module.dim, block * module.size, module.size).fill_(True)
    assert [k for k in changed if not torch.equal(changed[k], expected[k])] == []
    assert loss.isfinite()


def test_the_optimizer_holds_eight_bytes_a_number():
    tuner = tuned(dtype=torch.float32)
    optimizer = tuner.optimizer(1e-3)
    tuner.model(**BATCH, use_cache=False).loss.backward()
    optimizer.step()
    report = tuner.report()
    assert optimizer.state_bytes() == {"moments": 8 * report.trained, "masters": 0}
    assert report.state_bytes == 8 * report.trained
    d, hidden = 6, 24
    assert report.trained == d * hidden * (3 + 3 + 3 + 3)  # q, o: three heads; k, v: their three groups
    assert report.heads == 3 and report.modules == 12 and report.share == report.trained / report.total
    assert sum(p.numel() for p in tiny("llama-gqa").parameters()) == report.total


@pytest.mark.parametrize("name", SHARED)
def test_shared_keys_and_values_are_trained_once_and_named(name, capsys):
    tuner = tuned(name, verbose=True)
    a = tuner.adapter
    keys = [key for key, _ in tuner.named_parameters() if ".k." in key]
    assert keys == sorted({f"{layer}.k.{a.group(head)}" for layer, head in HEADS}) and len(set(keys)) == len(keys)
    expected = {}
    for layer in (1, 2):
        chosen = [h for at, h in HEADS if at == layer]
        groups = {a.group(h) for h in chosen}
        others = [h for h in range(4) if a.group(h) in groups and h not in chosen]
        if others:
            expected[layer] = others
    assert tuner.siblings == expected and expected
    assert "these heads change too" in capsys.readouterr().out
    assert tuned(name, projections=("q", "o")).siblings == {}


def test_the_backward_ends_below_the_lowest_layer():
    tuner = tuned("llama")
    inputs = {}
    for layer, block in enumerate(tuner.adapter.layers):
        block.register_forward_hook(lambda m, a, out, n=layer: inputs.__setitem__(n, out.requires_grad))
    tuner.model(**BATCH, use_cache=False).loss.backward()
    assert inputs == {0: False, 1: True, 2: True} and tuner.lowest_layer == 1
    frozen = [n for n, p in tuner.model.named_parameters() if not n.rpartition(".")[0].endswith("slices")]
    assert all(tuner.model.get_parameter(n).grad is None for n in frozen)


@pytest.mark.parametrize("prefix", [False, True], ids=["whole", "prefix"])
@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "neox"])
def test_non_reentrant_checkpointing_and_accumulation(name, prefix):
    expected = {}
    tuner = tuned(name)
    for part in (slice(0, 1), slice(1, 3)):
        batch = {k: v[part] for k, v in BATCH.items()}
        # transformers makes its loss in float32
        (tuner.loss(batch) if prefix else tuner.model(**batch, use_cache=False).loss).backward()
    for key, p in tuner.named_parameters():
        expected[key] = p.grad.clone()
    other = tuned(name)
    checkpointed(other.model)
    if prefix:  # the first such loss asks blocks what they return
        other.loss(BATCH, prefix=other.prefix(BATCH))
    counted = []
    other.adapter.output(2).register_forward_pre_hook(lambda *_: counted.append(1))
    for part in (slice(0, 1), slice(1, 3)):
        batch = {k: v[part] for k, v in BATCH.items()}
        if prefix:
            other.loss(batch, prefix=other.prefix(batch)).backward()
        else:
            other.model(**batch, use_cache=False).loss.backward()
    assert len(counted) == 4  # each block ran again in the backward
    assert not getattr(other.model, "_require_grads_hooks", None)
    for key, p in other.named_parameters():
        assert torch.allclose(p.grad, expected[key], rtol=1e-6, atol=1e-10), key


def test_grad_scale():
    plain, scaled, heads = tuned(), tuned(grad_scale=3.0), tuned(grad_scale="heads")
    for tuner in (plain, scaled, heads):
        tuner.model(**BATCH, use_cache=False).loss.backward()
    for (key, a), (_, b), (_, c) in zip(*(t.named_parameters() for t in (plain, scaled, heads))):
        layer, projection, _ = key.split(".")
        total = 2 if projection in "kv" else 4
        count = sum(1 for k, _ in plain.named_parameters() if k.startswith(f"{layer}.{projection}."))
        assert torch.allclose(b.grad, 3 * a.grad, rtol=1e-12)
        assert torch.allclose(c.grad, total / count * a.grad, rtol=1e-12)


def test_mlps_and_masks_and_heads_for_each_projection():
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[1, 2] = True
    tuner = tuned(heads={"q": mask, "o": [(2, 0)]}, mlps=(1,))
    names = [key for key, _ in tuner.named_parameters()]
    assert names == ["1.q.2", "2.o.0", "1.mlp.gate_proj.weight", "1.mlp.up_proj.weight", "1.mlp.down_proj.weight"]
    assert tuner.report().mlps == 1 and tuner.report().heads == 2
    tuner.model(**BATCH, use_cache=False).loss.backward()
    assert all(p.grad is not None for p in tuner.parameters())
    gpt2 = tuned("gpt2", mlps=(0,))
    assert [k for k, _ in gpt2.named_parameters() if "mlp" in k] == ["0.mlp.c_fc.weight", "0.mlp.c_proj.weight"]


def train(tuner, steps=3, lr=1e-2):
    optimizer = tuner.optimizer(lr)
    for _ in range(steps):
        optimizer.zero_grad()
        tuner.loss(BATCH).backward()
        optimizer.step()
    return tuner.model(**BATCH, use_cache=False).logits.detach()


@pytest.mark.parametrize("lora", [None, 2])
@pytest.mark.parametrize("name", ["llama-gqa", "qwen2", "gpt2", "neox"])
def test_save_load_merge_and_unmerge(name, lora, tmp_path):
    plain = tiny(name)
    original = plain(**BATCH, use_cache=False).logits.detach()
    tuner = tuned(name, lora_rank=lora, mlps=() if lora else (2,))
    logits = train(tuner)
    assert (logits - original).abs().max() > 1e-3
    file = tmp_path / "delta.safetensors"
    tuner.save(file)
    assert file.stat().st_size < tuner.report().trained * 8 + 4000
    tuner.unmerge()
    assert torch.equal(tuner.model(**BATCH, use_cache=False).logits, original)
    tuner.unmerge()
    tuner.merge()
    assert torch.equal(tuner.model(**BATCH, use_cache=False).logits, logits)
    again = tuned(name, lora_rank=lora, mlps=() if lora else (2,))
    again.load(file)
    assert torch.equal(again.model(**BATCH, use_cache=False).logits, logits)
    asked = [p.requires_grad for p in plain.parameters()]
    merged = merge(plain, file)
    assert torch.allclose(merged(**BATCH, use_cache=False).logits, logits, rtol=0, atol=1e-12)
    assert not any(isinstance(m, HeadLinear) for m in merged.modules())
    assert [p.requires_grad for p in plain.parameters()] == asked
    assert merged.state_dict().keys() == tiny(name).state_dict().keys()
    tuner.detach()
    assert torch.allclose(tuner.model(**BATCH, use_cache=False).logits, logits, rtol=0, atol=1e-12)


def test_a_delta_of_another_model_is_refused(tmp_path):
    file = tmp_path / "delta.safetensors"
    tuned("llama").save(file)
    for call, sentence in (
        (lambda: tuned("llama-gqa").load(file), "path: expected a delta with num_kv_heads 2, got 4"),
        (lambda: tuned("llama", heads=[(0, 0)]).load(file), "path: expected a delta with heads"),
        (lambda: merge(tiny("gpt2"), file), "path: expected a delta with model_type gpt2, got llama"),
        (lambda: merge(tiny("llama"), tmp_path / "none"), "path: expected a delta that HeadTuner.save wrote"),
    ):
        with pytest.raises(ValueError, match=sentence):
            call()
    (tmp_path / "broken").write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"path: expected a delta that HeadTuner\.save wrote"):
        merge(tiny("llama"), tmp_path / "broken")


def test_a_file_of_steering_is_no_delta(tmp_path):
    steering = HeadSteering(tiny("llama"))
    steering.add("a", HEADS, rows((7, 5)), rows((6, 7)))
    steering.save(tmp_path / "control")
    for call in (lambda: merge(tiny("llama"), tmp_path / "control"), lambda: tuned("llama").load(tmp_path / "control")):
        with pytest.raises(ValueError, match="path: expected a delta"):
            call()


def test_labels_and_prefixes_that_do_not_fit_are_one_sentence():
    tuner = tuned("llama")
    prefix = tuner.prefix(BATCH)
    for wrong in (prefix[:1], prefix[:, :5], prefix[0], prefix[..., :20]):
        with pytest.raises(ValueError, match=r"HeadTuner: prefix: expected shape \[B, T, D\] .* = \[3, 7, 24\], got"):
            tuner.loss(BATCH, prefix=wrong)
    with pytest.raises(TypeError, match="HeadTuner: prefix: expected a tensor"):
        tuner.loss(BATCH, prefix=[1])
    for label in (61, -1):
        labels = BATCH["labels"].clone()
        labels[0, 4] = label
        with pytest.raises(ValueError, match=rf"HeadTuner: batch: expected labels in 0\.\.60, or -100, got {label}$"):
            tuner.loss({**BATCH, "labels": labels})


@pytest.mark.parametrize("name", ALL)
def test_label_only_loss_and_prefix(name):
    tuner = tuned(name, dtype=torch.float32, heads=[(2, 1), (2, 3)])
    right = labelled(rows((7, 5, 6), "right"))
    expected = tuner.model(**right, use_cache=False).loss
    loss = tuner.loss(right)
    assert torch.allclose(loss, expected, rtol=1e-5)
    ran = []
    for n, block in enumerate(tuner.adapter.layers):
        block.mlp.register_forward_hook(lambda *_, n=n: ran.append(n))
    prefix = tuner.prefix(right)
    assert ran == [0, 1] and not prefix.requires_grad
    ran.clear()
    cached = tuner.loss(right, prefix=prefix)
    assert ran == [2] or ran == [0, 1, 2, 2]  # a first run of one token finds out what blocks return
    assert torch.allclose(cached, loss, rtol=1e-6)
    a, b = (torch.autograd.grad(x, tuner.parameters()) for x in (loss, cached))
    assert all(torch.allclose(x, y, rtol=1e-5, atol=1e-8) for x, y in zip(a, b))
    assert torch.allclose(tuner.loss(right), loss, rtol=1e-6)  # the blocks are whole again
    with pytest.raises(ValueError, match="batch: expected a label that is not -100"):
        tuner.loss({**right, "labels": torch.full_like(right["labels"], -100)})


def test_snapshots_and_deepcopies():
    tuner = tuned()
    start = tuner.snapshot()
    first = train(tuner)
    other = copy.deepcopy(tuner)
    assert torch.equal(other.model(**BATCH, use_cache=False).logits, first)
    tuner.restore(start)
    assert torch.equal(train(tuner), first)
    assert torch.equal(other.model(**BATCH, use_cache=False).logits, first)
    second = train(other)
    assert not torch.equal(second, first)
    assert torch.equal(tuner.model(**BATCH, use_cache=False).logits, first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moved_to_another_dtype_it_still_trains(dtype):
    tuner = tuned(dtype=torch.float32)
    optimizer = tuner.optimizer(1e-1, master_weights=dtype == torch.bfloat16)
    tuner.model.to(dtype)
    before = tuner.model(**BATCH, use_cache=False).logits.detach()
    tuner.loss(BATCH).backward()
    optimizer.step()
    assert not torch.equal(tuner.model(**BATCH, use_cache=False).logits, before)
    assert all(p.dtype == dtype for p in tuner.parameters())


BAD = {
    "heads: expected layers in 0..2": {"heads": [(3, 0)]},
    "heads: expected heads that differ": {"heads": [(0, 0), (0, 0)]},
    "heads: expected pairs": {"heads": [3]},
    "heads: expected at least one head or MLP": {"heads": []},
    "projections: expected one of q, k, v, o": {"projections": ("q", "x")},
    "projections: expected projections that differ": {"projections": ("q", "q")},
    "mlps: expected layers": {"mlps": (5,)},
    "lora_rank: expected None or an integer in 1..6": {"lora_rank": 7},
    "grad_scale: expected None with lora_rank": {"lora_rank": 2, "grad_scale": 2.0},
    "grad_scale: expected None, a number": {"grad_scale": "H/h"},
    "grad_scale: expected None, a number above 0 or .* got 0": {"grad_scale": 0},
    "grad_scale: expected None, a number above 0 or .* got nan": {"grad_scale": float("nan")},
    "lora_alpha: expected a number above 0, got 0.0": {"lora_rank": 2, "lora_alpha": 0.0},
    "lora_alpha: expected None without lora_rank": {"lora_alpha": 2.0},
    "lora_rank: expected None or an integer in 1..6, .* got True": {"lora_rank": True},
    r"mlps: expected layers in 0\.\.2, got 3": {"mlps": 3},
    r"mlps: expected layers in 0\.\.2, got \(True,\)": {"mlps": (True,)},
}


@pytest.mark.parametrize("sentence", BAD)
def test_bad_arguments_get_one_sentence_and_leave_the_model(sentence):
    model = tiny("llama")
    with pytest.raises(ValueError, match=f"HeadTuner: {sentence}"):
        HeadTuner(model, **{"heads": HEADS, "verbose": False, **BAD[sentence]})
    assert all(p.requires_grad for p in model.parameters())
    assert not any(isinstance(m, HeadLinear) for m in model.modules())


def test_two_tuners_on_one_model_are_refused():
    tuner = tuned("llama")
    with pytest.raises(ValueError, match="model: expected a model without another tuner"):
        HeadTuner(tuner.model, HEADS, verbose=False)
    HeadTuner(tuner.detach(), HEADS, verbose=False)
    assert isinstance(tuned("llama").optimizer(1e-3), SliceAdamW)


@pytest.mark.parametrize("second", [{"heads": [(0, 0)]}, {"heads": [], "mlps": (0,)}], ids=["heads", "mlps"])
@pytest.mark.parametrize("first", [{"heads": [(2, 1)]}, {"heads": [], "mlps": (2,)}], ids=["heads", "mlps"])
def test_two_tuners_are_refused_in_other_layers_too(first, second):
    """The second would freeze what the first one trains."""
    model = tiny("llama")
    tuner = HeadTuner(model, **first, verbose=False)
    with pytest.raises(ValueError, match="model: expected a model without another tuner"):
        HeadTuner(model, **second, verbose=False)
    assert all(p.requires_grad for p in tuner.parameters())
    other = HeadTuner(tuner.detach(), **second, verbose=False)
    tuner.detach()  # once more: of no effect
    assert sum(p.requires_grad for p in model.parameters()) >= len(other.parameters()) > 0
    assert not model.lm_head.weight.requires_grad


def test_a_model_whose_tuner_is_gone_has_a_way_back():
    model = tuned("llama").model
    copied = copy.deepcopy(model)
    for one in (model, copied):
        with pytest.raises(ValueError, match=r"pyml.heads.detach\(model\) ends it"):
            HeadTuner(one, [], mlps=(0,), verbose=False)
        assert all(p.requires_grad for p in detach(one).parameters())
        assert HeadTuner(one, [], mlps=(0,), verbose=False).report().mlps == 1


def test_a_detached_tuner_says_so(tmp_path):
    """Above all it does not write an empty file over a good one."""
    tuner, path = tuned("llama"), tmp_path / "delta.safetensors"
    tuner.save(path)
    good = path.read_bytes()
    tuner.detach()
    for call in (lambda: tuner.save(path), lambda: tuner.loss(BATCH), lambda: tuner.optimizer(1e-3), tuner.unmerge):
        with pytest.raises(ValueError, match="HeadTuner: tuner: expected one that is not detached"):
            call()
    assert path.read_bytes() == good


def test_a_model_whose_inputs_require_gradients_is_warned_of():
    model = tiny("llama")
    model.enable_input_require_grads()
    with pytest.warns(UserWarning, match="call disable_input_require_grads"):
        HeadTuner(model, HEADS, verbose=False)
