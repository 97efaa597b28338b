"""Derivatives of a sampler's own code: dual numbers, and the networks in between."""
