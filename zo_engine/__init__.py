"""Zeroth-order fine-tuning of quantised models: a recipe points a loss at a model's scales; each step nudges the
scales along random directions and writes a line in the journal."""

__version__ = "0.1.0"
