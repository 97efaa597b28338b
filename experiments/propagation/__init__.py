"""Accuracy of every way to carry a variance through a sampler, against network calls."""
