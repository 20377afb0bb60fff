"""``pyml heads``: score, knockout, tune, merge and steer on a model directory."""

import json
import subprocess
import sys

import pytest
import torch

from pyml.heads import HeadSteering, HeadTuner, adapter, delta, merge, path_patch
from pyml.heads.files import Prefixes, training_batches
from pyml.methods._options import no_bars
from tests.heads_models import tiny

WORDS = ["[PAD]", "[UNK]", "the", "cat", "dog", "sat", "ran", "yes", "no", "sure"]


@pytest.fixture
def folder(tmp_path):
    """A model directory with a tokenizer of a few words."""
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        tmp_path / "model"
    )
    with no_bars():
        tiny("llama-gqa", torch.float32).save_pretrained(tmp_path / "model")
    return tmp_path


def lines(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


PAIRS = [
    {"clean": "the cat sat", "counterfactual": "the dog sat"},
    {"clean": "the dog ran ran", "counterfactual": [2, 3, 6, 6]},
]


def test_score_and_knockout(run, folder):
    data, scores = lines(folder / "pairs.jsonl", PAIRS), folder / "scores.json"
    code, out, err = run(
        "heads", "score", folder / "model", data, "--positive", "yes", "--negative", "no,#9", "--mlps", "--difference",
        "plain", "--out", scores, "--top", 2, "--device", "cpu",
    )  # fmt: skip
    assert code == 0, err
    found = json.loads(scores.read_text())
    clean = {"input_ids": torch.tensor([[0, 2, 3, 5], [2, 4, 6, 6]]),
             "attention_mask": torch.tensor([[0, 1, 1, 1], [1] * 4])}  # fmt: skip
    other = {**clean, "input_ids": torch.tensor([[0, 2, 4, 5], [2, 3, 6, 6]])}
    model = tiny("llama-gqa", torch.float32)
    expected = path_patch(model, clean, other, ([7], [8, 9]), mlps=True, difference="plain")
    assert torch.allclose(torch.tensor(found["heads"]), expected.heads, atol=1e-5)
    assert torch.allclose(torch.tensor(found["mlps"]), expected.mlps, atol=1e-5)
    layer, head = divmod(int(expected.heads.argmin()), 4)
    assert out.splitlines()[1].startswith(f"  head {layer}.{head}: {float(expected.heads.min()):+.3g}"[:-1])
    curves = folder / "curves.json"
    code, out, err = run(
        "heads", "knockout", folder / "model", data, "--positive", "yes", "--scores", scores, "--top", 3, "--mode",
        "mean", "--out", curves, "--device", "cpu",
    )  # fmt: skip
    assert code == 0, err
    found = json.loads(curves.read_text())
    assert found["heads"][0] == [layer, head] and found["curves"]["chosen"]["counts"] == [0, 1, 2, 3]
    logits = adapter(model).last_logits(clean)
    assert found["curves"]["chosen"]["values"][0] == pytest.approx(float(logits[:, 7].mean().detach()), rel=1e-4)
    assert set(found["curves"]) == {"chosen", "random 0"}


def test_tune_merge_and_steer(run, folder):
    data = lines(folder / "train.jsonl", [
        {"prompt": "the cat sat", "answer": "yes"}, {"prompt": "the dog ran", "answer": [8, 9]},
    ])  # fmt: skip
    delta = folder / "delta.safetensors"
    code, out, err = run(
        "heads", "tune", folder / "model", data, "--heads", "1.0,2.3", "--projections", "q,k,v,o", "--steps", 12,
        "--learning-rate", 0.02, "--out", delta, "--device", "cpu",
    )  # fmt: skip
    assert code == 0, err
    assert "2 of 12 heads" in out and "these heads change too: [(1, 1), (2, 2)]" in out
    first, last = out.splitlines()[-1].split("loss ")[1].split(";")[0].split(" to ")
    assert float(last) < 0.8 * float(first)
    code, out, err = run("heads", "merge", folder / "model", delta, "--out", folder / "merged")
    assert code == 0, err
    from transformers import AutoModelForCausalLM, AutoTokenizer

    merged = AutoModelForCausalLM.from_pretrained(folder / "merged")
    ids = torch.tensor([[2, 3, 5]])
    expected = merge(tiny("llama-gqa", torch.float32), delta)(ids).logits
    assert torch.allclose(merged(ids).logits, expected, atol=1e-5)
    assert (expected - tiny("llama-gqa", torch.float32)(ids).logits).abs().max() > 1e-2
    assert AutoTokenizer.from_pretrained(folder / "merged")("cat")["input_ids"] == [3]
    sides = [
        lines(folder / f"{name}.jsonl", [{"prompt": f"the {a} {b}"} for a in ("cat", "dog") for b in verbs])
        for name, verbs in (("positive", ("sat", "yes")), ("negative", ("ran", "no")))
    ]
    code, out, err = run(
        "heads", "steer", folder / "model", "--positive", sides[0], "--negative", sides[1], "--prompt", "#2,#3",
        "--heads", "0.0,1.1", "--strength", 20, "--tokens", 4, "--out", folder / "control.safetensors", "--device",
        "cpu",
    )  # fmt: skip
    assert code == 0, err
    without, with_ = (line.split(":", 1)[1].split() for line in out.splitlines())
    assert len(without) == 4 and without != with_ and (folder / "control.safetensors").is_file()
    given = torch.tensor([[2, 3]])
    plain = tiny("llama-gqa", torch.float32).generate(given, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert without == [f"#{i}" for i in plain[0, 2:].tolist()]
    more = ["--act", "last", "--map", "direction", "--kept", sides[1], "--heads", "0.0,1.1", "--tokens", 1]
    options = ["--positive", sides[0], "--negative", sides[1], "--prompt", "#2,#3", "--device", "cpu"]
    code, _, err = run("heads", "steer", folder / "model", *options, *more, "--out", folder / "other.safetensors")
    assert code == 0, err
    steering, expected = (HeadSteering(tiny("llama-gqa", torch.float32)) for _ in range(2))
    steering.load(folder / "other.safetensors")
    good, bad = ({"input_ids": torch.tensor([[2, a, b] for a in (3, 4) for b in verbs])} for verbs in ((5, 7), (6, 8)))
    expected.add("control", [(0, 0), (1, 1)], good, bad, map="direction", kept=bad, act="last")
    assert steering._controls["control"].act == "last"
    torch.testing.assert_close(steering._controls["control"].matrix, expected._controls["control"].matrix)
    code, _, err = run("heads", "steer", folder / "model", *options, "--kept", sides[1], "--heads", "0.0")
    assert code == 1 and 'kept: expected map="direction" beside it, got gaussian' in err


def test_tune_by_rules_with_mlps_and_a_kept_prefix(run, folder):
    data = lines(folder / "train.jsonl", [
        {"prompt": "the cat sat", "answer": "yes"}, {"prompt": "the dog", "answer": [8, 9]},
        {"prompt": "the dog sat ran", "answer": "no"},
    ])  # fmt: skip
    scores = folder / "scores.json"
    values = [[0.1, 0.2, 0.3, 0.4], [-0.3, 0.0, -0.2, 0.5], [0.0, -0.04, 0.1, -0.1]]
    scores.write_text(json.dumps({"heads": values, "mlps": [0.0, -0.25, -0.15]}))

    def tune(*options):
        out = folder / f"{len(list(folder.iterdir()))}.safetensors"
        code, told, err = run(
            "heads", "tune", folder / "model", data, *options, "--steps", 6, "--batch", 2, "--learning-rate", 0.02,
            "--out", out, "--device", "cpu",
        )  # fmt: skip
        assert code == 0, err
        return delta.read("test", out), told

    (_, facts), _ = tune("--scores", scores, "--threshold", -0.05)
    assert facts["heads"] == {"q": [[1, 0], [1, 2], [2, 3]], "o": [[1, 0], [1, 2], [2, 3]]} and facts["mlps"] == []
    (_, facts), told = tune("--scores", scores, "--share", 0.2, "--mlps", "2,1")
    assert facts["heads"]["q"] == [[1, 0], [1, 2]] and facts["mlps"] == [1, 2]
    assert "chose 2 of 12 heads" in told and "2 of 12 heads and 2 MLPs" in told
    for rule, heads, mlps in (
        (("--top", 3), [[1, 0], [1, 2]], [1]),
        (("--threshold", -0.12), [[1, 0], [1, 2]], [1, 2]),
        (("--share", 0.14), [[1, 0]], [1]),  # 2 of 15 parts
    ):
        (_, facts), _ = tune("--scores", scores, *rule, "--mlps", "scored")
        assert (facts["heads"]["q"], facts["mlps"]) == (heads, mlps), rule
    (values, facts), _ = tune("--mlps", "2")
    assert facts["mlps"] == [2] and all(key.startswith("2.mlp.") for key in values)
    options = ("--heads", "1.0,2.3", "--mlps", "2")
    (plain, facts), told = tune(*options)
    (kept, same), cached = tune(*options, "--keep-prefix")
    assert facts == same and kept.keys() == plain.keys()
    for key, value in plain.items():
        assert torch.allclose(kept[key], value, rtol=0, atol=2e-4), key
    losses = [[line.split()[-1] for line in text.splitlines() if line.startswith("step ")] for text in (told, cached)]
    assert [float(x) for x in losses[0]] == pytest.approx([float(x) for x in losses[1]], abs=2e-3)


def test_tune_in_16_bits_loses_no_small_update(run, folder):
    with no_bars():
        tiny("llama-gqa", torch.bfloat16).save_pretrained(folder / "half")
    data = lines(folder / "train.jsonl", [{"prompt": [2, 3, 5], "answer": [7, 8]}])
    code, out, err = run(
        "heads", "tune", folder / "half", data, "--heads", "1.0,2.3", "--steps", 40, "--learning-rate", 3e-5, "--out",
        folder / "delta", "--device", "cpu",
    )  # fmt: skip
    assert code == 0, err
    assert "float32 copies" in out
    values, _ = delta.read("test", folder / "delta")
    before = HeadTuner(tiny("llama-gqa", torch.bfloat16), [(1, 0), (2, 3)], verbose=False).delta()
    moved = torch.cat([(values[key] != before[key]).flatten() for key in values])
    assert values["1.q.0"].dtype == torch.bfloat16 and float(moved.double().mean()) > 0.4


def test_a_prefix_is_made_once_a_line():
    tuner = HeadTuner(tiny("llama", torch.float32), [(1, 0)], verbose=False)
    ran = []
    tuner.adapter.layers[0].register_forward_hook(lambda m, args, out: ran.append(len(args[0])))
    kept = Prefixes(tuner)
    data = [([5, 6, 7], 1), ([8, 9], 1), ([3, 4, 5, 6, 7], 2)]
    seen = 0
    for _, (numbers, batch) in zip(range(6), training_batches(data, 2, 0)):
        found, expected = kept(numbers, batch), tuner.prefix(batch)
        real = batch["attention_mask"] == 1
        assert found.shape == expected.shape and torch.allclose(found[real], expected[real], rtol=1e-5, atol=1e-6)
        loss, whole = (tuner.loss(batch, prefix=prefix).item() for prefix in (found, None))
        assert loss == pytest.approx(whole, rel=1e-5)
        seen += 1
    assert seen == 6 and sorted(kept.kept) == [0, 1, 2]
    ran.clear()
    kept(numbers, batch)
    assert ran == []


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["score", "{folder}/none", "{data}", "--positive", "yes"], "model: expected a folder with config.json"),
        (["score", "{model}", "{folder}/none", "--positive", "yes"], "data: {folder}/none cannot be read"),
        (["score", "{model}", "{data}", "--positive", "the cat"], "positive: expected words of one token"),
        (["score", "{model}", "{data}", "--positive", "#99"], "positive: expected ids in 0..60, got 99"),
        (["score", "{model}", "{data}", "--positive", "#-1"], "positive: expected ids in 0..60, got -1"),
        (["score", "{model}", "{data}", "--positive", "#7,"], "positive: expected words or #ID with commas, got ''"),
        (
            ["score", "{model}", "{data}", "--positive", "yes", "--out", "{folder}"],
            "out: expected a file, got the fold",
        ),
        (["tune", "{model}", "{data}", "--heads", "1.0", "--out", "{folder}"], "out: expected a file, got the folder"),
        (["merge", "{model}", "{data}", "--out", "{model}"], "out: expected another folder than the model's"),
        (["score", "{model}", "{data}", "--positive", "yes", "--difference", "x"], "difference: expected one of"),
        (["knockout", "{model}", "{data}", "--positive", "yes"], "heads: expected --heads or --scores"),
        (["knockout", "{model}", "{data}", "--positive", "yes", "--heads", "1"], "heads: expected LAYER.HEAD"),
        (
            ["knockout", "{model}", "{data}", "--positive", "yes", "--heads", "1.1", "--top", 3],
            "top: expected no --heads",
        ),
        (["knockout", "{model}", "{data}", "--positive", "yes", "--heads", "9.0"], "heads: expected layers in 0..2"),
        (["tune", "{model}", "{data}", "--heads", "1.0"], "line 1: expected the keys prompt, answer, got no prompt"),
        (["tune", "{model}", "{data}", "--heads", "1.0", "--grad-scale", "x"], "grad-scale: expected a number or"),
        (["tune", "{model}", "{data}", "--mlps", "x"], "mlps: expected layers with commas, or scored, got x"),
        (["tune", "{model}", "{data}", "--heads", "1.0", "--mlps", "scored"], "mlps: expected --scores beside it"),
        (["tune", "{model}", "{data}", "--heads", "1.0", "--share", 0.1], "share: expected --scores beside it"),
        (["tune", "{model}", "{data}", "--scores", "{data}", "--share", 0.1, "--threshold", -0.1], "one of the two"),
        (["tune", "{model}", "{data}", "--mlps", "1", "--share", 0.1], "share: expected --scores beside it"),
        (["tune", "{model}", "{data}", "--scores", "{data}", "--share", 0.1, "--top", 3], "top: expected no --share"),
        (["merge", "{model}", "{data}", "--out", "{folder}/m"], "path: expected a delta that HeadTuner.save wrote"),
    ],
)
def test_wrong_arguments_are_one_sentence(run, folder, options, sentence):
    data = lines(folder / "pairs.jsonl", PAIRS)
    names = {"folder": folder, "model": folder / "model", "data": data}
    code, _, err = run("heads", *(str(option).format(**names) for option in options), "--device", "cpu")
    assert code == 1
    assert sentence.format(**names) in err and err.count("\n") == 1 and "Traceback" not in err


def test_a_model_without_a_tokenizer_is_merged_without_one(run, folder):
    """GPT-2's class makes an empty tokenizer where there is none."""
    with no_bars():
        tiny("gpt2", torch.float32).save_pretrained(folder / "plain")
    texts = lines(folder / "ids.jsonl", [{"prompt": [3, 4], "answer": [5]}])
    made = folder / "delta.safetensors"
    given = ("--heads", "1.0", "--steps", 1, "--out", made, "--overwrite", "--device", "cpu")
    assert run("heads", "tune", folder / "plain", texts, *given)[0] == 0
    code, out, err = run("heads", "merge", folder / "plain", made, "--out", folder / "merged")
    assert code == 0 and "has no tokenizer" in out, err
    assert not list((folder / "merged").glob("*token*"))
    words = lines(folder / "words.jsonl", [{"prompt": "the", "answer": "cat"}])
    code, _, err = run("heads", "tune", folder / "plain", words, *given)
    assert code == 1 and "has no tokenizer for texts" in err and err.count("\n") == 1


def test_a_model_with_nan_harms_no_file(run, folder):
    model = tiny("llama-gqa", torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with no_bars():
        model.save_pretrained(folder / "model")
    kept = folder / "kept"
    kept.write_text("precious")
    data, texts = (
        lines(folder / "pairs.jsonl", PAIRS),
        lines(folder / "texts.jsonl", [{"prompt": "the", "answer": "cat"}]),
    )
    given = ("--out", kept, "--overwrite", "--device", "cpu")
    for options, sentence in (
        (("score", folder / "model", data, "--positive", "yes"), "model: expected finite scores of heads, got"),
        (("tune", folder / "model", texts, "--heads", "1.0"), "loss: expected finite ones, got nan at step 1"),
    ):
        code, _, err = run("heads", *options, *given)
        assert code == 1 and sentence in err and err.count("\n") == 1
    assert kept.read_text() == "precious"


def test_what_is_there_stays_without_overwrite(run, folder):
    """Said before any work: neither the model nor the data need be there."""
    kept, full = folder / "kept", folder / "full"
    kept.write_text("precious")
    full.mkdir()
    (full / "kept").write_text("precious")
    none, model = folder / "none", folder / "model"
    files = ["--positive", none, "--negative", none, "--prompt", "#2"]
    commands = {
        "score": ["score", none, none, "--positive", "yes"], "knockout": ["knockout", none, none, "--positive", "yes"],
        "tune": ["tune", none, none, "--heads", "1.0"], "steer": ["steer", none, *files, "--heads", "1.0"],
        "merge": ["merge", none, none],
    }  # fmt: skip
    for name, command in commands.items():
        out = full if name == "merge" else kept
        kind = "an empty folder, one that is not there" if name == "merge" else "a file that is not there"
        code, _, err = run("heads", *command, "--out", out, "--device", "cpu")
        assert (code, err) == (1, f"error: out: expected {kind}, or --overwrite beside it, got {out}\n")
        code, _, err = run("heads", *command, "--out", out, "--overwrite", "--device", "cpu")
        assert code == 1 and err.startswith("error: model: expected a folder with config.json")
        assert "--overwrite" in run("heads", name, "--help")[1]
    assert kept.read_text() == (full / "kept").read_text() == "precious"
    code, _, err = run("heads", *commands["steer"], "--overwrite", "--device", "cpu")
    assert (code, err) == (1, "error: overwrite: expected --out beside it, got none\n")
    data = lines(folder / "pairs.jsonl", PAIRS)
    given = ("heads", "score", model, data, "--positive", "yes", "--negative", "no", "--device", "cpu", "--out", kept)
    code, _, err = run(*given, "--overwrite")
    assert code == 0, err
    assert json.loads(kept.read_text())["samples"] == 2


def test_attribution_takes_rows_in_batches(run, folder, monkeypatch):
    import pyml.heads

    sizes, inner = [], pyml.heads.attribution_patch

    def noted(model, *args, **options):
        model.model.layers[0].register_forward_hook(lambda m, given, out: sizes.append(len(given[0])))
        return inner(model, *args, **options)

    monkeypatch.setattr(pyml.heads, "attribution_patch", noted)
    data, found = lines(folder / "pairs.jsonl", PAIRS), {}
    for batch in (1, 2):
        out = folder / f"scores{batch}.json"
        code, _, err = run(
            "heads", "score", folder / "model", data, "--positive", "yes", "--attribution", "--difference", "plain",
            "--batch", batch, "--out", out, "--device", "cpu",
        )  # fmt: skip
        assert code == 0, err
        found[batch] = torch.tensor(json.loads(out.read_text())["heads"])
    assert sizes == [1, 1, 1, 1, 2, 2]
    torch.testing.assert_close(found[1], found[2], rtol=1e-4, atol=1e-6)


def test_nothing_is_imported_for_other_commands():
    code = "import sys; from pyml import cli; cli.main(['--version']); print('pyml.heads' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert found.stdout.splitlines()[-1] == "False"
