"""Plain torch versions of every op: slow, shaped like the papers; the truth for tests, the baselines of benchmarks."""
