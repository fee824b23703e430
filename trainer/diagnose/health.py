"""A run's audit and its watch over gradients: what they find is told to the loggers, each thing once."""

from collections.abc import Callable, Mapping
from typing import Any

from trainer.diagnose.audit import FirstStep, wiring
from trainer.diagnose.noise import NoiseScale
from trainer.diagnose.retention import Retention
from trainer.diagnose.watch import Watch
from trainer.errors import ConfigError, WrongGradientError
from trainer.gradient.report import Report
from trainer.loggers.events import Found
from trainer.settings import Settings


class Health:
    """Stands around a run's step.

    Args:
        step: the run's.
        tell: what hears of each finding.
        settings: the run's; of them `diagnose`.

    Attributes:
        step: what the run calls for its steps: the audit until a first one was taken, from then on the step itself.
    """

    def __init__(self, step: Any, tell: Callable[[Found], None], settings: Settings) -> None:
        self._step = step
        self._tell = tell
        wanted = settings.diagnose
        self._watch = Watch() if wanted.audit else None
        self.step: Callable[..., Report] = step
        if wanted.audit and not step.clocks.windows:
            self.step = FirstStep(step, self._found, self._is_over)
        if wanted.audit:
            held = {"model": step.model, "objective": step.objective}
            step.after_backward.append(Retention(self._found, lambda: held))
        self._noise: NoiseScale | None = None
        if wanted.noise_scale is not None:
            if settings.gradient.accumulation_steps < 2:
                raise ConfigError(
                    "diagnose.noise_scale compares the micro-batches of a window with the whole, and here a window is "
                    "one micro-batch: set gradient.accumulation_steps to 2 or more."
                )
            self._noise = NoiseScale(step, wanted.noise_scale)
            step.after_backward.append(self._noise)

    def before_first(self, certify: Callable[[Any], Any]) -> None:
        """Have the first window's gradient certified before it becomes a step (`check=first_step`).

        The step then raises WrongGradientError in place of stepping on a wrong one.
        """
        step = self.step

        def checked(window: Any, *others: Any) -> Report:
            self.step = step
            certificate = certify(window)
            if not certificate.passed:
                raise WrongGradientError(
                    f"{certificate.verdict()} Nothing was trained; trainer check shows the figures."
                )
            self._found(certificate.verdict())
            return step(window, *others)

        self.step = checked

    def notes(self) -> list[str]:
        """What can be said before the first step."""
        return wiring(self._step.model, self._step.parameters.by_name) if self._watch is not None else []

    def look(self, report: Report) -> None:
        """Now and then, when a report is read anyway."""
        scale = self._noise.scale() if self._noise is not None else None
        if scale is not None:
            report.measured["gradient/noise_scale"] = scale.rows
        if self._watch is not None:
            for finding in self._watch.look(self._step.parameters.by_name, report):
                self._found(finding)

    def words(self) -> list[str]:
        """How the gradient did, for the run's end."""
        said = self._watch.health() if self._watch is not None else []
        scale = self._noise.scale() if self._noise is not None else None
        return [*said, f"{scale}: windows of fewer rows lose little"] if scale is not None else said

    def state_dict(self) -> dict[str, Any] | None:
        """What was seen and said so far; None where nothing is looked at."""
        return self._watch.state_dict() if self._watch is not None else None

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        if self._watch is not None and state is not None:
            self._watch.load_state_dict(state)
        if self._step.clocks.steps:
            self._is_over()

    def _is_over(self) -> None:
        self.step = self._step

    def _found(self, text: str) -> None:
        self._tell(Found(text, self._step.clocks.as_dict()))
