"""A population of language models against the plain model: time of a forward, and memory beside dense members.

python scripts/speed/language_model.py --out results/language_model_<hardware>_<yyyy-mm>     # pip install 'es-flipout[text]'
python scripts/speed/language_model.py --out ... --render

The models are made from configurations; nothing is downloaded. In every round, the population and the plain model compute the
same batch in turn (every member computes its own part of it), and the ratio is taken within the round.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import nn

from es_flipout import EvolutionStrategy
from es_flipout.bench.timing import interleave, repeated
from es_flipout.strategy.population import Population
from scripts import report

MEMBERS = 64
TEXTS = 4  # of every member
LENGTH = 32
VOCABULARY = 256
COMMON = {"vocab_size": VOCABULARY, "use_cache": False, "bos_token_id": None, "eos_token_id": None}
LIKE_LLAMA = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": LENGTH,
}
MODELS: dict[str, dict[str, Any]] = {
    "Llama": LIKE_LLAMA,
    "Qwen2": LIKE_LLAMA,
    "GPT2": {"n_embd": 256, "n_layer": 4, "n_head": 8, "n_positions": LENGTH},
}


def make_model(name: str, **sizes: Any) -> nn.Module:
    """A causal language model of this family with random weights."""
    import transformers  # pyright: ignore[reportMissingImports]  (an extra)

    suffix = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    config = getattr(transformers, f"{name}Config")(**COMMON, **sizes)
    return getattr(transformers, f"{name}{suffix}")(config).eval()


def stored_bytes(population: Population) -> int:
    """Bytes of the means and of the noise that a population stores."""
    noise = (tensor for each in population.perturbations.values() for tensor in each.buffers().values())
    storages = [tensor.untyped_storage() for tensor in (*noise, *population.mean_state().values())]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@torch.no_grad()
def measure(name: str, rounds: int) -> report.Rows:
    """Rows of ``runs.csv``: one for every round."""
    model = make_model(name, **MODELS[name])
    population = EvolutionStrategy(model, MEMBERS, sigma=0.02).ask()
    texts = torch.randint(VOCABULARY, (MEMBERS, TEXTS, LENGTH))
    flat = texts.flatten(0, 1)
    measures = {
        "population": repeated(lambda: population(texts), 0.0),
        "plain": repeated(lambda: model(flat), 0.0),
    }
    rates = interleave(measures, rounds).rates
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return [
        {
            "model": name,
            "parameters": parameters,
            "round": number,
            "population_s": 1 / by_population,
            "plain_s": 1 / by_plain,
            "population_mib": stored_bytes(population) / 2**20,
            "dense_mib": MEMBERS * parameters * 4 / 2**20,
        }
        for number, (by_population, by_plain) in enumerate(zip(rates["population"], rates["plain"], strict=True))
    ]


def main() -> None:
    """Measure, and write the table."""
    parser = report.script_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    options = report.parse(parser)
    if not options.render:
        torch.manual_seed(0)
        torch.set_num_threads(1)
        config = {"members": MEMBERS, "texts": TEXTS, "length": LENGTH, "common": COMMON, "models": MODELS}
        report.begin(options.out, {**config, **report.config_of(options)}, fresh=True)
        for name in MODELS:
            report.append_csv(options.out / "runs.csv", measure(name, options.rounds))
    report.write_table(options.out, table(options.out))


def table(out: Path) -> str:
    """The table in Markdown."""
    rows = []
    for name, runs in report.groups(report.read_csv(out / "runs.csv"), "model"):
        first = runs.iloc[0]
        rows.append(
            (
                name,
                f"{first['parameters'] / 1e6:.1f}M",
                f"{statistics.median(runs['plain_s']):.2f} s",
                f"{statistics.median(runs['population_s']):.2f} s",
                report.spread(runs["population_s"] / runs["plain_s"], ".2f"),
                f"{first['population_mib']:.0f} MiB",
                f"{first['dense_mib']:,.0f} MiB",
            )
        )
    header = (
        "model | parameters | plain forward | population of 64 | population / plain | population stores | dense members"
    )
    return report.markdown(header, rows)


if __name__ == "__main__":
    report.run_script(main)
