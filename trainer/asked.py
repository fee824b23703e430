"""What can be asked of a run as it is configured, which changes nothing. A friend of loop.py: it reads what is private
there. What a question needs is imported when it is asked."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from trainer import modes, rng
from trainer.data.sources import source_of
from trainer.device import placed
from trainer.errors import ConfigError
from trainer.gradient.precision import width

if TYPE_CHECKING:
    from trainer.certificate import Certificate
    from trainer.diagnose.graph import Graph
    from trainer.diagnose.per_sample import PerSample
    from trainer.diagnose.replay import Replay
    from trainer.loop import Trainer


def certify(trainer: "Trainer", gradcheck: Sequence[str], meant: Sequence[str]) -> "Certificate":
    """See `Trainer.certify`."""
    with _next_window(trainer) as window:
        return certify_window(trainer, window, gradcheck, meant)


def certify_window(trainer: "Trainer", window: Any, *checked: Any) -> "Certificate":
    """The certificate of a window that is drawn already."""
    from trainer.certificate.entry import certify_step

    return certify_step(trainer.step, window, trainer._of_gradient, *checked)


def graph(trainer: "Trainer", every_node: bool) -> "Graph":
    """See `Trainer.graph`."""
    from trainer.diagnose.graph import graph

    with _next_window(trainer) as window:
        if not window:
            raise ConfigError("this rank has no micro-batch in the first window: draw the graph on the first rank.")
        return graph(trainer.model, trainer.step.objective, window[0], every_node=every_node)


def largest_gradients(trainer: "Trainer", most: int) -> "PerSample":
    """See `Trainer.largest_gradients`."""
    from trainer.diagnose.per_sample import per_sample

    cut = replace(trainer.settings.data, shuffle=False, drop_last=False)
    return per_sample(
        trainer.model,
        trainer.step.objective,
        placed(source_of(trainer._data, cut), trainer._device, width(trainer.settings.precision)),
        most=most,
        parameters=trainer.step.parameters.by_name,
        coefficients=trainer.settings.gradient.coefficients,
        count_rows=trainer._of_gradient["count_rows"],
    )


def replay(trainer: "Trainer") -> "Replay":
    """See `Trainer.replay`."""
    from trainer.diagnose.capture import capture
    from trainer.diagnose.replay import replay

    step = trainer.step
    with _next_window(trainer) as window:
        rows = trainer._feed.row_numbers(len(window))
        caught = capture(step, window, generators=rng.capture(), rows=rows)
        return replay(caught, trainer.model, step.objective, count_rows=step.weigher.count_rows)


@contextmanager
def _next_window(trainer: "Trainer") -> Iterator[Any]:
    with rng.preserved(), modes.in_train(trainer.model):
        yield next(trainer._feed.windows())
