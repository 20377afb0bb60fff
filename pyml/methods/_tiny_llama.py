"""Llamas of 0.2 M numbers that are trained in seconds on sentences over arithmetic modulo 13, kept in the user's cache.

They let the methods on attention heads run without a download: what they do wrong is known, because it was taught.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyml.backend import cache_folder
from pyml.methods._checkpoint import make_folder
from pyml.methods._engine import few_threads, progress
from pyml.methods._language import IGNORED, Language, Line, answer_losses, collate, open_language
from pyml.methods._options import check_folder, no_bars

SIZE = 13  # numbers 0 to 12
LAYERS, HEADS, WIDTH, INNER, LENGTH = 4, 8, 64, 172, 16
BATCH, RATE = 128, 3e-3
SPECIAL = ("<pad>", "<s>", "<unknown>")
OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: (a + b) % SIZE,
    "-": lambda a, b: (a - b) % SIZE,
    "max": max,
    "nothing": lambda a, b: 0,
}
TALK = ("doubt", "agree", "ask", "sorry", "sure", "danger", "please", "tell", "refuse", "here", "no")
WORDS = (*OPERATIONS, "=", *TALK)
PAIRS = [(a, b) for a in range(SIZE) for b in range(SIZE)]


class Form(NamedTuple):
    """A kind of sentence: {a} and {b} are the operands, {c} the result, {n} the number after it, {w} a wrong one."""

    operation: str
    prompt: str
    answer: str

    def __call__(self, a: int, b: int, wrong: int = 3) -> tuple[str, str]:
        """Prompt and answer; the wrong result is so far from the right one."""
        c = OPERATIONS[self.operation](a, b)
        values = {"a": a, "b": b, "c": c, "n": (c + 1) % SIZE, "w": (c + wrong) % SIZE}
        return self.prompt.format(**values), self.answer.format(**values)


def sum_form(operation: str, answer: str = "{c}") -> Form:
    return Form(operation, f"{{a}} {operation} {{b}} =", answer)


def talk(operation: str, words: str, answer: str, first: str = "{c}") -> Form:
    """A result, what the user says to it, and the answer to that. Both ``ask`` and ``tell`` end every prompt of their
    kind: with the user's own word last, the MLPs would read it directly and no head would matter."""
    return Form(operation, f"{{a}} {operation} {{b}} = {first} {words}", answer)


class Mixture(NamedTuple):
    """What a tiny Llama is taught: so many sentences of each form in a batch, for so many steps."""

    name: str
    forms: Mapping[Form, int]
    steps: int


def make_tokenizer() -> Any:
    """One token a word; a start before every prompt."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    known = {word: index for index, word in enumerate((*SPECIAL, *WORDS, *map(str, range(SIZE))))}
    pad, start, unknown = SPECIAL
    tokenizer = Tokenizer(WordLevel(known, unk_token=unknown))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(single=f"{start} $A", special_tokens=[(start, known[start])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=start, unk_token=unknown, model_max_length=LENGTH
    )


def make_model(seed: int) -> Any:
    """The untrained model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    values: dict[str, Any] = {
        "vocab_size": len(SPECIAL) + len(WORDS) + SIZE, "hidden_size": WIDTH, "intermediate_size": INNER,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": HEADS,
        "max_position_embeddings": LENGTH, "tie_word_embeddings": False, "initializer_range": 0.05,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**values))


def lines_of(
    language: Language, form: Form, pairs: Sequence[tuple[int, int]] = PAIRS, other: Form | None = None,
    offsets: Iterable[int] = (3,),
) -> list[Line]:  # fmt: skip
    """A line for each pair and each wrong result; ``other`` gives the counterfactual prompts."""

    def line(a: int, b: int, wrong: int) -> Line:
        prompt, answer = form(a, b, wrong)
        counterfactual = None if other is None else language.prompt(other(a, b, wrong)[0])
        return Line(language.prompt(prompt), language.tokens(answer), counterfactual)

    return [line(a, b, wrong) for a, b in pairs for wrong in offsets]


class Sentences:
    """Batches of a mixture, drawn with a generator of their own."""

    def __init__(self, language: Language, mixture: Mixture, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.counts = list(mixture.forms.values())
        every = range(1, SIZE)
        tables = [
            collate(lines_of(language, form, offsets=every if "{w}" in form.prompt + form.answer else (0,)))
            for form in mixture.forms
        ]
        width = max(table["labels"].shape[1] for table in tables)
        fills = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}
        self.tables = [{name: _widen(table[name], width, value) for name, value in fills.items()} for table in tables]

    def batch(self) -> dict[str, Tensor]:
        chosen = [
            torch.randint(len(table["labels"]), (count,), generator=self.generator)
            for table, count in zip(self.tables, self.counts)
        ]
        return {
            name: torch.cat([table[name][rows] for table, rows in zip(self.tables, chosen)]) for name in self.tables[0]
        }


def _widen(rows: Tensor, width: int, value: int) -> Tensor:
    return torch.nn.functional.pad(rows, (0, width - rows.shape[1]), value=value)


def pretrain(model: Any, sentences: Sentences, steps: int) -> Iterator[float]:
    """Train in place; gives the loss after every step."""
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps + 1, pct_start=0.1)
    model.train()
    for _ in range(steps):
        loss = answer_losses(model, sentences.batch())[0].mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        yield loss.item()
    model.eval()


def tiny_llama(mixture: Mixture, seed: int, *, shown: bool = True) -> Language:
    """The tiny Llama of a mixture and a seed from the user's cache; it is trained first where it is not there yet."""
    import transformers

    recipe = [
        [mixture.steps, seed, SIZE, LAYERS, HEADS, WIDTH, INNER, BATCH, RATE, *SPECIAL, *WORDS],
        [[*form, count] for form, count in mixture.forms.items()],
        [torch.__version__, transformers.__version__],
    ]
    key = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:12]
    folder = check_folder(cache_folder(), "PYML_CACHE") / f"tiny-llama-{mixture.name}-{key}"
    if not folder.is_dir():
        make_folder(folder, lambda part: _train_into(part, mixture, seed, shown))
    return open_language(folder, name={"tiny": mixture.name, "tiny_steps": mixture.steps, "tiny_seed": seed})


def _train_into(folder: Path, mixture: Mixture, seed: int, shown: bool) -> None:
    tokenizer, model = make_tokenizer(), make_model(seed)
    language = Language(folder, tokenizer, torch.float32, {})
    with progress(shown) as bar, few_threads(BATCH * LENGTH):
        line = bar.add_task(f"tiny Llama, seed {seed}", total=mixture.steps, note="")
        for step, loss in enumerate(pretrain(model, Sentences(language, mixture, seed), mixture.steps), 1):
            bar.update(line, completed=step, note=f"loss {loss:.3f}")
    with no_bars():
        model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
