"""What the tests of methods on heads share: a cache with tiny Llamas of few steps, and the same sentences as files."""

import json
from contextlib import contextmanager

import pytest

from pyml.methods._tiny_llama import PAIRS

STEPS = 3


@contextmanager
def cache_in(folder):
    """``PYML_CACHE`` at a folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYML_CACHE", str(folder))
        yield folder


def rows_of(form, pairs, other=None):
    """The sentences of a form as objects of a JSONL file."""
    rows = []
    for a, b in pairs:
        prompt, answer = form(a, b)
        rows.append({"prompt": prompt, "answer": answer})
        if other is not None:
            rows[-1]["counterfactual"] = other(a, b)[0]
    return rows


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


SOME_PAIRS = PAIRS[::9]
