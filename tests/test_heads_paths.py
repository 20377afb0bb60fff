"""Path patching against its per-head loop, on every layout; attribution, knockouts and selection."""

import pytest
import torch

from pyml.heads import (
    PathScores,
    ablate,
    adapter,
    attribution_patch,
    head_means,
    knockout,
    path_patch,
    path_patch_loop,
    random_heads,
    share,
    threshold,
    top_k,
)  # fmt: skip
from tests.heads_models import ALL, SHARED, rows, tiny

METRIC = (5, 9)


def close(found, expected, tolerance=1e-9):
    assert found.shape == expected.shape
    scale = expected.abs().max().clamp(min=1.0)
    assert float((found - expected).abs().max() / scale) < tolerance


@pytest.mark.parametrize("difference", ["plain", "relative"])
@pytest.mark.parametrize("name", ALL)
def test_equal_to_the_loop(name, difference):
    model = tiny(name)
    clean, other = rows((7, 7, 7)), rows((7, 7, 7), seed=2)
    found = path_patch(model, clean, other, METRIC, mlps=True, difference=difference)
    loop = path_patch_loop(model, clean, other, METRIC, mlps=True, difference=difference)
    assert found.heads.shape == (3, 4) and found.mlps.shape == (3,)
    close(found.heads, loop.heads)
    close(found.mlps, loop.mlps)
    close(found.clean, loop.clean)
    assert found.heads.abs().min() > 1e-6 and found.mlps.abs().min() > 1e-6  # every source has an effect


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("name", SHARED)
def test_equal_to_the_loop_with_other_groups_of_keys(name, groups):
    """One key-value head for all, and one for each; the models above have two, Gemma's one."""
    model = tiny(name, num_key_value_heads=groups)
    clean, other = rows((7, 7, 7)), rows((7, 7, 7), seed=2)
    found = path_patch(model, clean, other, METRIC, difference="plain")
    close(found.heads, path_patch_loop(model, clean, other, METRIC, difference="plain").heads)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ALL)
def test_padded_rows_count_at_their_last_real_token(name, side, monkeypatch):
    if name == "gemma2":  # its softmax is in float32, where a row of padding, masked by a float64, becomes NaN
        softmax = torch.nn.functional.softmax
        monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim=dim))
    model = tiny(name)
    clean, other = rows((5, 7, 3), side), rows((6, 4, 7), side, seed=2)
    found = path_patch(model, clean, other, METRIC, mlps=True, difference="plain")
    loop = path_patch_loop(model, clean, other, METRIC, mlps=True, difference="plain")
    close(found.heads, loop.heads)
    close(found.mlps, loop.mlps)
    single = []
    for i, (a, b) in enumerate(zip((5, 7, 3), (6, 4, 7))):  # each row alone, without padding
        parts = [
            {"input_ids": batch["input_ids"][i : i + 1][batch["attention_mask"][i : i + 1] == 1].view(1, n)}
            for batch, n in ((clean, a), (other, b))
        ]
        single.append(path_patch(model, *parts, METRIC, difference="plain").heads)
    close(found.heads, torch.stack(single).mean(0), 1e-6)  # rotary angles and softmax are float32 in some layouts


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_of_gemma2_as_it_comes(side):
    """With its softmax in float32: eager attention, sliding windows, capped scores."""
    model = tiny("gemma2", torch.float32)
    assert model.config._attn_implementation == "eager" and model.config.attn_logit_softcapping
    clean, other = rows((5, 7, 3), side), rows((6, 4, 7), side, seed=2)
    found = path_patch(model, clean, other, METRIC, mlps=True, difference="plain")
    loop = path_patch_loop(model, clean, other, METRIC, mlps=True, difference="plain")
    close(found.heads, loop.heads, 1e-5)
    close(found.mlps, loop.mlps, 1e-5)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "neox"])
def test_a_memory_budget_and_batches_change_nothing(name):
    model = tiny(name)
    clean, other = rows((7, 5, 6)), rows((7, 7, 7), seed=2)
    expected = path_patch(model, clean, other, METRIC, mlps=True)
    for options in ({"budget": 1}, {"budget": 60_000}, {"batch_size": 1}, {"batch_size": 2, "budget": 30_000}):
        found = path_patch(model, clean, other, METRIC, mlps=True, **options)
        close(found.heads, expected.heads)
        close(found.mlps, expected.mlps)


def test_metrics():
    model = tiny("gemma2")
    clean, other = rows(), rows(seed=2)
    run = lambda metric: path_patch(model, clean, other, metric, difference="plain").heads  # noqa: E731
    logits = adapter(model).last_logits(clean).detach()
    whole = model(**clean, use_cache=False).logits[:, -1]
    close(logits, whole.detach(), 1e-12)
    close(run((5, 9)), run(lambda z: z[..., 5] - z[..., 9]))
    close(run(([5, 6], 9)), run(lambda z: z[..., [5, 6]].mean(-1) - z[..., 9]))
    close(run((5, None)), run(lambda z: z[..., 5]))
    answers = torch.tensor([3, 4, 5])
    each = lambda z: z.gather(-1, answers[:, None].expand(*z.shape[:-1], 1)).squeeze(-1)  # noqa: E731
    close(run((answers, None)), run(each))
    close(run((answers, torch.tensor([[7, 8]] * 3))), run(lambda z: each(z) - z[..., [7, 8]].mean(-1)))
    found = path_patch(model, clean, other, (answers, None), difference="plain", batch_size=2)
    close(found.heads, run((answers, None)))


def test_the_relative_score_explodes_near_zero_and_the_plain_one_does_not():
    model = tiny("llama")
    clean, other = rows((7,)), rows((7,), seed=2)
    m0 = float(path_patch(model, clean, other, METRIC).clean)
    near = lambda z: z[..., 5] - z[..., 9] - m0 * (1 - 1e-9)  # noqa: E731
    plain = path_patch(model, clean, other, METRIC, difference="plain").heads
    close(path_patch(model, clean, other, near, difference="plain").heads, plain)
    assert path_patch(model, clean, other, near).heads.abs().max() > 1e6


def test_the_same_prompt_twice_changes_nothing_and_the_model_is_left_as_it_was():
    model = tiny("neox").train()
    model.gpt_neox.layers[1].eval()
    before = [m.training for m in model.modules()]
    scores = path_patch(model, rows(), rows(), METRIC, mlps=True, difference="plain")
    assert scores.heads.abs().max() < 1e-12 and scores.mlps.abs().max() < 1e-12
    assert [m.training for m in model.modules()] == before
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("name", ["llama-gqa", "gemma3", "gpt2", "neox"])
def test_attribution_is_the_slope_of_a_small_patch(name):
    """One backward gives the derivative along the change of each head's output; here by central differences."""
    model = tiny(name)
    a = adapter(model)
    clean, other = rows((5, 7, 6), "left"), rows(seed=2)
    found = attribution_patch(model, clean, other, METRIC, mlps=True, difference="plain")
    seen = {}
    kept = [a.output(1).register_forward_pre_hook(lambda m, args: seen.update(z=args[0][:, -1].detach()))]
    a.hidden(other)
    target = seen["z"]

    def moved(step):
        def patch(module, args):
            z = args[0].clone()
            z[:, -1, : a.head_dim] += step * (target - args[0][:, -1])[:, : a.head_dim]
            return (z,)

        handle = a.output(1).register_forward_pre_hook(patch)
        logits = a.last_logits(clean)
        handle.remove()
        return (logits[:, 5] - logits[:, 9]).mean()

    kept[0].remove()
    with torch.no_grad():
        slope = (moved(1e-4) - moved(-1e-4)) / 2e-4
    assert float(found.heads[1, 0]) == pytest.approx(float(slope), rel=1e-5, abs=1e-9)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "neox"])
@pytest.mark.parametrize("mode", ["zero", "mean"])
def test_ablation_is_a_changed_weight_and_bias(name, mode):
    """A silent head is one without columns in o_proj; one that puts out its mean adds a constant."""
    model = tiny(name)
    a = adapter(model)
    batch, heads = rows((7, 4, 6)), [(2, 1), (0, 3), (0, 0)]
    means = head_means(model, batch, heads) if mode == "mean" else None
    with torch.no_grad(), ablate(model, heads, mode, means=means):
        found = a.last_logits(batch)
    changed = tiny(name)
    b = adapter(changed)
    with torch.no_grad():
        for i, (layer, head) in enumerate(heads):
            o = b.output(layer)
            weight = o.weight if name != "gpt2" else o.weight.t()
            columns = weight[:, head * a.head_dim : (head + 1) * a.head_dim]
            if mode == "mean":
                shift = columns @ means[i]
                if o.bias is None:
                    o.bias = torch.nn.Parameter(torch.zeros(weight.shape[0], dtype=weight.dtype))
                o.bias += shift
            columns.zero_()
        close(found, b.last_logits(batch).detach(), 1e-10)
        assert float((found - tiny_logits(name, batch)).abs().max()) > 1e-3


def tiny_logits(name, batch):
    return adapter(tiny(name)).last_logits(batch)


def test_means_are_over_real_tokens():
    model = tiny("mistral")
    a = adapter(model)
    batch = rows((7, 3))
    seen = []
    handle = a.output(1).register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
    a.hidden(batch)
    handle.remove()
    z = seen[0].unflatten(-1, (4, 6))[:, :, 2]
    expected = torch.cat([z[0, :7], z[1, :3]]).mean(0)
    close(head_means(model, [batch], [(1, 2)])[0], expected, 1e-12)


def test_knockout_curve():
    model = tiny("qwen3")
    batches, heads = [rows((7, 5)), rows((6,), seed=3)], [(1, 2), (0, 1), (2, 3)]
    curve = knockout(model, batches, heads, "zero", METRIC)
    assert curve.counts == [0, 1, 2, 3]
    a = adapter(model)
    for n, value in zip(*curve):
        with torch.no_grad(), ablate(model, heads[:n]):
            logits = torch.cat([a.last_logits(b) for b in batches])
        assert value == pytest.approx(float((logits[:, 5] - logits[:, 9]).mean()), abs=1e-12)
    assert len(set(curve.values)) == 4
    rate = knockout(model, None, heads, evaluate=lambda m: float(m is model), counts=[0, 3])
    assert rate == ([0, 3], [1.0, 1.0])
    means = head_means(model, batches, heads)
    given = knockout(model, batches, heads, "mean", METRIC, means=means, counts=[2])
    for wrong in (torch.cat([means, means[:1]]), means[:1], means[:, :2], means[0], means.long(), means.tolist()):
        with pytest.raises((ValueError, TypeError), match=r"^knockout: means: expected "):
            knockout(model, batches, heads, "mean", METRIC, means=wrong, counts=[0])
    assert given.values == knockout(model, batches, heads, "mean", METRIC, counts=[2]).values != [curve.values[2]]


def test_selection(capsys):
    heads = torch.tensor([[0.1, -0.5, 0.0], [-0.2, 0.3, -0.06]])
    scores = PathScores(heads, torch.tensor([-0.3, 0.9]), torch.ones(2))
    assert top_k(heads, 2) == ([(0, 1), (1, 0)], [])
    assert top_k(heads, 1, largest=True).heads == [(1, 1)]
    assert top_k(scores, 2, mlps=True) == ([(0, 1)], [0])
    assert threshold(scores).heads == [(0, 1), (1, 0), (1, 2)]
    assert threshold(scores, -0.1, mlps=True) == ([(0, 1), (1, 0)], [0])
    assert share(torch.arange(100.0).view(10, 10)).heads == [(0, 0), (0, 1), (0, 2), (0, 3)]  # below 5 %, not at it
    assert "chose 4 of 100 heads (4.0 %)" in capsys.readouterr().out
    assert share(heads, 0.01).heads == [(0, 1)]  # at least one
    drawn = random_heads(2, 3, 3, seed=0, exclude=[(0, 1)])
    assert drawn == random_heads(2, 3, 3, seed=0, exclude=[(0, 1)]) and (0, 1) not in drawn and len(set(drawn)) == 3


CALLS = {
    "model: expected a causal LM": lambda m: path_patch(torch.nn.Linear(2, 2), rows(), rows(), METRIC),
    "clean: expected input_ids in": lambda m: path_patch(m, {"input_ids": torch.tensor([[99]])}, rows(), METRIC),
    "clean: expected a mapping": lambda m: path_patch(m, torch.zeros(2, 2), rows(), METRIC),
    "counterfactual: expected a sample for each": lambda m: path_patch(m, rows(), rows((7, 7)), METRIC),
    "difference: expected one of": lambda m: path_patch(m, rows(), rows(), METRIC, difference="ratio"),
    "metric: expected tokens in": lambda m: path_patch(m, rows(), rows(), (5, 61)),
    r"metric: expected \(positive": lambda m: path_patch(m, rows(), rows(), 5),
    "metric: expected int64 tokens": lambda m: path_patch(m, rows(), rows(), (torch.tensor([1, 2]), None)),
    "metric: expected values of shape": lambda m: path_patch(m, rows(), rows(), lambda z: z[..., :2]),
    "budget: expected a positive": lambda m: path_patch(m, rows(), rows(), METRIC, budget=0),
    "a row of zeros": lambda m: path_patch(
        m, {**rows(), "attention_mask": torch.zeros(3, 7)}, rows(), METRIC
    ),
    "heads: expected layers in": lambda m: knockout(m, rows(), [(3, 0)], "zero", METRIC),
    "heads: expected heads that differ": lambda m: knockout(m, rows(), [(0, 0), (0, 0)], "zero", METRIC),
    "heads: expected a bool mask": lambda m: knockout(m, rows(), torch.ones(3, 3, dtype=torch.bool), "zero", METRIC),
    "mode: expected one of": lambda m: knockout(m, rows(), [(0, 0)], "median", METRIC),
    "metric: expected a metric or": lambda m: knockout(m, rows(), [(0, 0)]),
    "k: expected an integer": lambda m: top_k(torch.zeros(2, 2), 5),
    "scores: expected finite": lambda m: top_k(torch.full((2, 2), float("nan")), 1),
    "scores: expected finite .* got -inf": lambda m: share(torch.tensor([[0.0, float("-inf")]]), 0.5),
    "scores: expected finite .* got inf": lambda m: threshold(torch.tensor([[float("inf"), -1.0]])),
}  # fmt: skip


@pytest.mark.parametrize("sentence", CALLS)
def test_bad_arguments_get_one_sentence(sentence):
    with pytest.raises((ValueError, TypeError), match=sentence) as caught:
        CALLS[sentence](tiny("llama"))
    assert "\n" not in str(caught.value)


def test_other_layouts_are_refused():
    import transformers

    config = transformers.OPTConfig(
        vocab_size=20, hidden_size=8, ffn_dim=8, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=8
    )
    with pytest.raises(
        ValueError, match=r"model: expected a causal LM with lm_head of one of the layouts llama, .*opt"
    ):
        adapter(transformers.OPTForCausalLM(config))


def test_the_head_of_older_versions_is_found():
    """GPT-NeoX calls it embed_out in versions of transformers before 5.14."""
    import transformers

    class Older(transformers.GPTNeoXForCausalLM):
        _tied_weights_keys: dict = {}  # noqa: RUF012

        def __init__(self, config):
            super().__init__(config)
            self.embed_out = self.lm_head
            del self.lm_head

    model = tiny("neox")
    older = Older(model.config).double().eval()
    older.load_state_dict({k.replace("lm_head", "embed_out"): v for k, v in model.state_dict().items()})
    close(adapter(older).last_logits(rows()).detach(), tiny_logits("neox", rows()).detach(), 1e-12)
    close(path_patch(older, rows(), rows(seed=2), METRIC).heads, path_patch(model, rows(), rows(seed=2), METRIC).heads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_close_logits_of_16_bits_are_told_apart(name, dtype):
    """Both record tokens have logits of about 30, where neighbours in bfloat16 are 1/8 apart; m0 is about 0.01."""
    model = tiny(name, dtype)
    a = adapter(model)
    with torch.no_grad():
        if name != "gemma2":  # whose logits end at 3
            model.lm_head.weight[5].mul_(2)
        model.lm_head.weight[9] = model.lm_head.weight[5]
        model.lm_head.weight[9, 0] += 2.0**-6
    found = path_patch(model, rows(), rows(seed=2), METRIC, difference="plain")
    with torch.no_grad():
        batch = a.batch("test", rows())
        last = a.hidden(batch)[:, -1].double()
    logits = last @ model.lm_head.weight[[5, 9]].double().t()
    logits = 3 * torch.tanh(logits / 3) if name == "gemma2" else logits
    assert found.clean.dtype == found.heads.dtype == torch.float32
    expected = logits[:, 0] - logits[:, 1]
    assert torch.allclose(found.clean.double(), expected, rtol=1e-3, atol=1e-6)
    loop = path_patch_loop(model, rows(), rows(seed=2), METRIC, difference="plain")
    assert torch.equal(loop.clean, found.clean)
    each = torch.tensor([[5], [5], [5]])
    per_sample = path_patch(model, rows(), rows(seed=2), (each, torch.tensor([[9]] * 3)), difference="plain")
    assert torch.allclose(per_sample.clean, found.clean, rtol=1e-4, atol=1e-6)
    slopes = attribution_patch(model, rows(), rows(seed=2), METRIC, difference="plain")
    assert slopes.heads.dtype == torch.float32 and slopes.heads.isfinite().all()


@pytest.mark.parametrize("tokens", [[5, 9], [[5, 9], [6, 3], [7, 4]]])
def test_record_logits_are_whole_under_autocast(tokens):
    a = adapter(tiny("llama", torch.float32))
    hidden, tokens = torch.randn(3, 24), torch.tensor(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        found = a.logits(hidden, tokens)
    assert found.dtype == torch.float32
    expected = a.logits(hidden).gather(1, tokens.expand(3, 2))
    close(found.detach(), expected.detach(), 1e-6)


def test_projections_of_other_packages_are_refused():
    class Adapted(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.weight = base, base.weight

    model = tiny("llama")
    model.model.layers[1].self_attn.o_proj = Adapted(model.model.layers[1].self_attn.o_proj)
    with pytest.raises(ValueError, match=r"model: expected plain linear projections .* got Adapted at layer 1"):
        adapter(model)
    model = tiny("llama")
    model.model.layers[2].self_attn.q_proj.weight = torch.nn.Parameter(torch.zeros(24, 24).char(), False)
    with pytest.raises(ValueError, match=r"model: expected floating weights, not quantised ones, got torch\.int8"):
        adapter(model)


def test_two_forwards_are_run_and_not_one_a_head():
    model = tiny("llama")
    a = adapter(model)
    counted = {"attention": 0, "mlp": 0}
    for layer in range(a.num_layers):
        for name in counted:
            add = lambda *_, name=name: counted.__setitem__(name, counted[name] + 1)  # noqa: E731
            getattr(a, name)(layer).register_forward_hook(add)
    path_patch(model, rows(), rows(seed=2), METRIC)
    assert counted == {"attention": 2 * 3, "mlp": 2 * 3 + 3}  # and each layer's MLP once, for all sources together
