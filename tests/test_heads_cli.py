"""``pyml heads``: score, knockout, tune, merge and steer on a model directory."""

import json
import subprocess
import sys

import pytest
import torch

from pyml.heads import adapter, merge, path_patch
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


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["score", "{folder}/none", "{data}", "--positive", "yes"], "model: expected a folder with config.json"),
        (["score", "{model}", "{folder}/none", "--positive", "yes"], "data: {folder}/none cannot be read"),
        (["score", "{model}", "{data}", "--positive", "the cat"], "positive: expected words of one token"),
        (["score", "{model}", "{data}", "--positive", "#99"], "metric: expected tokens in 0..60"),
        (["score", "{model}", "{data}", "--positive", "yes", "--difference", "x"], "difference: expected one of"),
        (["knockout", "{model}", "{data}", "--positive", "yes"], "heads: expected --heads or --scores"),
        (["knockout", "{model}", "{data}", "--positive", "yes", "--heads", "1"], "heads: expected LAYER.HEAD"),
        (["knockout", "{model}", "{data}", "--positive", "yes", "--heads", "9.0"], "heads: expected layers in 0..2"),
        (["tune", "{model}", "{data}", "--heads", "1.0"], "line 1: expected the keys prompt, answer, got no prompt"),
        (["merge", "{model}", "{data}", "--out", "{folder}/m"], "path: expected a delta that HeadTuner.save wrote"),
    ],
)
def test_wrong_arguments_are_one_sentence(run, folder, options, sentence):
    data = lines(folder / "pairs.jsonl", PAIRS)
    names = {"folder": folder, "model": folder / "model", "data": data}
    code, _, err = run("heads", *(str(option).format(**names) for option in options), "--device", "cpu")
    assert code == 1
    assert sentence.format(**names) in err and err.count("\n") == 1 and "Traceback" not in err


def test_nothing_is_imported_for_other_commands():
    code = "import sys; from pyml import cli; cli.main(['--version']); print('pyml.heads' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert found.stdout.splitlines()[-1] == "False"
