"""Model directories and JSONL files for `pyml heads`: prompts become padded batches of token ids."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pyml.heads.selection import PathScores
from pyml.methods import UserError, first_line
from pyml.methods._options import no_bars

TOKENIZERS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
)


class Model:
    """A causal LM of a local directory, and its tokenizer where a text asks for one."""

    def __init__(self, folder: Path, device: str) -> None:
        self.folder, self.device = folder, device
        if not (folder / "config.json").is_file():
            raise UserError(f"model: expected a folder with config.json, got {folder}")
        from safetensors import SafetensorError
        from transformers import AutoModelForCausalLM

        try:
            with no_bars():
                found: Any = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise UserError(f"model: {folder} cannot be loaded: {first_line(error)}") from error
        self.lm: Any = found.to(device).eval()
        self._tokenizer: Any = None
        self.vocabulary = int(found.get_input_embeddings().num_embeddings)
        # GPT-2 has learned positions, and none beyond them; rotary ones go on.
        self.longest = found.config.n_positions if found.config.model_type == "gpt2" else None

    @property
    def tokenizer(self) -> Any:
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            try:
                if not any((self.folder / name).is_file() for name in TOKENIZERS):  # or transformers makes an empty one
                    raise OSError("no file of one")
                self._tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                message = f"{self.folder} has no tokenizer for texts ({first_line(error)}): give lists of token ids"
                raise UserError(f"model: {message}") from error
        return self._tokenizer

    def ids(self, text: Any, where: str, special: bool = True) -> list[int]:
        """Token ids of a text, or of a list that holds them already."""
        if isinstance(text, str):
            found = list(self.tokenizer(text, add_special_tokens=special)["input_ids"])
        elif isinstance(text, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in text):
            found = list(text)
        else:
            raise UserError(f"{where}: expected a text or a list of token ids, got {type(text).__name__}")
        if not found:
            raise UserError(f"{where}: expected at least one token, got none")
        return self.known(found, where)

    def known(self, ids: list[int], where: str) -> list[int]:
        """The ids, all of which the model has."""
        for i in ids:
            if not 0 <= i < self.vocabulary:
                raise UserError(f"{where}: expected ids in 0..{self.vocabulary - 1}, got {i}")
        return ids

    def tokens(self, text: str, where: str) -> list[int]:
        """The tokens of an option: words of one token each, or ``#ID``, with commas."""
        found = []
        for part in text.split(","):
            if not part:
                raise UserError(f"{where}: expected words or #ID with commas, got {part!r}")
            if re.fullmatch(r"#-?[0-9]+", part):
                found += self.known([int(part[1:])], where)
                continue
            ids = self.ids(part, where, special=False)
            if len(ids) != 1:
                raise UserError(f"{where}: expected words of one token (or #ID), got {part!r} of {len(ids)} tokens")
            found += ids
        return found

    def padded(self, rows: Sequence[list[int]], room: int = 0) -> dict[str, Tensor]:
        """A batch of rows of token ids, padded on the left as generation wants it, and with room for new tokens."""
        width = max(map(len, rows))
        self.fit(width + room)
        ids = torch.zeros((len(rows), width), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, width - len(row) :] = torch.tensor(row)
            mask[i, width - len(row) :] = 1
        return {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}

    def fit(self, length: int) -> None:
        """So many tokens have positions in the model."""
        if self.longest is not None and length > self.longest:
            raise UserError(f"model: expected at most {self.longest} tokens, new ones too, got {length}")


def read_lines(path: Path, keys: Sequence[str]) -> list[dict[str, Any]]:
    """The objects of a JSONL file, each with these keys."""
    found = []
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data: {path} cannot be read: {first_line(error)}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"data: {path} line {number}: expected JSON, got {first_line(error)}") from error
        missing = [key for key in keys if not isinstance(row, dict) or key not in row]
        if missing:
            raise UserError(f"data: {path} line {number}: expected the keys {', '.join(keys)}, got no {missing[0]}")
        found.append(row)
    if not found:
        raise UserError(f"data: expected lines in {path}, got none")
    return found


def prompts(model: Model, path: Path, key: str, batch: int) -> list[dict[str, Tensor]]:
    """The batches of one key of a JSONL file."""
    rows = [model.ids(row[key], f"data: {path}: {key}") for row in read_lines(path, [key])]
    return [model.padded(rows[i : i + batch]) for i in range(0, len(rows), batch)]


def dialogues(model: Model, path: Path) -> list[tuple[list[int], int]]:
    """(token ids of prompt and answer, length of the prompt) of each line: only the answer is learned."""
    found = []
    for row in read_lines(path, ["prompt", "answer"]):
        prompt = model.ids(row["prompt"], f"data: {path}: prompt")
        found.append((prompt + model.ids(row["answer"], f"data: {path}: answer", special=False), len(prompt)))
        model.fit(len(found[-1][0]))
    return found


def training_batches(
    rows: Sequence[tuple[list[int], int]], batch: int, seed: int
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Numbers of rows and their batch with labels, padded on the right, in a new order every epoch, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(rows), generator=generator).tolist()
        for start in range(0, len(order), batch):
            numbers = order[start : start + batch]
            chosen = [rows[i] for i in numbers]
            width = max(len(ids) for ids, _ in chosen)
            ids = torch.zeros((len(chosen), width), dtype=torch.int64)
            labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
            for i, (row, prompt) in enumerate(chosen):
                ids[i, : len(row)] = torch.tensor(row)
                labels[i, prompt : len(row)] = torch.tensor(row[prompt:])
                mask[i, : len(row)] = 1
            yield numbers, {"input_ids": ids, "attention_mask": mask, "labels": labels}


class Prefixes:
    """Hidden states that enter the lowest trained layer, by the number of their row: each is made once.

    Rows are padded on the right, where attention is causal: so what a row has does not depend on those beside it.
    """

    def __init__(self, tuner: Any) -> None:
        self.tuner = tuner
        self.kept: dict[int, Tensor] = {}

    def __call__(self, numbers: Sequence[int], batch: dict[str, Tensor]) -> Tensor:
        """``[B, T, D]`` of these rows."""
        missing = [at for at, number in enumerate(numbers) if number not in self.kept]
        if missing:
            inputs = {key: batch[key][missing] for key in ("input_ids", "attention_mask")}
            for at, hidden in zip(missing, self.tuner.prefix(inputs)):
                self.kept[numbers[at]] = hidden[: int(batch["attention_mask"][at].sum())].clone()
        return pad_sequence([self.kept[number] for number in numbers], batch_first=True)


def read_scores(path: Path) -> PathScores:
    """Scores that `pyml heads score` wrote, of heads and, where it was asked for them, of MLPs."""
    try:
        found = json.loads(path.read_text())
        heads = torch.tensor(found["heads"], dtype=torch.float64)
        mlps = None if found.get("mlps") is None else torch.tensor(found["mlps"], dtype=torch.float64)
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"expected a file of pyml heads score, got {path} ({first_line(error)})"
        raise UserError(f"scores: {message}") from error
    if heads.dim() != 2 or (mlps is not None and mlps.shape != heads.shape[:1]):
        got = list(heads.shape) if mlps is None else f"{list(heads.shape)} and {list(mlps.shape)}"
        raise UserError(f"scores: expected scores [layers, heads], and of MLPs [layers], in {path}, got shape {got}")
    return PathScores(heads, mlps, torch.empty(0))
