"""Helpers that are independent of number formats and JAX versions: tables, bits and blocks."""
