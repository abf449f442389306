"""What keeps a run alive, or ends it in order: signals, bad numbers, hangs and lost ranks."""
