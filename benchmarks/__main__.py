"""`python -m pyml.benchmarks`."""

from .run import cli

if __name__ == "__main__":
    raise SystemExit(cli())
