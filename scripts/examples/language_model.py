"""Improve a Hugging Face language model by evolution on a reward that a program computes, and that has no gradient.

python scripts/examples/language_model.py        # pip install 'es-flipout[text]'; nothing is downloaded

The model, a small Llama from a configuration, is given a number and writes a sum of two digits: ``13=8+5``. Backprop teaches it
the form on random sums, which are mostly wrong. Then the strategy maximizes the fraction of sums that are right: the model writes
by greedy decoding, and a program checks what it wrote. There are many right answers and no labels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM  # pyright: ignore[reportMissingImports]  (an extra)

from es_flipout import EvolutionStrategy

SYMBOLS = "0123456789+="
PROMPT = 3  # "13="
ANSWER = 3  # "8+5"


def make_model(size: int = 32, layers: int = 2) -> LlamaForCausalLM:
    """A Llama with random weights."""
    config = LlamaConfig(
        vocab_size=len(SYMBOLS),
        hidden_size=size,
        intermediate_size=2 * size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=PROMPT + ANSWER,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,  # every member would need a cache of its own
    )
    return LlamaForCausalLM(config)


def prompts() -> Tensor:
    """All prompts, from ``00=`` to ``18=``: ``(19, PROMPT)``."""
    total = torch.arange(19)
    return torch.stack([total // 10, total % 10, torch.full_like(total, SYMBOLS.index("="))], 1)


def examples(count: int) -> Tensor:
    """Prompts with random sums ``(count, PROMPT + ANSWER)``, of which few are right."""
    first, second = torch.randint(10, (2, count, 1))
    plus = torch.full((count, 1), SYMBOLS.index("+"))
    return torch.cat([prompts()[torch.randint(19, (count,))], first, plus, second], 1)


@torch.no_grad()
def write(model: Callable[[Tensor], Any], prompt: Tensor) -> Tensor:
    """Continue prompts ``(..., B, PROMPT)`` by greedy decoding, to ``(..., B, PROMPT + ANSWER)``."""
    text = prompt
    for _ in range(ANSWER):
        text = torch.cat([text, model(text).logits[..., -1, :].argmax(-1, keepdim=True)], -1)
    return text


def reward(text: Tensor) -> Tensor:
    """Fraction of texts ``(..., B, PROMPT + ANSWER)`` that are right: ``(...,)``."""
    ten, one, _, first, plus, second = text.unbind(-1)
    well_formed = (first < 10) & (plus == SYMBOLS.index("+")) & (second < 10)
    return (well_formed & (first + second == 10 * ten + one)).float().mean(-1)


def pretrain(model: LlamaForCausalLM, steps: int) -> None:
    """Teach the form by backprop."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        text = examples(128)
        logits = model(text[:, :-1]).logits[:, PROMPT - 1 :]
        optimizer.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), text[:, PROMPT:].flatten()).backward()
        optimizer.step()


def main(steps: int = 150, generations: int = 150, population_size: int = 128) -> tuple[float, float]:
    """Pretrain and evolve; returns the fraction of right sums before and after evolution."""
    torch.manual_seed(0)
    model = make_model()
    pretrain(model, steps)
    before = after = float(reward(write(model.eval(), prompts())))
    print(f"after {steps} steps of backprop: {before:.0%} of the sums are right")
    strategy = EvolutionStrategy(model, population_size, sigma=0.05, learning_rate=0.03)
    shared = prompts().expand(population_size, -1, -1)
    for generation in range(1, generations + 1):
        strategy.tell(reward(write(strategy.ask(), shared)))
        if generation % max(generations // 5, 1) == 0:
            after = float(reward(write(strategy.mean_module(), prompts())))
            print(f"after {generation} generations of evolution: {after:.0%}")
    return before, after


if __name__ == "__main__":
    torch.set_num_threads(1)  # small products: more threads only wait for each other
    main()
