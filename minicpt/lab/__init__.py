"""The reproduction: cells, their store, executors, statistics, tables, figures, ablations."""
