"""The autograd graph of one forward, drawn: as SVG, as text for Graphviz, as TensorBoard's graph."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer import rng
from trainer.diagnose.dot import dot
from trainer.diagnose.groups import grouped
from trainer.diagnose.layout import drawn
from trainer.diagnose.picture import Picture, picture, size
from trainer.diagnose.svg import svg
from trainer.diagnose.trace import Trace, tensors_in
from trainer.errors import ConfigError
from trainer.gradient.objective import Objective, as_objective, terms_of
from trainer.gradient.parameters import named_modules, named_parameters
from trainer.gradient.skips import KeptBuffers


class Graph:
    """A drawn graph.

    Attributes:
        picture: boxes and arrows, told apart by what they are.
    """

    def __init__(self, found: Picture, name: str, every_node: bool) -> None:
        self.picture = found
        self._name = name
        self._collapse = not every_node

    @property
    def title(self) -> str:
        count = sum(box.kind == "operation" for box in self.picture.boxes)
        return f"{self._name}: {count} operations, keeps {size(self.picture.saved)} for backward"

    def svg(self) -> str:
        """One SVG document; repeats of a module drawn once and counted, unless every node was asked for."""
        return svg(drawn(*grouped(self.picture, self._collapse)), self.title)

    def dot(self) -> str:
        """Text for Graphviz, as `dot -Tsvg` reads it."""
        return dot(self.picture, self._collapse)

    def save(self, path: str | Path) -> Path:
        """Write it: as DOT where the name ends in .dot or .gv, as SVG where it ends in .svg.

        Raises ConfigError for another ending, or where the file cannot be written.
        """
        path = Path(path)
        if path.suffix not in (".svg", ".dot", ".gv"):
            raise ConfigError(f"{path}: a graph is written as .svg or .dot, not as '{path.suffix or path.name}'.")
        try:
            path.write_text(self.svg() if path.suffix == ".svg" else self.dot(), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{path} cannot be written ({error.strerror or error}): choose another place.") from error
        return path

    def _repr_svg_(self) -> str:
        """How a notebook shows it."""
        return self.svg()


def graph(
    model: Any,
    objective: Objective | Callable[..., Any],
    micro_batch: Any = None,
    *,
    leaves: Mapping[str, Tensor] | None = None,
    every_node: bool = False,
) -> Graph:
    """Run one forward and draw what autograd recorded of it. Nothing is changed: no gradient, no draw is used up.

    Args:
        model: an nn.Module, or any object that holds leaf tensors.
        objective: maps (model, micro-batch) to what is differentiated; see `Step`.
        micro_batch: what it is called with.
        leaves: names of further tensors that require a gradient, where the model does not hold them.
        every_node: a box for each node of the graph and each repeat; without it one for each call.

    Raises ObjectiveError where the objective's answer cannot be differentiated.
    """
    objective = as_objective(objective, model)
    trace = Trace(named_modules(model))
    buffers = KeptBuffers(model)
    buffers.keep()
    try:
        with rng.preserved(), trace:
            terms = terms_of(objective(model, micro_batch), objective)
    finally:
        buffers.put_back()
    roots = {term.name: term.value for term in terms}
    found = picture(trace, roots, {**named_parameters(model), **(leaves or {})}, tensors_in(micro_batch), every_node)
    return Graph(found, type(model).__name__, every_node)
