"""Malformed input ends in a correct run or in one line; ``scripts/checks/fuzz.py`` tries thousands of cases."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from scripts.checks._fuzz_cases import Case, carry_out, cases, make_run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("fuzz"))


@seed(7)
@settings(
    max_examples=40,
    deadline=None,
    derandomize=False,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)
@given(case=cases())
def test_malformed_input(whole: Path, case: Case) -> None:
    outcome = carry_out(case, whole)
    assert outcome.good, (case.kind, case.arguments, outcome)


def test_what_is_wrong_is_noticed(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(arguments: list[str]) -> int:
        raise KeyError("no line")

    fine = Case("nothing", ("evaluate", "RUN", "--episodes", "1"), lambda run: False)
    assert carry_out(fine, whole).end == "ran"
    assert carry_out(Case("all", fine.arguments, lambda run: True), whole).end == "accepted"
    assert carry_out(Case("missing", ("evaluate", "NEW"), lambda run: True), whole).end == "refused"
    monkeypatch.setattr("es_flipout.cli.evaluate.run", broken)
    assert carry_out(fine, whole).end == "traceback"
