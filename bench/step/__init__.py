"""A whole training step, ours against what others would write: `python -m bench.step --help`."""
