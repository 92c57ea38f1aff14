"""The page of licences names every package that es_flipout installs."""

import re

import pytest

from scripts.checks import licences


def test_the_page_is_up_to_date() -> None:
    found = licences.needed()
    for extra in licences.EXTRAS:
        found |= licences.needed(extra)
    assert {"torch", "gymnasium", "numpy", "ray", "warp-lang", "minatar"} <= found.keys()
    assert not {"pytest", "ruff", "hypothesis"} & found.keys(), "these are for developers"
    named = set(re.findall(r"^\| ([a-z0-9-]+) \|", licences.PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    named -= {"package"}
    missing = found.keys() - named
    assert not missing, f"run scripts/checks/licences.py; {', '.join(missing)} is not on the page"
    assert all(licences.licence(package) for package in found.values() if package is not None)


def test_what_a_build_of_torch_for_cuda_brings_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Package:
        def __init__(self, name: str) -> None:
            self.requires = {
                "es-flipout": ["torch"],
                "torch": ["nvidia-cublas==13", "cuda_bindings", "triton", "sympy"],
            }.get(name)

    monkeypatch.setattr(licences, "distribution", Package)
    assert list(licences.needed()) == ["sympy", "torch"]
