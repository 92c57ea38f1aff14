"""Speed benchmarks; results are ratios of quantities that are measured in turn.

``forward`` compares population forwards with plain inference, ``rollout`` compares training with bare physics, and
``compare`` compares this engine with classic Ray workers. Each has an options dataclass and a function
``run(options, console)``, which prints a table and returns a JSON-serializable result.
"""
