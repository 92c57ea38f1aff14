"""Ray: the engine sharded over the cores and nodes of a cluster."""
