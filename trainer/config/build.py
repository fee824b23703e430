"""From a checked config to a Trainer: the one place where what the config names is made, in a fixed order."""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer import torchrun
from trainer.config.door import Door
from trainer.config.schema import RunConfig
from trainer.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from trainer.loop import Trainer

TAKEN = ("steps", "rows", "tokens")
"""The clocks that a schedule may follow."""


def places(config: RunConfig) -> Iterator[tuple[Mapping[str, Any], str, str]]:
    """Every node that is built, with its key and the kind of its place."""
    kinds = {"model": "model", "objective": "objective", "optimizer": "optimizer", "schedule": "schedule"}
    for name, node in config.nodes.items():
        if node is not None:
            yield (
                node,
                "data.source" if name == "source" else name,
                kinds.get(name, "source" if name == "source" else "other"),
            )
    for name, node in config.others.items():
        yield node, f"loggers.others.{name}", "other"
    for key, node in config.transforms.items():
        yield node, key, "other"


def judge(config: RunConfig, door: Door) -> None:
    """Refuse what the door refuses by name, before torch is imported or anything else runs."""
    for node, key, kind in places(config):
        door.judge(node, key, kind)


def build(config: RunConfig, door: Door, folder: Path | None = None, loggers: Sequence[Any] = ()) -> "Trainer":
    """A Trainer with all that the config names, seeded before the model is made: `seed` determines the start.

    Args:
        config: from `schema.read`.
        door: what finds and calls the `_target_`s.
        folder: where the run writes; None writes nothing.
        loggers: further ones, told before those of the config.
    """

    from trainer import kernels
    from trainer.loop import Trainer
    from trainer.optim.groups import parameter_groups

    settings = config.settings
    make = _maker(config, door)
    model = make("model")
    objective = make("objective")
    train, evaluation = split(make("data.source"))
    groups = parameter_groups(model, config.groups)
    with kernels.without_compiler():
        optimizer = make("optimizer", groups if config.groups else groups[0]["params"])
    schedule = _schedule(config, door, optimizer, train)
    return Trainer(
        model,
        objective,
        optimizer,
        data=train,
        evaluation_data=evaluation,
        metrics=make("metrics"),
        schedule=schedule,
        transforms=tuple(make(key) for key in config.transforms),
        skip_if=make("skip_if"),
        folder=folder,
        loggers=(*loggers, *(make(f"loggers.others.{name}") for name in config.others)),
        recipe=config.words.recipe,
        settings=settings,
        config=dict(config.plain),
    )


def model_and_objective(config: RunConfig, door: Door) -> tuple[Any, Any]:
    """Only these two, made as `build` makes them; the model where it computes, in its precision."""
    from torch import nn

    from trainer.device import device_of
    from trainer.gradient.precision import width

    make = _maker(config, door)
    model, objective = make("model"), make("objective")
    if isinstance(model, nn.Module):
        model.to(device_of(config.settings.device, model), width(config.settings.precision))
    return model, objective


def _maker(config: RunConfig, door: Door) -> Callable[..., Any]:
    """What makes the node of a key, None where it has none. The generators are seeded, as `seed` says."""
    from trainer import rng

    judge(config, door)
    if config.settings.seed is not None:
        rng.seed_all(config.settings.seed)
    made = {key: (node, kind) for node, key, kind in places(config)}

    def make(key: str, *first: Any) -> Any:
        if key not in made:
            return None
        node, kind = made[key]
        return door.make(node, key, kind, *first)

    return make


def split(source: Any) -> tuple[Any, Any]:
    """What a data source returned as (training data, held-out data or None)."""
    from trainer.data import Split

    if isinstance(source, Split):
        return source.train, source.evaluation
    if isinstance(source, tuple | list | Mapping) or source is None:
        raise ConfigError(
            f"data.source returned {type(source).__name__}: return Split(train, evaluation) of trainer.data, each a "
            "tuple of tensors, a dataset, an iterable or a DataLoader (evaluation may be None)."
        )
    return source, None


def _schedule(config: RunConfig, door: Door, optimizer: Any, train: Any) -> Any:
    node = config.nodes["schedule"]
    if node is None:
        return None
    if str(node["_target_"]).startswith("torch."):
        return door.make(node, "schedule", "schedule", optimizer)
    target = door.find(node["_target_"], "schedule", "schedule")
    if node.get("total") is None and "total" in inspect.signature(target).parameters:
        total = ticks(config, str(node.get("clock", "steps")), train)
        # A run of a few steps, as with debug=fast, is the beginning of a schedule that was made for a longer one.
        parts = [node.get("warmup", 0), node.get("decay", 0)]
        node = {**node, "total": max(total, sum(part for part in parts if isinstance(part, int)))}
    return door.make(node, "schedule", "schedule")


def ticks(config: RunConfig, clock: str, train: Any) -> int:
    """How many ticks of a clock the limits allow. Raises ConfigError where they do not tell."""
    if clock not in TAKEN:
        raise ConfigError(f"schedule.clock={clock!r} is not possible: {did_you_mean(clock, TAKEN)}")
    limits = config.settings.limits
    bounds = [getattr(limits, clock, None)]
    if limits.epochs is not None:
        bounds.append(_of_epochs(config, clock, limits.epochs, train))
    known = [int(bound) for bound in bounds if bound is not None]
    if not known:
        raise ConfigError(
            f"schedule.total is not set, and the limits do not tell how many {clock} there will be: set schedule.total"
            f"{f', or limits.{clock}' if clock in ('steps', 'rows') else ''}."
        )
    return max(1, min(known))


def _of_epochs(config: RunConfig, clock: str, epochs: int, train: Any) -> int | None:
    """How many ticks so many epochs make, where the data tells its length. A window ends with its epoch."""
    from trainer.data import source_of

    settings = config.settings
    source = source_of(train, settings.data)
    length = source.length()
    if clock == "steps" and length is not None:
        ranks = torchrun.world_here() if settings.distributed != "none" else 1
        return epochs * math.ceil(math.ceil(length / ranks) / settings.gradient.accumulation_steps)
    if clock == "rows" and source.cuts_rows and length is not None:
        rows = len(train[0]) if isinstance(train, tuple) else len(train)
        return epochs * (rows - rows % settings.data.batch_size if settings.data.drop_last else rows)
    return None
