"""The sample inputs of every op live in pyml/testing, so that `pyml verify` has them on a user's machine too."""

from pyml.testing import DTYPES, Sample, arguments, each, everything, in_double, samples, schema_arguments, tensors_of

__all__ = [
    "DTYPES",
    "Sample",
    "arguments",
    "each",
    "everything",
    "in_double",
    "samples",
    "schema_arguments",
    "tensors_of",
]
