"""Engines behind `timeline_attention` that call attention of torch or flash-attn."""
