"""A frozen model, run once for many rows: loading, memory, the shared prefix, label scores."""
