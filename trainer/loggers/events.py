"""What loggers are told: five events, each with its facts. A logger is any object with some of these methods.

`start`, `evaluate`, `skip` and `stop` come when they happen; `step` comes every so many ticks of the logging clock,
so that what reads a device value is paid for seldom. A logger may also have `tick()`, called after every window
without any value: what draws a bar needs no more. It may have `look(parameters, report)`, called before `step`: the
parameters under training by name, after the window's step, with their gradients as the optimizer left them (torch's
leave the one that the step was taken with, clipped where it was). It may have `found(event)`: something about the
gradient that a person should know, said once. And it may have `flush()`, called before a checkpoint
is saved: what it keeps in line must then be in its file, or a run killed later and resumed from there would miss it.
Nothing else in the package prints.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from trainer.diagnose.history import History
from trainer.gradient.clocks import counted
from trainer.gradient.report import Report


@dataclass(frozen=True)
class Start:
    """How the run begins: what the console shows and what goes into the files' heads."""

    recipe: str | None
    folder: Path | None
    model: str
    parameters: int
    device: str
    precision: str
    window: str
    """The window as an equation: `window 4 × 64 rows = 256 rows, divided by rows`."""
    notes: list[str] = field(default_factory=list)
    """What was assumed, and what the user may want to know, a sentence each."""
    config: dict[str, Any] = field(default_factory=dict)
    total_windows: int | None = None
    """How many windows the run will draw in all, where the limits tell."""
    clocks: dict[str, int] = field(default_factory=dict)
    """The clocks at the start: all zero, or those of the checkpoint that the run goes on from."""
    resumed_from: Path | None = None
    evaluated_at: int = -1
    """The windows clock at the last evaluation before the checkpoint."""
    step_clock: str = "steps"
    """The clock on TensorBoard's axis."""
    history: History | None = None
    """The gradient norm of each layer, which grows as the run goes on."""
    measured: tuple[str, ...] = ()
    """How the tags begin that instruments will put into `report.measured`."""


@dataclass(frozen=True)
class Evaluated:
    """One evaluation: the weighted means over all held-out rows, with the loss as `loss`."""

    metrics: dict[str, float]
    clocks: dict[str, int]
    rows: int
    seconds: float
    grad_mode: str
    best: bool
    """Whether this is the best so far by `best.metric`."""


@dataclass(frozen=True)
class Found:
    """What the audit of the first step, or the watch over gradients, has found."""

    text: str
    """One sentence."""
    clocks: dict[str, int]


@dataclass(frozen=True, repr=False)
class Stop:
    """How the run ended."""

    reason: str
    """Why: `3 epochs done`, `stopped by Ctrl-C`, `no new best in 5 evaluations`."""
    clocks: dict[str, int]
    skips: int
    seconds: float
    metrics: dict[str, float]
    """The last evaluation's."""
    best: tuple[str, float, int] | None
    """The best metric's name, its value, and the step where it was reached."""
    files: dict[str, Path] = field(default_factory=dict)
    """What lies where: {"model": …, "checkpoint": …, "best": …, "metrics": …, "tensorboard": …}."""
    go_on: str | None = None
    """The words that continue the run, where it can go on."""
    health: list[str] = field(default_factory=list)
    """How the gradient did, in words: a verdict, and a line for each other thing."""

    def __repr__(self) -> str:
        steps = counted(self.clocks.get("steps", 0), "step")
        said = [f"{self.reason}: {steps}, {counted(self.skips, 'skip')}, {self.seconds:.1f} s"]
        said += [f"{name} {value:.4g}" for name, value in self.metrics.items()]
        if self.best is not None:
            said.append("best {} {:.4g} at step {}".format(*self.best))
        return f"Stop({', '.join(said)})"


class Logger(Protocol):
    """The five events."""

    def start(self, event: Start) -> None: ...

    def step(self, report: Report, seconds: float) -> None:
        """A window's report, and the seconds since the run started."""

    def evaluate(self, event: Evaluated, model: Any) -> None: ...

    def skip(self, report: Report) -> None: ...

    def stop(self, event: Stop) -> None: ...
