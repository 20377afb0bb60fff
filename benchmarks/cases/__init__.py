"""The cases, one file a family. Each has ``register(registry)``."""
