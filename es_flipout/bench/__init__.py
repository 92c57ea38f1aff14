"""Speed, always as ratios measured side by side.

``forward`` compares populations with plain inference, ``rollout`` training with bare physics. Each has an options
dataclass, and ``run(options, console)``, which prints a table and returns the JSON-ready result.
"""
