"""What a tuner changes of a model: nothing of what it freezes, all of what was selected, and nothing where it fails."""

import pytest
import torch
from safetensors.torch import save_file

from pyml.heads import HeadSteering, HeadTuner, PathScores, Selection, ablate, delta, knockout, merge, share, top_k
from pyml.nn import HeadLinear
from pyml.nn.head_update import HeadLora, Projection
from tests.heads_models import labelled, rows, tiny

HEADS = [(1, 0), (2, 1), (2, 3)]
BATCH = labelled(rows((7, 5, 6)))
SCORES = PathScores(torch.zeros(3, 4), torch.tensor([0.0, -2.0, -1.0]), torch.zeros(1))
SCORES.heads[2, 1] = -3.0


def loss_of(model):
    return model(**BATCH, use_cache=False).loss


def facts(model):
    """All that a failure must leave alone."""
    named = dict(model.named_parameters())
    return {
        "names": list(named), "values": [p.detach().clone() for p in named.values()],
        "asked": [p.requires_grad for p in named.values()], "grads": [p.grad for p in named.values()],
        "modules": [type(m) for m in model.modules()],
    }  # fmt: skip


def assert_same(model, before):
    after = facts(model)
    for key in ("names", "asked", "modules"):
        assert after[key] == before[key], key
    assert all(a is b for a, b in zip(after["grads"], before["grads"]))
    assert all(torch.equal(a, b) for a, b in zip(after["values"], before["values"]))


# --- gradients from before --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"lora_rank": 2}, {"heads": [], "mlps": (1,)}], ids=["slices", "lora", "mlps"])
def test_gradients_from_before_move_nothing(options):
    model = tiny("llama-gqa", torch.float32)
    loss_of(model).backward()
    tuner = HeadTuner(model, **{"heads": HEADS, **options}, verbose=False)
    assert all(p.grad is None for p in model.parameters())
    own = {p.data_ptr() for p in tuner.parameters()}
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.data_ptr() not in own}
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, foreach=True, weight_decay=0.1)
    loss_of(model).backward()
    optimizer.step()
    owners = {name: module for name, module in model.named_modules() if isinstance(module, HeadLinear)}
    for name, old in before.items():
        owner, new = name.rpartition(".")[0], model.get_parameter(name).detach().clone()
        if owner in owners and name.endswith(".weight"):
            for block in owners[owner].blocks:
                for whole in (old, new):  # what is trained is not compared
                    whole.narrow(owners[owner].dim, block * 6, 6).zero_()
        assert torch.equal(old, new), name


# --- steps on an unmerged model ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mlps", [(), (0,)])
def test_steps_of_lora_on_an_unmerged_model_are_not_overwritten(mlps):
    tuner = HeadTuner(tiny("llama", torch.float32), HEADS, mlps=mlps, lora_rank=2, verbose=False)
    optimizer = tuner.optimizer(1e-2)
    tuner.loss(BATCH).backward()
    optimizer.step()
    values = tuner.snapshot()
    tuner.unmerge()
    tuner.merge()
    tuner.loss(BATCH).backward()
    tuner.unmerge()
    optimizer.step()
    with pytest.raises(ValueError, match=r"merge: model: expected slices as unmerge left .* others in 1\.o_proj\.a"):
        tuner.merge()
    tuner.restore(tuner.snapshot())
    tuner.merge()
    assert all(torch.equal(p, values[name]) for name, p in tuner.named_parameters())


# --- selections with MLPs ---------------------------------------------------------------------------------------------


def test_the_mlps_of_a_selection_are_trained():
    selection = top_k(SCORES, 3, mlps=True)
    assert selection == Selection([(2, 1)], [1, 2])
    for heads, mlps in ((selection, ()), (selection, (2, 1)), ({"q": selection, "o": Selection([(0, 0)], [0])}, ())):
        tuner = HeadTuner(tiny("llama"), heads, ("q",), mlps, verbose=False)
        assert tuner.mlps == ([1, 2] if isinstance(heads, Selection) else [0, 1, 2])
        names = {name for name, _ in tuner.named_parameters()}
        assert {"2.q.1", "1.mlp.up_proj.weight", "2.mlp.down_proj.weight"} <= names
    alone = HeadTuner(tiny("llama"), top_k(SCORES, 3), ("q",), (1,), verbose=False)
    assert alone.mlps == [1]
    with pytest.raises(ValueError, match=r"mlps: expected those of the selection, \[1, 2\], or none .* got \(1,"):
        HeadTuner(tiny("llama"), selection, ("q",), (1,), verbose=False)
    with pytest.raises(ValueError, match=r"HeadTuner: mlps: expected layers in 0\.\.2, got \[7\]"):
        HeadTuner(tiny("llama"), Selection([(2, 1)], [7]), verbose=False)


def test_what_acts_on_heads_alone_says_so_of_mlps():
    model, selection = tiny("llama"), share(SCORES, 0.25, mlps=True)
    for call in (
        lambda: ablate(model, selection).__enter__(),
        lambda: knockout(model, rows(), selection, metric=(5, 9)),
        lambda: HeadSteering(model).add("a", selection, rows(), rows(seed=2)),
    ):
        with pytest.raises(ValueError, match=r"heads: expected heads alone \(\.heads of the selection\), got MLPs of"):
            call()


# --- what fails leaves the model --------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, 2])
def test_a_failed_merge_leaves_the_model(lora, tmp_path):
    file = tmp_path / "delta.safetensors"
    HeadTuner(tiny("llama"), HEADS, mlps=(1,), lora_rank=lora, verbose=False).save(file)
    model = tiny("llama", intermediate_size=48)
    model.model.layers[0].requires_grad_(False)
    loss_of(model).backward()
    before = facts(model)
    sentence = r"^merge: path: expected floats of shape \[48, 24\] for 1\.mlp\.gate_proj\.weight, got \[40, 24\] of"
    with pytest.raises(ValueError, match=sentence):
        merge(model, file)
    assert_same(model, before)
    tuned = HeadTuner(tiny("llama"), HEADS, verbose=False)
    with pytest.raises(ValueError, match="merge: model: expected a model without another tuner"):
        merge(tuned.model, file)
    assert isinstance(tuned.adapter.output(1), HeadLinear)


@pytest.mark.parametrize("lora", [None, 2])
@pytest.mark.parametrize("place", ["among the layers", "at the end"])
def test_a_failed_tuner_leaves_the_model(place, lora, monkeypatch):
    model = tiny("llama")
    model.model.layers[0].requires_grad_(False)
    loss_of(model).backward()
    before = facts(model)

    made = []

    def broken(self, *args, **options):
        made.append(args)
        if place == "at the end" or len(made) == 3:
            raise MemoryError
        inner(self, *args, **options)

    owner, name = (HeadTuner, "report") if place == "at the end" else (HeadLora if lora else HeadLinear, "__init__")
    inner = getattr(owner, name)
    monkeypatch.setattr(owner, name, broken)
    with pytest.raises(MemoryError):
        HeadTuner(model, HEADS, mlps=(1,), lora_rank=lora)
    assert_same(model, before)
    assert len(made) == (1 if place == "at the end" else 3)
    monkeypatch.undo()
    assert HeadTuner(model, HEADS, verbose=False).report().heads == 3


def test_a_failed_load_leaves_the_tuner(tmp_path):
    file = tmp_path / "delta.safetensors"
    tuner = HeadTuner(tiny("llama"), HEADS, mlps=(1,), verbose=False)
    tuner.save(file)
    values, metadata = delta.read("test", file)
    start = tuner.snapshot()
    moved = {name: value + 1 for name, value in values.items()}
    for change, sentence in (
        ({"1.q.0": None}, r"path: expected the 9 tensors that this tuner trains, got none of 1\.q\.0"),
        ({"1.x": torch.zeros(1)}, r"path: expected the 9 tensors that this tuner trains, got 1\.x too"),
        ({"2.o.3": torch.zeros(6, 24)}, r"path: expected floats of shape \[24, 6\] for 2\.o\.3, got \[6, 24\] of"),
        ({"2.o.3": torch.zeros(24, 6).long()}, r"path: expected floats of shape .*, got \[24, 6\] of torch\.int64"),
    ):
        given = {name: value for name, value in {**moved, **change}.items() if value is not None}
        delta.write(file, given, metadata)
        for call in (lambda: tuner.load(file), lambda: merge(tiny("llama"), file)):
            with pytest.raises(ValueError, match=sentence):
                call()
        assert all(torch.equal(value, start[name]) for name, value in tuner.snapshot().items())
    with pytest.raises(ValueError, match=r"HeadTuner: values: expected the 9 tensors"):
        tuner.restore({})


def test_headers_of_other_files_are_one_sentence(tmp_path):
    file = tmp_path / "delta.safetensors"
    tuner = HeadTuner(tiny("llama"), HEADS, verbose=False)
    own = {"format": 1, **tuner.metadata()}
    for header in ("{", "[]", *(delta.json.dumps({**own, **change}) for change in (
        {"heads": 3}, {"heads": {"q": 3}}, {"heads": {"q": [[0]]}}, {"mlps": None}, {"lora": [1]}, {"lora": 7},
    ))):  # fmt: skip
        save_file(tuner.delta(), file, metadata={"pyml.heads": header})
        model = tiny("llama")
        for call in (lambda model=model: merge(model, file), lambda: tuner.load(file)):
            with pytest.raises((ValueError, TypeError), match=r"(merge|HeadTuner): (path|heads): expected ") as caught:
                call()
            assert "\n" not in str(caught.value)
        assert not any(isinstance(m, Projection) for m in model.modules())


def test_a_failed_load_leaves_the_controls(tmp_path):
    """Also those that stand in the file before the one that does not fit."""
    file, steering = tmp_path / "controls.safetensors", HeadSteering(tiny("llama"))
    for name in ("a", "b"):
        steering.add(name, HEADS, rows(seed=3), rows(seed=4), act="last")
    steering.save(file)
    values, metadata = delta.read("test", file)
    own, facts = steering._controls, metadata["controls"]["b"]
    before = dict(own)
    for tensors, change, sentence in (
        ({"b.matrix": torch.zeros(3, 5, 5)}, {}, r"floats of shape \[3, 6, 6\] for b\.matrix, got \[3, 5, 5\] of"),
        ({"b.values": None}, {}, r"floats of shape \[3, 6\] for b\.values, got none"),
        ({}, {"heads": [[9, 0]]}, r"layers in 0\.\.2 and heads in 0\.\.3, got \[9, 0\]"),
        ({}, {"heads": None}, "a list of"), ({}, {"act": "never"}, "one of all, last, once, got 'never'"),
        ({}, {"strength": None}, "a finite number"),
    ):  # fmt: skip
        given = {name: value for name, value in {**values, **tensors}.items() if value is not None}
        delta.write(file, given, {**metadata, "controls": {**metadata["controls"], "b": {**facts, **change}}})
        with steering, pytest.raises((ValueError, TypeError), match=rf"^HeadSteering\.load: .*expected {sentence}"):
            steering.load(file)
        assert own == before
    delta.write(file, values, {**metadata, "controls": [1]})
    with pytest.raises(ValueError, match=r"path: expected a file that HeadSteering\.save wrote"):
        steering.load(file)
    delta.write(file, values, metadata)
    steering.load(file)
    assert all(torch.equal(own[name].matrix, before[name].matrix) for name in "ab") and own["b"].act == "last"


@pytest.mark.parametrize("lora", [None, 2])
def test_the_order_of_heads_is_of_no_account(lora, tmp_path):
    file = tmp_path / "delta.safetensors"
    first = HeadTuner(tiny("llama"), [(1, 0), (2, 3), (2, 1)], ("q", "o"), lora_rank=lora, verbose=False)
    optimizer = first.optimizer(1e-2)
    first.loss(BATCH).backward()
    optimizer.step()
    first.save(file)
    second = HeadTuner(tiny("llama"), [(2, 1), (1, 0), (2, 3)], ("o", "q"), lora_rank=lora, verbose=False)
    second.load(file)
    assert torch.equal(loss_of(second.model), loss_of(first.model))
    third = HeadTuner(tiny("llama"), {"q": HEADS, "o": HEADS[:2]}, lora_rank=lora, verbose=False)
    with pytest.raises(ValueError, match="HeadTuner: path: expected a delta with heads"):
        third.load(file)


# --- warnings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["optimizer", "loss"])
def test_inputs_that_require_gradients_later_are_warned_of_once(how, recwarn):
    tuner = HeadTuner(tiny("llama"), HEADS, verbose=False)
    tuner.model.enable_input_require_grads()
    assert not recwarn.list
    call = (lambda: tuner.optimizer(1e-3)) if how == "optimizer" else (lambda: tuner.loss(BATCH))
    for _ in range(2):
        call()
    (warning,) = recwarn.list
    assert "call disable_input_require_grads" in str(warning.message) and warning.filename == __file__
