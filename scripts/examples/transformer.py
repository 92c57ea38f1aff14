"""Pretrain a small transformer by backprop, then fine-tune it by evolution on the fraction of completely correct answers.

python scripts/examples/transformer.py

The task is to sort a row of digits. Backprop learns the next digit, given the correct ones before it. The strategy maximizes the
fraction of answers that are completely correct when the model reads its own digits (greedy decoding), which has no gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from es_flipout import EvolutionStrategy

DIGITS = 5
START = 10  # the symbol after which the answer begins


class Transformer(nn.Module):
    """Predicts the next symbol; the output weights are tied to the embeddings."""

    def __init__(self, size: int = 32, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, size)
        self.positions = nn.Parameter(0.1 * torch.randn(2 * DIGITS + 1, size))
        layer = nn.TransformerEncoderLayer(size, heads, 2 * size, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(size)
        self.output = nn.Linear(size, 11, bias=False)
        self.output.weight = self.tokens.weight
        nn.init.normal_(self.tokens.weight, std=size**-0.5)

    def forward(self, symbols: Tensor) -> Tensor:
        """``(B, length)`` symbols to ``(B, length, 11)`` logits of the symbols after them."""
        length = symbols.shape[-1]
        causal = nn.Transformer.generate_square_subsequent_mask(length, device=symbols.device)
        x = self.tokens(symbols) + self.positions[:length]
        return self.output(self.norm(self.layers(x, mask=causal, is_causal=True)))


def questions(count: int) -> tuple[Tensor, Tensor]:
    """Rows of digits with the start symbol ``(count, DIGITS + 1)``, and the same digits in order ``(count, DIGITS)``."""
    digits = torch.randint(10, (count, DIGITS))
    return torch.cat([digits, torch.full((count, 1), START)], 1), digits.sort(1).values


@torch.no_grad()
def correct_answers(model: Callable[[Tensor], Tensor], question: Tensor, answer: Tensor) -> Tensor:
    """Fraction of completely correct answers with greedy decoding: ``(..., B, length)`` to ``(...,)``."""
    symbols = question
    for _ in range(DIGITS):
        symbols = torch.cat([symbols, model(symbols)[..., -1, :].argmax(-1, keepdim=True)], -1)
    return (symbols[..., -DIGITS:] == answer).all(-1).float().mean(-1)


def pretrain(model: Transformer, steps: int) -> None:
    """Backprop on the next symbol of the correct answers."""
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(steps):
        question, answer = questions(64)
        logits = model(torch.cat([question, answer[:, :-1]], 1))[:, DIGITS:]
        optimizer.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), answer.flatten()).backward()
        optimizer.step()


def main(steps: int = 150, generations: int = 30, population_size: int = 64) -> tuple[float, float]:
    """Pretrain and fine-tune; returns the fraction of correct answers before and after fine-tuning."""
    torch.manual_seed(0)
    model = Transformer()
    test = questions(1000)
    pretrain(model, steps)
    before = float(correct_answers(model.eval(), *test))
    print(f"after {steps} steps of backprop: {before:.1%} of the answers correct")
    strategy = EvolutionStrategy(model, population_size, sigma=0.02, learning_rate=0.002)
    after = before
    for generation in range(1, generations + 1):
        question, answer = questions(64)
        population = strategy.ask()
        strategy.tell(correct_answers(population, question.expand(population_size, -1, -1), answer))
        if generation % max(generations // 3, 1) == 0:
            after = float(correct_answers(strategy.mean_module(), *test))
            print(f"after {generation} generations of evolution: {after:.1%} of the answers correct")
    return before, after


if __name__ == "__main__":
    torch.set_num_threads(1)  # small products: more threads only wait for each other
    main()
