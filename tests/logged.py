"""Events made by hand, for the tests of the loggers."""

from pathlib import Path
from typing import Any

import torch

from trainer.gradient.report import Report
from trainer.loggers.events import Evaluated, Start, Stop

NAMES = ("micro_batches", "windows", "epochs", "steps", "rows", "tokens")


def clocks(windows: int = 0, skips: int = 0) -> dict[str, int]:
    """Clocks after so many windows of 2 micro-batches of 32 rows, 10 windows an epoch."""
    steps = windows - skips
    return dict(zip(NAMES, (2 * windows, windows, windows // 10, steps, 64 * steps, 0), strict=True))


def report(windows: int, loss: float = 0.25, *, skips: int = 0, terms: dict[str, float] | None = None) -> Report:
    values = terms or {"loss": loss}
    made = Report(lambda: values, dict.fromkeys(values, torch.tensor(64.0)), {}, (2, 64, 0))
    made._grad_norm = torch.tensor(1.5)
    made._clip_factor = torch.tensor(0.75)
    made._lr = 1e-3
    made._clocks = lambda: clocks(windows, skips)
    return made


def skipped(windows: int, reason: str, skips: int = 1) -> Report:
    made = report(windows, float("nan"), skips=skips)
    made._skipped = torch.tensor(True)
    made._reason = lambda: reason
    return made


def start(windows: int = 0, **facts: Any) -> Start:
    known: dict[str, Any] = {
        "recipe": "digits",
        "folder": None,
        "model": "MLP",
        "parameters": 12345,
        "device": "cpu",
        "precision": "fp32",
        "window": "window 2 \u00d7 32 rows = 64 rows, divided by rows",
        "clocks": clocks(windows),
    }
    return Start(**(known | facts))


def evaluated(windows: int, metrics: dict[str, float], *, best: bool = False, seconds: float = 0.5) -> Evaluated:
    return Evaluated(metrics, clocks(windows), 360, seconds, "no_grad", best)


def stop(windows: int, **facts: Any) -> Stop:
    known: dict[str, Any] = {
        "reason": "3 epochs done",
        "clocks": clocks(windows),
        "skips": 0,
        "seconds": 2.0,
        "metrics": {"loss": 0.25, "accuracy": 0.97},
        "best": ("accuracy", 0.98, 10),
        "files": {"model": Path("outputs/model.safetensors"), "metrics": Path("outputs/metrics.jsonl")},
        "go_on": "trainer train recipe=digits run=mine",
    }
    return Stop(**(known | facts))
