"""Metrics, theory and memory of number formats and quantizers."""
