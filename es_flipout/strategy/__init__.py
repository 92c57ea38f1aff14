"""The evolution strategy: populations, fitness shaping, gradient estimation and optimizers behind ask and tell."""
