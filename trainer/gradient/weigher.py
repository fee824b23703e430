"""How much each micro-batch counts, told by the objective, by its data or by its rows."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from trainer.errors import ConfigError, ObjectiveError, did_you_mean
from trainer.gradient.objective import checked_weight, who
from trainer.gradient.report import Number
from trainer.gradient.weights import first_tensor


class Weigher:
    """How much each micro-batch counts, before its forward where the data alone tells it.

    Args:
        objective: its methods `weight(micro_batch)` and `tokens(micro_batch)` are used where it has them.
        count_rows: rows of a micro-batch; None: the first dimension of the first tensor found in it.
    """

    def __init__(self, objective: Any, count_rows: Callable[[Any], int] | None = None) -> None:
        self._objective = objective
        self._declared: Callable[[Any], Any] | None = getattr(objective, "weight", None)
        if self._declared is not None and not callable(self._declared):
            raise ConfigError(f"{who(objective)} has a 'weight' that cannot be called with a micro-batch.")
        self._full: Callable[[Any], Number] | None = getattr(objective, "full_weight", None)
        self._tokens: Callable[[Any], int] | None = getattr(objective, "tokens", None)
        self.counts_tokens = self._tokens is not None
        self.count_rows = count_rows
        self.declares = self._declared is not None
        self.names_weights = False
        """Whether the objective tells a weight for each term by name, seen once it was asked."""

    def rows(self, micro_batch: Any) -> int:
        if self.count_rows is not None:
            return int(self.count_rows(micro_batch))
        tensor = micro_batch[0] if type(micro_batch) is tuple else None
        if type(tensor) is not Tensor:
            tensor = first_tensor(micro_batch)
        shape = tensor.shape
        return shape[0] if shape else 1

    def leaves_nothing_out(self, data: tuple[Tensor, ...]) -> bool:
        """Whether every target of the data counts, so that its micro-batches need not be looked at one by one."""
        if self._full is None or self._declared is None or len(data) != 2:
            return False
        return bool(self._declared(data) == self._full(data))

    def tokens(self, micro_batch: Any) -> int:
        return 0 if self._tokens is None else int(self._tokens(micro_batch))

    def mean_weight(self, name: str, micro_batch: Any, full: bool = False) -> Number:
        """What a mean named so counts in this micro-batch; `full` says that nothing in it is left out."""
        if full and self._full is not None:
            return self._full(micro_batch)
        if self._declared is None:
            return float(self.rows(micro_batch))
        return self._named(name, self._declared(micro_batch))

    def weights(self, micro_batch: Any, names: Iterable[str], full: bool = False) -> list[Number]:
        """What a mean counts whatever its name is, and what means of these names count where the objective names them.

        Where it names them the first is 0, else the others are.
        """
        asks = self._declared is not None and not (full and self._full is not None)
        declared = self._declared(micro_batch) if self._declared is not None and asks else None
        if isinstance(declared, Mapping):
            self.names_weights = True
            return [0.0, *(self._named(name, declared) if name in declared else 0.0 for name in names)]
        weight = self.mean_weight("", micro_batch, full) if declared is None else self._named("", declared)
        return [weight, *(0.0 for _ in names)]

    def _named(self, name: str, weight: Any) -> Number:
        if type(weight) is not float and isinstance(weight, Mapping):
            self.names_weights = True
            if name not in weight:
                raise ObjectiveError(
                    f"the objective's weight(micro_batch) does not name '{name}': {did_you_mean(name, weight)}"
                )
            weight = weight[name]
        return checked_weight(name, weight, self._objective)
