"""Where steering acts: at every position, from the last token of a prompt on, or there alone; padded and generating."""

import pytest
import torch

from pyml.heads import HeadSteering, LayerSteering, adapter
from pyml.heads.acting import ACTS
from pyml.heads.edits import Edit
from pyml.heads.steering import gaussian, transport
from tests.heads_models import rows, tiny

HEAD = (0, 1)  # nothing before it is edited
SOME = ["llama-gqa", "gemma3", "gpt2", "neox"]
POSITIVE, NEGATIVE = rows((7, 5, 6, 7), seed=3), rows((4, 7, 7, 6), "left", seed=4)
BATCHES = {
    "left": (rows((4, 7, 5), "left"), [6, 6, 6]), "right": (rows((4, 7, 5), "right"), [3, 6, 4]),
    "none": (rows((6, 6)), [5, 5]),
}  # fmt: skip


def acts_at(act, ends, width):
    """The columns of each row that are edited."""
    columns = {"all": range(width), "last": None, "once": None}[act]
    if columns is not None:
        return [list(columns)] * len(ends)
    return [[end] if act == "once" else list(range(end, width)) for end in ends]


def outputs(model, batch, head):
    """``[B, T, D]``: what a head puts out at every position, behind all edits."""
    a, found = adapter(model), []
    handle = a.output(head[0]).register_forward_pre_hook(lambda m, args: found.append(args[0].clone()))
    with torch.no_grad():
        a.hidden(a.batch("test", batch))
    handle.remove()
    return found[0].unflatten(-1, (a.num_heads, a.head_dim))[:, :, head[1]]


def steering_of(kind, model, act, strength=1.0):
    """Either kind of steering at the first layer."""
    if kind == "layer":
        return LayerSteering(model, 0, POSITIVE, NEGATIVE, strength=strength, act=act)
    steering = HeadSteering(model)
    steering.add("a", [HEAD, (0, 3), (2, 0)], POSITIVE, NEGATIVE, strength=strength, act=act)
    return steering


@pytest.mark.parametrize("side", BATCHES)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("name", SOME)
def test_heads_are_moved_there_and_nowhere_else(name, act, side):
    model, (batch, ends) = tiny(name), BATCHES[side]
    plain = outputs(model, batch, HEAD)
    steering = steering_of("heads", model, act)
    matrix, shift = (part.double() for part in steering._controls["a"].map(0))
    with steering:
        moved = outputs(model, batch, HEAD)
    expected = plain.clone()
    for row, columns in enumerate(acts_at(act, ends, plain.shape[1])):
        expected[row, columns] = plain[row, columns] @ matrix.t() + shift
        others = [t for t in range(plain.shape[1]) if t not in columns]
        assert torch.equal(moved[row, others], plain[row, others])
    assert torch.allclose(moved, expected, atol=float(1e-5 * expected.abs().max()))
    assert torch.equal(outputs(model, batch, HEAD), plain)


@pytest.mark.parametrize("side", BATCHES)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_vector_is_added_there_and_nowhere_else(name, act, side):
    model, (batch, ends) = tiny(name), BATCHES[side]
    a, found = adapter(model), []

    def behind():
        handle = a.layers[0].register_forward_hook(
            lambda m, args, out: found.append(out[0] if isinstance(out, tuple) else out)
        )
        with torch.no_grad():
            a.hidden(a.batch("test", batch))
        handle.remove()
        return found.pop()

    plain = behind()
    vector = LayerSteering(model, 0, POSITIVE, NEGATIVE, strength=0.5, act=act)
    with vector:
        moved = behind()
    for row, columns in enumerate(acts_at(act, ends, plain.shape[1])):
        others = [t for t in range(plain.shape[1]) if t not in columns]
        assert torch.allclose(moved[row, columns], plain[row, columns] + 0.5 * vector.vector, atol=1e-12)
        assert torch.equal(moved[row, others], plain[row, others])


@pytest.mark.parametrize("kind", ["heads", "layer"])
@pytest.mark.parametrize("name", SOME)
def test_generating_with_a_cache_is_a_forward_of_all_tokens(name, kind):
    """Token by token from a cache, on the left padded, against whole forwards that are told where the prompts end."""
    model, prompt, ones = tiny(name), rows((4, 6, 6), "left"), torch.ones(3, 4, dtype=torch.int64)
    how = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    last = []
    for act in ACTS:
        steering = steering_of(kind, model, act, strength=3.0)
        with torch.no_grad(), steering:
            made = model.generate(**prompt, **how, output_logits=True, return_dict_in_generate=True)
            for new in range(5):
                mask = torch.cat([prompt["attention_mask"], ones[:, :new]], 1)
                with steering.prompt_ends(torch.tensor([5, 5, 5])):
                    whole = adapter(model).last_logits(
                        {"input_ids": made.sequences[:, : 6 + new], "attention_mask": mask}
                    )
                assert torch.allclose(made.logits[new], whole.to(made.logits[new]), atol=1e-5)
        last.append(made.logits[1])
    last.append(model.generate(**prompt, **how, output_logits=True, return_dict_in_generate=True).logits[1])
    assert all((x - y).abs().max() > 1e-3 for i, x in enumerate(last) for y in last[:i])


@pytest.mark.parametrize("act", ["last", "once"])
@pytest.mark.parametrize("kind", ["heads", "layer"])
def test_gradients_pass_through(kind, act):
    model = tiny("llama-gqa")
    a, batch = adapter(model), BATCHES["right"][0]
    with steering_of(kind, model, act):
        found = a.last_logits(batch)
        found.square().sum().backward()
        with torch.no_grad():
            silent = a.last_logits(batch)
    assert torch.allclose(found, silent, atol=1e-10)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_controls_that_act_elsewhere_share_a_head_in_their_order():
    model, (batch, _) = tiny("llama"), BATCHES["right"]
    steering = HeadSteering(model)
    for name, sides, act in (("a", (POSITIVE, NEGATIVE), "all"), ("b", (NEGATIVE, POSITIVE), "last"),
                             ("c", (POSITIVE, NEGATIVE), "all")):  # fmt: skip
        steering.add(name, [HEAD], *sides, strength=0.5, act=act)
    expected = outputs(model, batch, HEAD)
    for control in steering._controls.values():
        matrix, shift = (part.double() for part in control.map(0))
        columns = acts_at(control.act, BATCHES["right"][1], expected.shape[1])
        for row, where in enumerate(columns):
            expected[row, where] = expected[row, where] @ matrix.t() + shift
    with steering:
        moved = outputs(model, batch, HEAD)
    assert torch.allclose(moved, expected, atol=float(1e-5 * expected.abs().max()))
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_control_is_fitted_beside_those_that_are_on():
    model = tiny("llama")
    steering = HeadSteering(model)
    steering.add("a", [HEAD], POSITIVE, NEGATIVE, act="last")
    steering.add("alone", [HEAD, (2, 1)], NEGATIVE, POSITIVE)
    steering.off("alone")
    steering.add("beside", [HEAD, (2, 1)], NEGATIVE, POSITIVE, beside=True)
    assert not steering._handles
    steering.off("beside")
    for name, on in (("alone", False), ("beside", True)):
        for index, head in enumerate(steering._controls[name].heads):
            sides = []
            for batch in (POSITIVE, NEGATIVE):  # from positive to negative: "a" moves these where it is on
                with torch.no_grad():
                    (steering.enable if on else steering.disable)()
                    last = adapter(model).last(adapter(model).batch("test", batch))
                    sides.append(gaussian(outputs(model, batch, head)[torch.arange(len(last)), last], 0.1))
            steering.disable()
            matrix, shift = transport(*sides[0], *sides[1])
            control = steering._controls[name]
            assert torch.allclose(control.matrix[index], matrix.float(), rtol=1e-4, atol=1e-5)
            assert torch.allclose(control.values[index], shift.float(), rtol=1e-4, atol=1e-5)


def test_a_fit_that_fails_leaves_controls_as_they_were():
    model = tiny("llama")
    steering = HeadSteering(model)
    steering.add("a", [HEAD], POSITIVE, NEGATIVE, act="last")
    with torch.no_grad(), steering:
        before = adapter(model).last_logits(POSITIVE)
        for beside in (False, True):
            with pytest.raises(ValueError, match="at least two samples"):
                steering.add("a", [HEAD], rows((7,)), NEGATIVE, beside=beside)
        assert torch.equal(adapter(model).last_logits(POSITIVE), before)


def test_where_a_control_acts_is_saved(tmp_path):
    from pyml.heads import delta

    model = tiny("gpt2")
    steering = HeadSteering(model)
    steering.add("a", [HEAD], POSITIVE, NEGATIVE, act="once", strength=2.0)
    with torch.no_grad(), steering:
        logits = adapter(model).last_logits(POSITIVE)
    steering.save(tmp_path / "a.safetensors")
    other = HeadSteering(tiny("gpt2"))
    other.load(tmp_path / "a.safetensors")
    with torch.no_grad(), other:
        assert torch.equal(adapter(other.adapter.model).last_logits(POSITIVE), logits)
    tensors, metadata = delta.read("test", tmp_path / "a.safetensors")
    del metadata["controls"]["a"]["act"]  # a file of before
    delta.write(tmp_path / "old.safetensors", tensors, metadata)
    other.load(tmp_path / "old.safetensors")
    assert other._controls["a"].act == "all"


def test_what_it_cannot_know_is_refused():
    model = tiny("llama")
    for kind in ("heads", "layer"):
        name = {"heads": "HeadSteering", "layer": "LayerSteering"}[kind]
        with pytest.raises(ValueError, match="act: expected one of all, last, once, got 'first'"):
            steering_of(kind, model, "first")
        with torch.no_grad(), steering_of(kind, model, "last") as steering:
            wide = torch.zeros(2, 1, 6, 6, dtype=torch.float64)
            sentence = rf"^{name}: attention_mask: expected shape \[B, T\] where .*, got \[2"
            with pytest.raises(ValueError, match=sentence):
                model(input_ids=BATCHES["none"][0]["input_ids"], attention_mask=wide)
            sentence = f"^{name}: ends: expected a position for each of 2 rows, got"
            with steering.prompt_ends(torch.tensor([1, 2, 3])), pytest.raises(ValueError, match=sentence):
                model(**BATCHES["none"][0])
            one = BATCHES["none"][0]["input_ids"][:, :1]
            model(input_ids=one, attention_mask=wide[:, :, :1, :1])  # one token: there is no choice


@pytest.mark.parametrize("where", [None, lambda x: (torch.tensor([0, 1]), torch.tensor([2, 0]))], ids=["all", "some"])
def test_an_edit_writes_to_no_leaf_that_wants_a_gradient(where):
    """Such is what a reentrant checkpoint calls its modules with, under no_grad."""
    x = torch.randn(2, 3, 4, 6, requires_grad=True)
    before = x.detach().clone()
    with torch.no_grad():
        y = Edit((1,))(x, where)
    assert torch.equal(x, before)
    expected = before.clone()
    index = (slice(None), slice(None)) if where is None else where(x)
    expected[(*index, 1)] = 0
    assert torch.equal(y, expected)
