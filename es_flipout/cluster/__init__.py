"""Ray: the engine sharded over the cores and nodes of a cluster, and the classic evolution strategy to compare with."""
