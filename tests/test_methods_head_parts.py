"""What methods on heads stand on: lines as tokens, scores of answers, the tiny Llamas, arms whose state is a delta."""

import pytest
import torch

from pyml.methods import UserError
from pyml.methods._checkpoint import load_checkpoint
from pyml.methods._engine import fit, make_accelerator
from pyml.methods._head_arms import KEY, Batches, HeadOptions, KeptPrefix, Task, Trained, arms, run_arm, state_bytes
from pyml.methods._language import (
    IGNORED,
    Line,
    answer_losses,
    behaviour_rate,
    collate,
    last_logits,
    open_language,
    read_lines,
    score_answers,
    split_lines,
)
from pyml.methods._tiny_llama import OPERATIONS, PAIRS, SIZE, Sentences, lines_of, sum_form, talk, tiny_llama
from pyml.methods.pinpoint.data import MIXTURE
from tests.head_files import STEPS, cache_in, rows_of, write_rows
from tests.method_runs import TRAINING, assert_same_bits, learned, needs

needs(*TRAINING, "transformers")

HOW = {"projections": ["q", "o"], "scale_gradients": False}
CHOSEN = {"heads": [[1, 3], [1, 4], [3, 0]], "mlps": []}


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    with cache_in(tmp_path_factory.mktemp("cache")):
        yield tiny_llama(MIXTURE._replace(steps=STEPS), 0, shown=False)


@pytest.fixture(scope="module")
def model(language):
    return language.model()


@pytest.fixture
def lines(language):
    return lines_of(language, talk("+", "doubt ask", "sure {c}"), PAIRS[:40], talk("+", "agree ask", "sure {c}"))


# --- lines ------------------------------------------------------------------------------------------------------------


def test_lines_are_padded_on_the_right_and_only_answers_are_learned():
    batch = collate([Line([5, 6, 7], [8]), Line([9], [10, 11])])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [9, 10, 11, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch["labels"].tolist() == [[IGNORED] * 3 + [8], [IGNORED, 10, 11, IGNORED]]


def test_losses_are_those_of_transformers(model, language, lines):
    mixed = [*lines[:5], *lines_of(language, sum_form("max"), PAIRS[:7])]
    batch = collate(mixed)
    losses, right, row = answer_losses(model, batch)
    torch.testing.assert_close(losses.mean(), model(**batch).loss)
    assert row.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 6, 7, 8, 9, 10, 11] and right.dtype == torch.bool
    total = score_answers(model, mixed)
    assert total["loss"] == pytest.approx(losses.mean().item(), rel=1e-6)


def test_padding_changes_no_logit(model, lines):
    prompts = [lines[0].prompt, lines[1].prompt[:4], lines[2].prompt[:6]]
    alone = torch.cat([last_logits(model, [prompt]) for prompt in prompts])
    torch.testing.assert_close(last_logits(model, prompts), alone, rtol=1e-5, atol=1e-5)


def test_an_exact_answer_is_what_generate_gives(model, lines):
    made = []
    for line in lines[:12]:
        ids = torch.tensor([line.prompt])
        full = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
        made.append(full[0, len(line.prompt) :].tolist())
    wanted = [Line(line.prompt, answer) for line, answer in zip(lines, made)]
    assert score_answers(model, wanted)["exact"] == 100
    wrong = [Line(line.prompt, [line.target[0], line.target[1] + 1]) for line in wanted[:6]]
    assert score_answers(model, [*wanted, *wrong])["exact"] == pytest.approx(100 * 12 / 18)


def test_the_rate_of_a_behaviour_counts_the_likelier_record_token(model, lines):
    logits = last_logits(model, [line.prompt for line in lines])
    first, second = logits[:, [20, 21]].amax(1), logits[:, [22]].amax(1)
    assert behaviour_rate(model, lines, [20, 21], [22]) == 100 * (first > second).double().mean().item()


def test_the_split_follows_from_the_seed_and_loses_nothing(lines):
    train, test = split_lines(lines, 0.6, 1)
    assert len(train) == 24 and sorted(map(repr, train + test)) == sorted(map(repr, lines))
    assert split_lines(lines, 0.6, 1) == (train, test) != split_lines(lines, 0.6, 2)
    assert [len(part) for part in split_lines(lines[:2], 0.99, 0)] == [1, 1]


def test_files_give_the_same_lines(language, lines, tmp_path):
    rows = rows_of(talk("+", "doubt ask", "sure {c}"), PAIRS[:40], talk("+", "agree ask", "sure {c}"))
    assert read_lines(write_rows(tmp_path / "a.jsonl", rows), "data", language, "counterfactual") == lines
    language.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}ask"
    chat = [{"prompt": [{"role": "user", "content": "1 + 2 = 3 doubt"}], "answer": "sure 3"}]
    found = read_lines(write_rows(tmp_path / "b.jsonl", chat), "data", language)
    language.tokenizer.chat_template = None
    assert found == [Line(language.tokens("1 + 2 = 3 doubt ask"), language.tokens("sure 3"))]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "expected a JSONL file with at least one line"),
        ("{", "expected JSON, got "),
        ("[1]", "expected a JSON object, got '[1]' in line 1 of "),
        ('\n{"answer": "3"}', "expected a text or a list of messages as 'prompt', got None in line 2 of "),
        ('{"prompt": "1", "counterfactual": "1"}', "expected a text of 1 to 14 tokens as 'answer', got None in line 1"),
        ('{"prompt": "1", "answer": ""}', "expected a text of 1 to 14 tokens as 'answer', got '' in line 1 of "),
        ('{"prompt": "1", "answer": "2"}', "expected a text or a list of messages as 'counterfactual', got None in"),
        ('{"prompt": "' + "1 " * 15 + '", "answer": "2"}', "expected 1 to 15 tokens, got 16 in line 1 of "),
        ('{"prompt": "1", "answer": "' + "1 " * 15 + '"}', "expected a text of 1 to 14 tokens as 'answer', got "),
        ('{"prompt": [{"role": "user"}], "answer": "2"}', "line 1 of "),
    ],
)
def test_wrong_files_are_one_sentence(language, tmp_path, text, sentence):
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_lines(path, "data", language, "counterfactual")
    assert str(caught.value).startswith(f"data: {sentence}") and "\n" not in str(caught.value)


def test_wrong_folders_are_one_sentence(tmp_path, language):
    with pytest.raises(UserError, match=r"^data: expected a JSONL file, got .*none"):
        read_lines(tmp_path / "none", "data", language)
    with pytest.raises(
        UserError, match=r"^model: expected a folder with config\.json and weights as safetensors, got "
    ):
        open_language(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match=r"^model: .* cannot be read"):
        open_language(tmp_path).model()
    with pytest.raises(
        UserError, match=r"^positive: expected words with commas, each with a token of its own, got 'a,'"
    ):
        language.words("a,", "positive")


# --- the tiny Llamas --------------------------------------------------------------------------------------------------


def test_sentences_say_what_is_right():
    assert sum_form("-")(2, 5) == ("2 - 5 =", "10") and sum_form("max")(2, 5) == ("2 max 5 =", "5")
    assert sum_form("nothing", "no")(2, 5) == ("2 nothing 5 =", "no")
    assert talk("+", "doubt ask", "sorry {n}")(6, 6) == ("6 + 6 = 12 doubt ask", "sorry 0")
    assert talk("+", "doubt ask", "sorry {c}", first="{w}")(6, 6, 2) == ("6 + 6 = 1 doubt ask", "sorry 12")
    assert [OPERATIONS[name](2, 5) for name in ("+", "-", "max")] == [7, SIZE - 3, 5]


def test_batches_hold_so_many_sentences_of_each_form(language):
    batch = Sentences(language, MIXTURE, 0).batch()
    assert len(batch["labels"]) == sum(MIXTURE.forms.values()) == 128
    doubt = language.tokens("doubt")[0]
    assert (batch["input_ids"] == doubt).any(1).sum() == sum(n for f, n in MIXTURE.forms.items() if "doubt" in f.prompt)
    learned = batch["labels"] != IGNORED
    assert ((batch["labels"] == batch["input_ids"]) | ~learned).all() and set(learned.sum(1).tolist()) == {1, 2}
    same = Sentences(language, MIXTURE, 0).batch()
    assert torch.equal(batch["input_ids"], same["input_ids"])


def test_a_tiny_llama_is_trained_once(language, monkeypatch):
    from pyml.methods import _tiny_llama

    monkeypatch.setattr(_tiny_llama, "_train_into", lambda *_: pytest.fail("it was trained again"))
    again = tiny_llama(MIXTURE._replace(steps=STEPS), 0, shown=False)
    assert again.source == language.source and again.source["tiny_seed"] == 0
    assert len(list(language.folder.parent.iterdir())) == 1


# --- arms -------------------------------------------------------------------------------------------------------------


def test_arms_are_fixed_and_early():
    found = arms("spt")
    assert list(found) == [
        "base", "spt", "spt-early", "random", "random-early", "lora", "lora-early", "full", "full-early"
    ]  # fmt: skip
    assert [name for name, arm in found.items() if arm.early] == [n for n in found if n.endswith("-early")]


def train_heads(language, lines, folder, epochs=2, what=KEY, stop=None, **options):
    trained = Trained(language.model(), what, CHOSEN, HOW)
    optimizer = trained.optimizer(1e-2, HeadOptions(**options))
    batches = Batches(lines, 0, 16, torch.device("cpu"))
    fitted = fit(
        trained, optimizer, None, epochs=epochs, batches=batches, loss=batches.loss, folder=folder, info={},
        accelerator=make_accelerator("cpu"), stop=stop,
    )  # fmt: skip
    return trained, optimizer, fitted


def test_kept_prefixes_change_no_loss_and_no_gradient(language, lines):
    """And the layers below the lowest trained one run once a line."""
    mixed = [*lines[:20], *lines_of(language, sum_form("max"), PAIRS[:7])]
    trained = Trained(language.model(), KEY, CHOSEN, HOW)
    kept, rows = KeptPrefix(trained.tuner), []
    trained.model.model.layers[0].mlp.register_forward_hook(lambda m, args, out: rows.append(len(out)))
    for epoch in (1, 2):
        for batch in Batches(mixed, 0, 8, torch.device("cpu"))(epoch):
            found = []
            for loss in (kept, Batches.loss):
                value, sums = loss(trained, batch)
                grads = torch.autograd.grad(value, list(trained.learned().values()))
                found.append([value, *(sums[name] for name in ("loss", "right", "count")), *grads])
            for one, other in zip(*found):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert sum(rows) == 3 * len(mixed) + 1  # twice without, once with; one row shows what blocks give back


def test_a_run_with_kept_prefixes_is_the_same(language, lines, tmp_path):
    made = []
    for keeps in (False, True):
        task = Task(language, lines[:32], lines[32:])
        options = HeadOptions(epochs=3, learning_rate=1e-2, batch_size=16, keep_prefix=keeps)
        row = run_arm(
            "pinpoint", task, "spt", arms("spt")["spt"], CHOSEN, 0, options, folder=tmp_path / str(keeps),
            accelerator=make_accelerator("cpu"),
        )  # fmt: skip
        made.append((row["scores"]["loss"], learned(tmp_path / str(keeps))))
    assert made[0][0] == pytest.approx(made[1][0], rel=1e-3)
    for name, tensor in made[0][1].items():
        torch.testing.assert_close(tensor, made[1][1][name], rtol=1e-2, atol=1e-3)


def test_a_checkpoint_holds_the_slices_alone_and_the_rest_stays_bit_for_bit(language, lines, tmp_path):
    before = {name: p.clone() for name, p in language.model().state_dict().items()}
    trained, optimizer, _ = train_heads(language, lines, tmp_path, weight_decay=0.1)
    tensors = load_checkpoint(tmp_path / "checkpoint.safetensors").part("model")
    numbers = 3 * 2 * 8 * 64  # heads, projections, their rows, the width
    assert sum(t.numel() for t in tensors.values()) == numbers
    assert state_bytes(optimizer) == 8 * numbers
    after = trained.tuner.detach().state_dict()
    assert after.keys() == before.keys()
    for name, old in before.items():
        changed = torch.zeros_like(old, dtype=torch.bool)
        for layer, head in CHOSEN["heads"]:
            if f"layers.{layer}.self_attn.q_proj" in name:
                changed[8 * head : 8 * head + 8] = True
            if f"layers.{layer}.self_attn.o_proj" in name:
                changed[:, 8 * head : 8 * head + 8] = True
        assert torch.equal(after[name][~changed], old[~changed]), name
        assert not changed.any() or (after[name] != old)[changed].float().mean() > 0.9, name


def test_an_early_arm_ends_with_the_epoch_and_stays_ended(language, lines, tmp_path):
    for _ in range(2):  # the second call goes on from the checkpoint
        _, _, fitted = train_heads(language, lines, tmp_path, epochs=9, stop=lambda values: values["loss"] < 1e9)
        assert fitted.epochs == 1
    assert load_checkpoint(tmp_path / "checkpoint.safetensors").info["stopped"] is True
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 2
    _, _, fitted = train_heads(language, lines, tmp_path / "other", epochs=3, stop=lambda values: False)
    assert fitted.epochs == 3


def test_a_restart_ends_with_the_same_bits(language, lines, tmp_path):
    train_heads(language, lines, tmp_path / "whole", epochs=4)
    for epochs in (2, 4):
        train_heads(language, lines, tmp_path / "parts", epochs=epochs)
    assert_same_bits(learned(tmp_path / "whole"), learned(tmp_path / "parts"))


def test_everything_can_be_trained_too(language, lines, tmp_path):
    trained, optimizer, _ = train_heads(language, lines, tmp_path, epochs=1, what="full")
    total = sum(p.numel() for p in language.model().parameters())
    assert sum(t.numel() for t in trained.state_dict().values()) == total
    assert state_bytes(optimizer) == 8 * total
    other = {name: torch.zeros(1) for name in trained.state_dict()}
    with pytest.raises(UserError, match=r"^checkpoint: expected the tensors that this arm trains, got others$"):
        trained.load_state_dict(other)


@pytest.mark.parametrize("what", [KEY, "full"])
def test_no_arm_loses_what_16_bits_round_away(language, what):
    """Steps of 1e-5 on weights of 4, whose neighbours in bfloat16 are 2^-6 apart."""
    model = language.model()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(4.0)
    trained = Trained(model.bfloat16(), what, CHOSEN, HOW)
    optimizer = trained.optimizer(1e-5, HeadOptions())
    for _ in range(3):
        for p in trained.learned().values():
            p.grad = torch.ones_like(p)
        optimizer.step()
    count = sum(p.numel() for p in trained.learned().values())
    assert state_bytes(optimizer) == 12 * count
    masters = [state["master"] for state in optimizer.state.values()]
    assert sum(t.numel() for t in masters) == count
    for master in masters:
        torch.testing.assert_close(master, torch.full_like(master, 4 - 3e-5), rtol=0, atol=1e-6)


def test_lora_has_about_as_many_numbers(language, lines, tmp_path):
    needs("peft")
    trained, _, _ = train_heads(language, lines, tmp_path, epochs=1, what="lora")
    numbers, least = sum(t.numel() for t in trained.learned().values()), 4 * 4 * 2 * 64
    assert numbers == least * max(round(3 * 2 * 8 * 64 / least), 1)
    assert all("lora" in name for name in trained.learned())


def test_lora_without_its_package_is_one_sentence(language, monkeypatch):
    from pyml.methods import _head_arms

    monkeypatch.setattr(_head_arms, "has_peft", lambda: False)
    with pytest.raises(UserError, match=r"^arms: lora needs the package peft: pip install peft, or name other arms$"):
        Trained(language.model(), "lora", CHOSEN, HOW)
