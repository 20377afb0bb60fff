"""Causal language models in local folders, and prompts with their answers, from JSONL files or made, as tokens."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyml.methods import UserError, first_line
from pyml.methods._engine import epoch_generator
from pyml.methods._options import no_bars

IGNORED = -100  # the label of a token that is not learned
BATCH = 64  # lines a forward pass when nothing is trained
CHUNK = 2**24  # bytes
PROMPT, ANSWER = "prompt", "answer"  # keys of a line
# A context for a forward of prompts with their answers, from where the prompts end, [B]: steering may begin there.
Told = Callable[[Tensor], AbstractContextManager[object]]


@dataclass(frozen=True)
class Line:
    """A prompt, what should follow it and, where there is one, the prompt that does not show the behaviour."""

    prompt: list[int]
    target: list[int]
    counterfactual: list[int] | None = None


@dataclass(frozen=True)
class Language:
    """A folder with a causal LM in safetensors and its tokenizer."""

    folder: Path
    tokenizer: Any
    dtype: torch.dtype
    source: dict[str, Any]  # what identifies it: plain values, kept in config and checkpoint

    def model(self, device: torch.device | str = "cpu", **options: Any) -> Any:
        """The model of the folder, read anew: whatever was done to an earlier one."""
        from transformers import AutoModelForCausalLM

        try:
            with no_bars():
                model: Any = AutoModelForCausalLM.from_pretrained(
                    self.folder, local_files_only=True, use_safetensors=True, **options
                )
        except Exception as error:  # whatever transformers and safetensors raise on files that are broken
            raise UserError(f"model: {self.folder} cannot be read as a causal LM: {first_line(error)}") from error
        return model.to(device, self.dtype).eval()

    @cached_property
    def longest(self) -> int:
        """Tokens that the model has positions for."""
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(self.folder, local_files_only=True)
        return int(getattr(config, "max_position_embeddings", 0) or 2**31)

    def tokens(self, text: str) -> list[int]:
        """Of words that go on with a text: no special token is added."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def prompt(self, value: Any) -> list[int]:
        """Of a text, or of a list of chat messages by the tokenizer's template."""
        if isinstance(value, str):
            return list(self.tokenizer(value)["input_ids"])
        return self.tokens(self.tokenizer.apply_chat_template(value, add_generation_prompt=True, tokenize=False))

    def words(self, text: str, name: str) -> list[int]:
        """The first token of each word of a list with commas, as an answer would begin; ``name`` is of the option."""
        found = [self.tokens(word) for word in text.split(",")]
        if not all(found):
            raise UserError(f"{name}: expected words with commas, each with a token of its own, got {text!r}")
        return list(dict.fromkeys(tokens[0] for tokens in found))


def open_language(folder: Path, dtype: str = "float32", name: dict[str, Any] | None = None) -> Language:
    """Look at the folder of a causal LM and read its tokenizer; nothing is downloaded.

    Args:
        name: what a checkpoint says to find it again; the folder where left out.

    Raises:
        UserError: no such folder, or a part of it is missing or cannot be read.
    """
    from transformers import AutoTokenizer

    weights = sorted(folder.glob("*.safetensors"))
    if not (folder / "config.json").is_file() or not weights:
        raise UserError(f"model: expected a folder with config.json and weights as safetensors, got {folder}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever transformers and tokenizers raise on files that are broken
        raise UserError(f"model: the tokenizer of {folder} cannot be read: {first_line(error)}") from error
    source = {**(name or {"folder": str(folder)}), "fingerprint": fingerprint([folder / "config.json", *weights])}
    return Language(folder, tokenizer, getattr(torch, dtype), {**source, "dtype": dtype})


def fingerprint(paths: Iterable[Path]) -> str:
    """Some digits that other files do not have: heads found in one model say nothing about another."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while part := file.read(CHUNK):
                digest.update(part)
    return digest.hexdigest()[:16]


# --- lines ------------------------------------------------------------------------------------------------------------


def read_rows(path: Path, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSONL file, each with the words that say where it stands; ``name`` is of the option.

    Raises:
        UserError: the file cannot be read, has no line, or a line of it is no JSON object.
    """
    try:
        rows = [row for row in enumerate(path.read_text(encoding="utf-8").splitlines(), 1) if row[1].strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{name}: expected a JSONL file, got {path} ({first_line(error)})") from error
    if not rows:
        raise UserError(f"{name}: expected a JSONL file with at least one line, got {path}")
    for number, row in rows:
        where = f"line {number} of {path}"
        try:
            values = json.loads(row)
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{name}: expected JSON, got {first_line(error)} in {where}") from error
        if not isinstance(values, dict):
            raise UserError(f"{name}: expected a JSON object, got {row[:40]!r} in {where}")
        yield where, values


def read_prompt(language: Language, values: dict[str, Any], key: str, name: str, where: str) -> list[int]:
    """The tokens of a prompt: a text or a list of chat messages."""
    value = values.get(key)
    if not isinstance(value, (str, list)) or not value:
        raise UserError(f"{name}: expected a text or a list of messages as {key!r}, got {value!r} in {where}")
    try:
        tokens = language.prompt(value)
    except Exception as error:  # whatever a chat template raises on messages that are not its own
        raise UserError(f"{name}: {where} does not fit the tokenizer's template: {first_line(error)}") from error
    if not 0 < len(tokens) < language.longest:
        raise UserError(f"{name}: expected 1 to {language.longest - 1} tokens, got {len(tokens)} in {where}")
    return tokens


def read_lines(path: Path, name: str, language: Language, other: str | None = None) -> list[Line]:
    """The lines of a JSONL file: a prompt, an answer and, under the key ``other``, a counterfactual prompt.

    Raises:
        UserError: the file cannot be read, or a line of it is not as described or longer than the model takes.
    """
    lines = []
    for where, values in read_rows(path, name):
        prompt = read_prompt(language, values, PROMPT, name, where)
        answer = values.get(ANSWER)
        target = language.tokens(answer) if isinstance(answer, str) else []
        if not 0 < len(target) <= language.longest - len(prompt):
            raise UserError(
                f"{name}: expected a text of 1 to {language.longest - len(prompt)} tokens as {ANSWER!r}, got "
                f"{answer!r} in {where}"
            )
        counterfactual = None if other is None else read_prompt(language, values, other, name, where)
        lines.append(Line(prompt, target, counterfactual))
    return lines


def split_lines(lines: Sequence[Line], share: float, seed: int) -> tuple[list[Line], list[Line]]:
    """A share to learn from and the rest to be scored on, drawn by the seed; each has at least one line of two."""
    order = torch.randperm(len(lines), generator=epoch_generator(seed, 0)).tolist()
    count = min(max(round(share * len(lines)), 1), len(lines) - 1)
    return [lines[i] for i in order[:count]], [lines[i] for i in order[count:]]


# --- forward passes ---------------------------------------------------------------------------------------------------


def pad(rows: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask`` ``[B, T]``, padded on the right: no real token sees padding."""
    width = max(len(row) for row in rows)
    ids = [[*row, *[0] * (width - len(row))] for row in rows]
    mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
    return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}


def collate(lines: Sequence[Line], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Prompts with their answers, and ``labels`` ``[B, T]``: the answers, `IGNORED` elsewhere."""
    batch = pad([line.prompt + line.target for line in lines], device)
    labels = torch.full_like(batch["input_ids"], IGNORED)
    for row, line in enumerate(lines):
        start = len(line.prompt)
        labels[row, start : start + len(line.target)] = batch["input_ids"][row, start : start + len(line.target)]
    return {**batch, "labels": labels}


def answer_losses(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Of the answers' tokens ``[N]``: cross-entropies, whether each is the likeliest one, and the line it is of."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    return token_losses(logits[:, :-1][is_learned(batch)], batch)


def is_learned(batch: dict[str, Tensor]) -> Tensor:
    """``[B, T - 1]``: after which tokens one of an answer follows."""
    return batch["labels"][:, 1:] != IGNORED


def token_losses(chosen: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The same of the logits ``[N, V]`` at those places."""
    learned = is_learned(batch)
    wanted, chosen = batch["labels"][:, 1:][learned], chosen.float()
    losses = nn.functional.cross_entropy(chosen, wanted, reduction="none")
    return losses, chosen.argmax(1) == wanted, learned.nonzero()[:, 0]


@torch.no_grad()
def score_answers(model: Any, lines: Sequence[Line], told: Told = nullcontext) -> dict[str, float]:
    """``exact``: per cent of lines whose whole answer is what greedy decoding gives; ``loss``: mean over tokens."""
    exact, loss, count = 0, 0.0, 0
    for start in range(0, len(lines), BATCH):
        part = lines[start : start + BATCH]
        with told(torch.tensor([len(line.prompt) - 1 for line in part])):
            losses, right, row = answer_losses(model, collate(part, model.device))
        wrong = torch.zeros(len(part), device=row.device).index_add_(0, row, (~right).float())
        exact += int((wrong == 0).sum())
        loss += losses.double().sum().item()
        count += len(losses)
    return {"exact": 100 * exact / len(lines), "loss": loss / count}


@torch.no_grad()
def last_logits(model: Any, prompts: Sequence[Sequence[int]]) -> Tensor:
    """``[B, V]`` float32 after each prompt, on the CPU."""
    found = []
    for start in range(0, len(prompts), BATCH):
        batch = pad(prompts[start : start + BATCH], model.device)
        logits = model(**batch, use_cache=False).logits
        last = batch["attention_mask"].sum(1) - 1
        found.append(logits[torch.arange(len(last), device=last.device), last].float().cpu())
    return torch.cat(found)


def behaviour_rate(model: Any, lines: Sequence[Line], positive: Sequence[int], negative: Sequence[int]) -> float:
    """Per cent of prompts after which one of the ``positive`` tokens is likelier than every ``negative`` one."""
    logits = last_logits(model, [line.prompt for line in lines])
    shows = logits[:, list(positive)].amax(1) > logits[:, list(negative)].amax(1)
    return 100 * shows.double().mean().item()
