"""The planner: what a configuration takes on a cluster, from its sizes alone. Nothing is allocated."""
