"""Where the tasks of methods on heads come from: files for a user's model, or a tiny Llama for each seed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pyml.methods import UserError
from pyml.methods._checkpoint import checksum
from pyml.methods._head_arms import Task
from pyml.methods._language import Language, Line, open_language, read_lines, split_lines
from pyml.methods._tiny_llama import Mixture, tiny_llama

COUNTERFACTUAL = "counterfactual"


@dataclass(frozen=True)
class Tasks:
    """A task for each seed, and what identifies them all."""

    make: Callable[[int], Task]
    facts: dict[str, Any]

    def __call__(self, seed: int) -> Task:
        return self.make(seed)


class Behaviour(NamedTuple):
    """A file with prompts that show it, and the record words that tell it from what is wanted (None: no such words)."""

    data: Path
    positive: str | None = None
    negative: str | None = None
    options: str = ""  # what stands before the names of its options

    def lines(self, language: Language) -> list[Line]:
        found = read_lines(self.data, f"{self.options}data", language, COUNTERFACTUAL)
        if len(found) < 2:
            expected = "two lines at least, one to learn from and one to be scored on"
            raise UserError(f"{self.options}data: expected {expected}, got {self.data}")
        return found

    def records(self, language: Language) -> list[list[int]]:
        """The first tokens of the words for the behaviour, and of those against it."""
        sides = (("positive", self.positive), ("negative", self.negative))
        found = [[] if words is None else language.words(words, self.options + name) for name, words in sides]
        if shared := set(found[0]) & set(found[1]):
            words = ", ".join(repr(language.tokenizer.decode([token])) for token in sorted(shared))
            name = f"{self.options}negative"
            expected = f"words with other first tokens than --{self.options}positive"
            raise UserError(f"{name}: expected {expected}, got {words} in both")
        return found


def file_tasks(
    model: Path, behaviours: Sequence[Behaviour], controls: Sequence[Path], transfer: Path | None, share: float,
    dtype: str,
) -> Tasks:  # fmt: skip
    """The same model for every seed, the lines split anew; the second behaviour, if any, is measured and steered."""
    language = open_language(model, dtype)
    several = [behaviour.lines(language) for behaviour in behaviours]
    others = {path.stem: read_lines(path, "control", language) for path in controls}
    if len(others) < len(controls):
        raise UserError(f"control: expected files with names that differ, got {', '.join(map(str, controls))}")
    unseen = [] if transfer is None else read_lines(transfer, "transfer", language)
    records = [behaviour.records(language) for behaviour in behaviours]

    def make(seed: int) -> Task:
        def task(number: int, **more: Any) -> Task:
            positive, negative = records[number]
            return Task(
                language, *split_lines(several[number], share, seed), positive=positive, negative=negative, **more
            )

        second = task(1) if len(behaviours) > 1 else None
        return task(0, controls=others, transfer=unseen, second=second)

    facts = {
        "data": behaviours[0].data.name, "model": language.source, "train_share": share, "record_tokens": records[0],
        "controls": list(others), "transfer": None if transfer is None else transfer.stem,
        "data_checksum": checksum(_bytes([*several, *others.values(), unseen])),
    }  # fmt: skip
    if len(behaviours) > 1:
        facts |= {"second": behaviours[1].data.stem, "second_records": records[1]}
    return Tasks(make, facts)


def demo_tasks(
    mixture: Mixture, seeds: range, make: Callable[[Language, int], Task], facts: dict[str, Any], *, shown: bool
) -> Tasks:
    """A tiny Llama for each seed; those that are not in the cache are trained now."""
    languages = {seed: tiny_llama(mixture, seed, shown=shown) for seed in seeds}
    made = {seed: make(language, seed) for seed, language in languages.items()}
    model = {"tiny": mixture.name, "tiny_steps": mixture.steps}
    prints = [language.source["fingerprint"] for language in languages.values()]
    return Tasks(made.__getitem__, {**facts, "model": {**model, "fingerprints": prints}})


def same_language(mixture: Mixture, moved: Path | None, *, shown: bool) -> Callable[[dict[str, Any]], Language]:
    """Finds the model that a checkpoint was learned on by its source, or takes the folder where it has ``moved`` to."""

    def find(source: dict[str, Any]) -> Language:
        if moved is not None:
            return open_language(moved, source["dtype"])
        if "tiny" in source:
            return tiny_llama(mixture._replace(steps=source["tiny_steps"]), source["tiny_seed"], shown=shown)
        folder = Path(source["folder"])
        if not folder.is_dir():
            raise UserError(f"model: expected --model, as the model of the checkpoint is no longer in {folder}")
        return open_language(folder, source["dtype"])

    return find


def _bytes(groups: Sequence[Sequence[Line]]) -> list[bytes]:
    return [repr([(line.prompt, line.target, line.counterfactual) for line in lines]).encode() for lines in groups]
