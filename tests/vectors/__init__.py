"""Reference vectors of independent fp64 programs, against this project's own layers: `python -m tests.vectors PATH...`."""
