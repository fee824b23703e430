"""What can be asked of a run's next window, which changes nothing. A question imports what it needs when asked."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from trainer import modes, rng
from trainer.feed import Feed
from trainer.step import Step

if TYPE_CHECKING:
    from trainer.certificate import Certificate
    from trainer.diagnose.graph import Graph
    from trainer.diagnose.per_sample import PerSample
    from trainer.diagnose.replay import Replay


def certify(
    step: Step, feed: Feed, of_gradient: Mapping[str, Any], gradcheck: Sequence[str], meant: Sequence[str]
) -> "Certificate":
    """See `Trainer.certify`."""
    with _next_window(step, feed) as window:
        return certify_window(step, of_gradient, window, gradcheck, meant)


def certify_window(step: Step, of_gradient: Mapping[str, Any], window: Any, *checked: Any) -> "Certificate":
    """The certificate of a window that is drawn already."""
    from trainer.certificate.entry import certify_step

    return certify_step(step, window, of_gradient, *checked)


def graph(step: Step, feed: Feed, every_node: bool) -> "Graph":
    """See `Trainer.graph`."""
    from trainer.diagnose.graph import graph

    with _next_window(step, feed) as window:
        return graph(step.model, step.objective, window[0], every_node=every_node)


def largest_gradients(step: Step, source: Any, most: int) -> "PerSample":
    """See `Trainer.largest_gradients`. `source`: the rows in their own order."""
    from trainer.diagnose.per_sample import per_sample

    return per_sample(
        step.model,
        step.objective,
        source,
        most=most,
        parameters=step.parameters.by_name,
        coefficients=step.settings.coefficients,
        count_rows=step.weigher.count_rows,
    )


def replay(step: Step, feed: Feed) -> "Replay":
    """See `Trainer.replay`."""
    from trainer.diagnose.capture import capture
    from trainer.diagnose.replay import replay

    with _next_window(step, feed) as window:
        caught = capture(step, window, generators=rng.capture(), rows=feed.row_numbers(len(window)))
        return replay(caught, step.model, step.objective, count_rows=step.weigher.count_rows)


@contextmanager
def _next_window(step: Step, feed: Feed) -> Iterator[Any]:
    with rng.preserved(), modes.in_train(step.model):
        yield next(feed.windows())
