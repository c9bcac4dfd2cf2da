"""Triton kernels; reached through the registry alone."""
