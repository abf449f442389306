"""Vectors of independent fp64 references against this project's own layers: `python -m tests.vectors PATH...`."""
