"""Precise arithmetic tuning: the heads that compute are found, and only their slices are trained."""
