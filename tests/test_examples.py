"""The examples of scripts/examples/ do what they say, in a reduced form."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[1] / "scripts" / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_accuracy(capsys: pytest.CaptureFixture[str]) -> None:
    assert example("accuracy").main(generations=20, population_size=128) > 0.3
    assert "generation 20: " in capsys.readouterr().out


def test_black_box(capsys: pytest.CaptureFixture[str]) -> None:
    by_evolution, by_gradient = example("black_box").main(generations=400, size=4, population_size=64)
    assert by_evolution < 1.5
    assert by_gradient > 10
    assert "evolution strategy, 400 generations of 64" in capsys.readouterr().out


def test_transformer(capsys: pytest.CaptureFixture[str]) -> None:
    before, after = example("transformer").main(steps=60, generations=4, population_size=16)
    assert before > 0.3
    assert after > before - 0.1
    assert "after 4 generations of evolution" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["accuracy", "black_box", "transformer"])
def test_in_full(name: str) -> None:
    result = example(name).main()
    if name == "accuracy":
        assert result > 0.85
    elif name == "black_box":
        assert result[0] < 0.1
    else:
        assert result[1] > result[0] + 0.02
