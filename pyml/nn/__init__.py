"""Layers. They only call `pyml.ops`."""
