"""Random sequences of every call, against a plain NumPy model of what a cache should hold (model.py, model_steps.py).

hypothesis draws the steps here, and shrinks what fails; `make soak` takes many more from a seed.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import HAS_GPU, ROOT, Backend
from hypothesis import HealthCheck, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from model_steps import STEPS, Difference, Failure, Run, SeededDraw, seeded_run, shrunk


class HypothesisDraw:
    def __init__(self, data: st.DataObject) -> None:
        self.data = data

    def integer(self, least: int, most: int) -> int:
        return self.data.draw(st.integers(least, most))

    def choice(self, options: Sequence[Any]) -> Any:
        return options[self.integer(0, len(options) - 1)]

    def chance(self, percent: int) -> bool:
        return self.integer(0, 99) >= 100 - percent  # what it shrinks to is no


class Calls(RuleBasedStateMachine):
    """Every kind of step is a rule; it compares everything itself."""

    backend: Backend
    run: Run

    @initialize(data=st.data())
    def make(self, data: st.DataObject) -> None:
        self.run = Run(HypothesisDraw(data), self.backend.device, small=self.backend.slow)

    def teardown(self) -> None:
        if hasattr(self, "run"):
            note("\n".join(self.run.log))


def _add_rule(name: str) -> None:
    def step(self: Calls, data: st.DataObject) -> None:
        self.run.take(name, HypothesisDraw(data))

    step.__name__ = name
    possible = precondition(lambda self: hasattr(self, "run") and self.run.possible(name))
    setattr(Calls, name, possible(rule(data=st.data())(step)))


for _name in STEPS:
    _add_rule(_name)


def test_any_calls_in_any_order(backend: Backend) -> None:
    machine = type("Calls", (Calls,), {"backend": backend})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=4 if backend.slow else 15,
            stateful_step_count=15 if backend.slow else 25,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.parametrize("seed", range(4))
def test_seeded_steps(backend: Backend, seed: int) -> None:
    """As `make soak` takes them, and far faster than hypothesis does."""
    for number in range(2 if backend.slow else 8):
        seeded_run(f"{seed}/{number}", range(20 if backend.slow else 60), backend.device, small=backend.slow)


def test_a_difference_is_found_and_shrunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine must be able to fail: a cache whose truncate keeps one position more is caught, in a few calls."""
    truncate = Run.truncate

    def wrong(self: Run, draw: SeededDraw, static: bool = False) -> object:
        action = truncate(self, draw, static)
        call = action.call
        action.call = lambda: (call(), self.cache.tensors.state[0].add_(1))
        return action

    monkeypatch.setattr(Run, "truncate", wrong)
    cpu = torch.device("cpu")
    with pytest.raises(Failure, match="positions seen") as failed:
        for number in range(20):
            seeded_run(f"0/{number}", range(60), cpu)
    smaller = shrunk(f"0/{number}", failed.value, cpu)
    assert isinstance(smaller.__cause__, Difference)
    assert len(smaller.log) <= 3 and "truncate" in smaller.log[-1]  # the cache, at most a graph's capture, the call


@pytest.mark.long
def test_the_soak(tmp_path: Path) -> None:
    """The program itself: its steps, its verdict, and one run again."""

    def soak(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "tools" / "soak.py"), "--seed", "3", "--steps-per-run", "10", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    done = soak("--steps", "95", "--jobs", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PASSED: 95 steps on cpu, 10 caches, 0 differences, seed 3" in done.stdout
    one = soak("--run", "7")
    assert one.returncode == 0 and "PASSED: 10 steps" in one.stdout
    if not HAS_GPU:
        none = soak("--device", "cuda")
        assert none.returncode == 1 and "there is no GPU to use" in none.stderr
