"""A run stopped at every micro-batch boundary and taken up: zero tolerance on its whole state.

The resumed run is built with another start, another seed and a poisoned learning rate, so it passes only if the state
was truly loaded. The stop is a real SIGTERM inside a forward, of training or of evaluation: the run saves itself at the
boundary behind it, inside its window or evaluation.
"""

import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
from runs import MSE, kinds, lines, trainer_of
from tally import Tally, scratch, times
from test_run_state import differing, whole_state

from trainer import Trainer, rng
from trainer.checkpoint import folder
from trainer.errors import Stopped
from trainer.optim import constant, cosine, linear, wsd

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")

# 23 rows: in micro-batches of 3 these are 8, the last of 2 rows; in windows of 3 the last has 2 micro-batches.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "accumulation": ("adamw", {"accumulation_steps": 4, "batch_size": 4}),
    "ragged": ("momentum", {"accumulation_steps": 5, "batch_size": 4}),
    "one micro-batch": ("momentum", {"accumulation_steps": 1}),
    "dropout, clip by norm": ("adamw", {"clip_norm": 0.1}),
    "clip by value, zeros": ("momentum", {"clip_value": 0.05}),
    "workers": ("items", {"workers": 2}),
    "items in this process": ("items", {}),
    "a loader of the user's": ("loader", {}),
    "bf16": ("adamw", {"precision": "bf16"}),
    "fp16 and its scale": ("adamw", {"precision": "fp16"}),
    "fp64": ("momentum", {"precision": "fp64"}),
    "never zeroed": ("never", {}),
    "two optimizers, each micro-batch alike": ("two", {}),
    "a plain object": ("plain", {}),
    "segments": ("momentum", {"activation_checkpointing": "segments", "segments": 2}),
    "constant with warmup": ("adamw", {"schedule": constant(warmup=3)}),
    "linear by rows": ("adamw", {"schedule": linear(60, warmup=5, clock="rows")}),
    "cosine": ("adamw", {"schedule": cosine(8, warmup=2)}),
    "wsd": ("adamw", {"schedule": wsd(8, warmup=2, decay=3)}),
    "a schedule of torch's": ("items", {"log_every": 2}),
    "evaluation after every step": ("adamw", {"evaluate_every": 1, "evaluation_batch_size": 1}),
    "epoch ends": (
        "momentum",
        {"steps": None, "epochs": 2, "evaluate_clock": "epochs", "evaluate_every": 1, "log_every": 3},
    ),
    "drop_last, sum": ("momentum", {"drop_last": True, "reduction": "sum"}),
    "skips": ("adamw", {"skips_in_a_row": 50}),
}
BASE = {"steps": 6, "evaluate_every": 2, "evaluate_clock": "steps", "evaluation_batch_size": 2, "metrics_file": True}


class Counts:
    """The objective: sends SIGTERM in its n-th call; every seventh loss of "skips" is not a number."""

    def __init__(self, variant: str, at: int | None) -> None:
        self.calls = 0
        self._at = at
        self._skips = variant == "skips"
        self.weight = MSE.weight

    def __call__(self, model: Any, batch: Any) -> Any:
        self.calls += 1
        if self.calls == self._at:
            signal.raise_signal(signal.SIGTERM)
        loss = MSE(model, batch)
        return loss * float("nan") if self._skips and float(batch[0][0, 0]) > 1.0 else loss


def made(variant: str, run: Path, at: int | None, resumed: bool) -> tuple[Trainer, Counts]:
    kind, settings = VARIANTS[variant]
    other = {"start": 77, "seed": 55, "poison": 1e4} if resumed else {}
    objective = Counts(variant, at)
    trainer = trainer_of(kind, folder=run, objective=objective, **{**BASE, **settings, **other})
    return trainer, objective


def whole(variant: str) -> tuple[dict[str, Any], list[Any], int]:
    with scratch() as run:
        trainer, objective = made(variant, run, None, False)
        trainer.fit()
        return whole_state(trainer), lines(run), objective.calls


def stopped_at(variant: str, at: int, expected: tuple[dict[str, Any], list[Any], int]) -> str | None:
    """What differs after a stop in the n-th forward, in words; None where nothing does."""
    with scratch() as run:
        trainer, _ = made(variant, run, at, False)
        try:
            trainer.fit()
        except Stopped:
            saved = folder.last(run)
            if saved is None:
                return f"{variant}, forward {at}: nothing was saved"
            trainer, _ = made(variant, run, None, True)
            rng.seed_all(1234)
            trainer.fit(resume="auto")
        found = differing(expected[0], whole_state(trainer))
        if lines(run) != expected[1]:
            found.append("metrics.jsonl")
        return f"{variant}, forward {at}: {', '.join(found)}" if found else None


def trials(count: int, seed: int) -> Tally:
    """So many boundaries of each variant, spread over its run; as many as it has, where that is fewer."""
    tally, random_ = Tally(), random.Random(seed)
    for variant in VARIANTS:
        expected = whole(variant)
        for at in sorted(random_.sample(range(1, expected[2] + 1), min(count, expected[2]))):
            tally.note("equal bit for bit", stopped_at(variant, at, expected))
    return tally


def test_a_run_stopped_at_a_boundary_goes_on_bit_for_bit() -> None:
    tally = trials(times(1), seed=3)
    assert not tally.broken, str(tally)
    assert tally.trials >= 24


@pytest.mark.parametrize("part", ["gradients", "sums", "buffers", "window_rng"])
def test_an_open_window_that_is_not_whole_is_found(part, monkeypatch) -> None:
    """Negative controls: a part of the open window left out of what is saved."""
    from trainer.checkpoint import run_state
    from trainer.step import Step

    variant = "items in this process" if part == "window_rng" else "accumulation"
    expected = whole(variant)
    state_dict = Step.state_dict

    def without(self: Step) -> dict[str, Any]:
        state = state_dict(self)
        if part == "gradients" and state["open"] is not None:
            state["gradients"] = {name: value * 0 for name, value in state["gradients"].items()}
        elif part == "sums" and state["open"] is not None:
            for sums in state["open"]["sums"]["terms"].values():
                sums["weight"] = sums["weight"] / 2
        elif part == "buffers" and state["open"] is not None:
            state["open"]["buffers"] = {name: value * 0 for name, value in state["open"]["buffers"].items()}
        return state

    if part == "buffers":  # they come back in a skip only
        variant, expected = "skips", whole("skips")
    if part == "window_rng":
        monkeypatch.setattr(run_state, "_OWN", tuple(name for name in run_state._OWN if name != "window_rng"))
    else:
        monkeypatch.setattr(Step, "state_dict", without)
    assert any(stopped_at(variant, at, expected) for at in (1, 2, 4, 5, 8, 9, 10, 13, 14)), part


def test_an_evaluation_that_is_not_whole_is_found(monkeypatch) -> None:
    from trainer.held_out import HeldOut

    state_dict = HeldOut.state_dict

    def without(self: HeldOut) -> dict[str, Any] | None:
        state = state_dict(self)
        return None if state is None else state | {"terms": {}, "metrics": {}}

    expected = whole("evaluation after every step")
    monkeypatch.setattr(HeldOut, "state_dict", without)
    assert any(stopped_at("evaluation after every step", at, expected) for at in (4, 5, 6, 7))


def test_every_kind_of_run_has_its_variant() -> None:
    assert {kind for kind, _ in VARIANTS.values()} <= {"adamw", "momentum", "items", "loader", "plain", "never", "two"}
    assert kinds("adamw", 1.0)[2]["accumulation_steps"] == 3
