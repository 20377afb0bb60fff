"""Plain torch versions of every op: slow, shaped like the papers, the truth for tests and the baselines of benchmarks."""
