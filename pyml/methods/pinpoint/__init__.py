"""Pinpoint tuning: the heads that carry a behaviour are found, and only their slices are trained or steered."""
