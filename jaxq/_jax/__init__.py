"""Workarounds and wrappers for the behavior of JAX and XLA, each with its reason."""
