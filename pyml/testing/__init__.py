"""Sample inputs, the error rule and `pyml verify`: installed, so that a user's machine can check its own kernels."""

from pyml.testing.compare import assert_accurate, check, run
from pyml.testing.samples import (
    DTYPES,
    Sample,
    arguments,
    each,
    everything,
    in_double,
    samples,
    schema_arguments,
    tensors_of,
)

__all__ = [
    "DTYPES",
    "Sample",
    "arguments",
    "assert_accurate",
    "check",
    "each",
    "everything",
    "in_double",
    "run",
    "samples",
    "schema_arguments",
    "tensors_of",
]
