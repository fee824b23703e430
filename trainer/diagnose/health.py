"""A run's instruments: what they find is told to the loggers, each thing once."""

from collections.abc import Callable, Mapping
from typing import Any

from trainer.diagnose.audit import FirstStep, Wiring
from trainer.diagnose.history import History
from trainer.diagnose.instrument import Instrument, Trouble
from trainer.diagnose.noise import NoiseScale
from trainer.diagnose.retention import Retention
from trainer.diagnose.skipped import Skipped
from trainer.diagnose.sources import NameSources, SourceGradients
from trainer.diagnose.terms import TermGradients
from trainer.diagnose.update_ratio import UpdateRatio
from trainer.diagnose.watch import Watch
from trainer.errors import ConfigError, WrongGradientError
from trainer.gradient.report import Report
from trainer.loggers.events import Found
from trainer.settings import Settings


def instruments(
    step: Any, settings: Settings, found: Callable[[str], None], sources: NameSources | None = None
) -> dict[str, Instrument]:
    """Those that the settings ask for, by the name that their state is saved under."""
    wanted = settings.diagnose
    chosen: dict[str, Instrument] = {}
    if wanted.audit:
        chosen |= {"watch": Watch(), "wiring": Wiring(step), "skipped": Skipped(step)}
        chosen["retention"] = retention = Retention(step, found)
        step.after_backward.append(retention)
    if wanted.noise_scale is not None:
        if settings.gradient.accumulation_steps < 2:
            raise ConfigError(
                "diagnose.noise_scale compares the micro-batches of a window with the whole, and here a window is "
                "one micro-batch: set gradient.accumulation_steps to 2 or more."
            )
        chosen["noise_scale"] = noise_scale = NoiseScale(step, wanted.noise_scale)
        step.after_backward.append(noise_scale)
    if wanted.update_ratio is not None:
        chosen["update_ratio"] = UpdateRatio(step, wanted.update_ratio)
    if wanted.term_gradients is not None:
        chosen["term_gradients"] = TermGradients(step, wanted.term_gradients)
    if wanted.source_gradients is not None:
        chosen["source_gradients"] = SourceGradients(step, wanted.source_gradients, sources)
    elif sources is not None:
        raise ConfigError("sources= was given, and nothing looks at them: set diagnose.source_gradients, to 50 say.")
    if settings.loggers.heat_map and settings.loggers.tensorboard:
        chosen["history"] = History(settings.loggers.axis)
    return chosen


class Health:
    """Stands around a run's step.

    Args:
        step: the run's.
        tell: what hears of each finding.
        settings: the run's; of them `diagnose`.
        sources: tells the sources of a micro-batch's rows.

    Attributes:
        step: what the run calls for its steps: the audit until a first one was taken, from then on the step itself.
    """

    def __init__(
        self, step: Any, tell: Callable[[Found], None], settings: Settings, sources: NameSources | None = None
    ) -> None:
        self._step = step
        self._tell = tell
        self._seen: list[Trouble] = []
        self._instruments = instruments(step, settings, lambda text: self._trouble("graphs kept", text), sources)
        self.step: Callable[..., Report] = step
        if settings.diagnose.audit:
            self.step = FirstStep(step, lambda text: self._trouble("first step", text), self._is_over)

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
            self.found(certificate.verdict())
            return step(window, *others)

        self.step = checked

    def notes(self) -> list[str]:
        """What can be said before the first step."""
        return [note for one in self._instruments.values() for note in one.notes()]

    def look(self, report: Report) -> None:
        """Now and then, when a report is read anyway."""
        for one in self._instruments.values():
            for finding in one.look(self._step.parameters.by_name, report):
                self.found(finding)

    def skip(self, report: Report) -> None:
        """A window was skipped."""
        for one in self._instruments.values():
            one.skip(self._step.parameters.by_name, report)

    @property
    def history(self) -> History | None:
        """The gradient norm of each layer so far, where it is kept."""
        history = self._instruments.get("history")
        return history if isinstance(history, History) else None

    @property
    def tags(self) -> tuple[str, ...]:
        """How the tags begin that the instruments measure."""
        return tuple(tag for one in self._instruments.values() for tag in one.tags)

    def words(self) -> list[str]:
        """How the gradient did, for the run's end: a verdict, and a line for each trouble and each other thing.

        Of a healthy gradient it is one line, but for what was measured on request. Empty where nothing was looked at.
        """
        troubles = [*self._seen, *(trouble for one in self._instruments.values() for trouble in one.troubles())]
        words = [line for one in self._instruments.values() for line in one.words()]
        if troubles:
            verdict = f"not well: {', '.join(dict.fromkeys(word for word, _ in troubles))}"
            return [verdict, *(f"{word}: {text}" for word, text in troubles), *words]
        looked = "watch" in self._instruments and self._instruments["watch"].words()
        return [f"good: {words[0]}", *words[1:]] if looked else words

    def state_dict(self) -> dict[str, Any]:
        """What each instrument has seen and said so far."""
        states: dict[str, Any] = {name: one.state_dict() for name, one in self._instruments.items()}
        seen = [list(trouble) for trouble in self._seen]
        return {name: state for name, state in states.items() if state is not None} | {"seen": seen}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        for name, one in self._instruments.items():
            if state is not None and name in state:
                one.load_state_dict(state[name])
        self._seen = [] if state is None else [(word, text) for word, text in state["seen"]]
        if self._step.clocks.steps:
            self._is_over()

    def _is_over(self) -> None:
        self.step = self._step

    def _trouble(self, word: str, text: str) -> None:
        self._seen.append((word, text.rstrip(".")))
        self.found(text)

    def found(self, text: str) -> None:
        """A sentence for whoever reads the run's output."""
        self._tell(Found(text, self._step.clocks.as_dict()))
