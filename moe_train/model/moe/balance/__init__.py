"""Ways to balance experts: one file each. `config/registry.py` names them."""
