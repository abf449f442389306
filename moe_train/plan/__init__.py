"""Planner of memory, traffic and time of a configuration on a cluster, from its sizes alone. Nothing is allocated."""
