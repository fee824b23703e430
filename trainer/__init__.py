"""A training loop whose subject is the gradient. The public names are loaded when they are first used."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.certificate.certificate import Certificate, Finding
    from trainer.certificate.entry import certify
    from trainer.data import Split
    from trainer.data.windows import Window, windows
    from trainer.diagnose.capture import capture
    from trainer.diagnose.graph import graph
    from trainer.diagnose.per_sample import per_sample
    from trainer.diagnose.replay import Replay, replay
    from trainer.errors import (
        CheckpointError,
        ConfigError,
        DataError,
        DivergedError,
        GradientError,
        ObjectiveError,
        TrainerError,
        WrongGradientError,
    )
    from trainer.gradient.model_loss import model_loss
    from trainer.gradient.objective import Cotangents, Sum, supervised
    from trainer.gradient.report import Report
    from trainer.loop import Trainer
    from trainer.settings import Settings
    from trainer.step import Step

__version__ = "0.1.0"

# Importing trainer must not import torch: `trainer --help` answers at once.
_HOMES = {
    "Step": "trainer.step",
    "Trainer": "trainer.loop",
    "Split": "trainer.data",
    "Window": "trainer.data.windows",
    "windows": "trainer.data.windows",
    "Sum": "trainer.gradient.objective",
    "Cotangents": "trainer.gradient.objective",
    "supervised": "trainer.gradient.objective",
    "model_loss": "trainer.gradient.model_loss",
    "graph": "trainer.diagnose.graph",
    "per_sample": "trainer.diagnose.per_sample",
    "capture": "trainer.diagnose.capture",
    "replay": "trainer.diagnose.replay",
    "Replay": "trainer.diagnose.replay",
    "Report": "trainer.gradient.report",
    "Certificate": "trainer.certificate.certificate",
    "Finding": "trainer.certificate.certificate",
    "certify": "trainer.certificate.entry",
    "Settings": "trainer.settings",
    "TrainerError": "trainer.errors",
    "ConfigError": "trainer.errors",
    "DataError": "trainer.errors",
    "DivergedError": "trainer.errors",
    "CheckpointError": "trainer.errors",
    "ObjectiveError": "trainer.errors",
    "GradientError": "trainer.errors",
    "WrongGradientError": "trainer.errors",
}

__all__ = [
    "Certificate",
    "CheckpointError",
    "ConfigError",
    "Cotangents",
    "DataError",
    "DivergedError",
    "Finding",
    "GradientError",
    "ObjectiveError",
    "Replay",
    "Report",
    "Settings",
    "Split",
    "Step",
    "Sum",
    "Trainer",
    "TrainerError",
    "Window",
    "WrongGradientError",
    "capture",
    "certify",
    "graph",
    "model_loss",
    "per_sample",
    "replay",
    "supervised",
    "windows",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'trainer' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
