"""Measuring: random models, costs of exporting and running, metrics and limits of parity."""
