"""The classic evolution strategy on Ray (OpenAI-ES), as a baseline: one policy and one environment per worker."""
