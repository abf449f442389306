"""Places that get a run's records beside metrics.jsonl: one file each. `config/registry.py` names them."""
