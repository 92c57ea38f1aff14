"""Speed, always as ratios measured side by side: ``forward`` (population against plain inference), ``rollout`` (training
against bare physics). Each has an options dataclass and ``run(options, console)``, which prints a table and returns JSON.
"""
