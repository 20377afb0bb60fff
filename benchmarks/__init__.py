"""Benchmarks: `pyml bench [family ...]` or `python -m pyml.benchmarks`. See docs/benchmarks.md.

registry.py  what a case is            cases/<family>.py  the cases
run.py       plans jobs, starts each in a fresh process and writes the results
worker.py    one job in that process   harness.py  interleaved timing and peak memory   ceilings.py  the machine's rates
report.py    rows, targets, tables     output.py  CSV, Markdown   bars.py  the picture   compare.py  old against new
"""
