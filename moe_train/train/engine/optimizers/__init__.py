"""Optimizers: one file each. `config/registry.py` names them."""
