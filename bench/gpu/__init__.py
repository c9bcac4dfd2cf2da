"""The half hour on a rented GPU, in stages of which each leaves a result: `python -m bench.gpu`."""
