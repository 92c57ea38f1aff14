"""The examples of scripts/examples/ do what they say, in a reduced form."""

import pytest
import torch

from scripts.examples import accuracy, black_box, transformer


def test_accuracy(capsys: pytest.CaptureFixture[str]) -> None:
    assert accuracy.main(generations=20, population_size=128) > 0.3
    assert "generation 20: " in capsys.readouterr().out


def test_black_box(capsys: pytest.CaptureFixture[str]) -> None:
    by_evolution, by_gradient = black_box.main(generations=400, size=4, population_size=64)
    assert by_evolution < 1.5
    assert by_gradient > 10
    assert "evolution strategy, 400 generations of 64" in capsys.readouterr().out


def test_transformer(capsys: pytest.CaptureFixture[str]) -> None:
    before, after = transformer.main(steps=60, generations=4, population_size=16)
    assert before > 0.3
    assert after > before - 0.1
    assert "after 4 generations of evolution" in capsys.readouterr().out


def test_language_model(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers", reason="the extra text is not installed")
    from scripts.examples import language_model

    before, after = language_model.main(steps=20, generations=5, population_size=16)
    assert 0 <= before <= after + 0.2
    assert "after 5 generations of evolution" in capsys.readouterr().out
    right = torch.tensor([[[1, 3, 11, 8, 10, 5], [0, 7, 11, 7, 10, 0]], [[1, 3, 11, 8, 10, 6], [0, 7, 11, 7, 3, 0]]])
    assert language_model.reward(right).tolist() == [1.0, 0.0]


@pytest.mark.slow
def test_in_full() -> None:
    assert accuracy.main() > 0.85
    by_evolution, _ = black_box.main()
    assert by_evolution < 0.1
    before, after = transformer.main()
    assert after > before + 0.01
