"""What is not as it was when a checkpoint was saved: keys of the config, each judged, and the machine."""

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from trainer.errors import ConfigError, did_you_mean
from trainer.gradient.clocks import counted
from trainer.settings import Settings

# What may change while a run is stopped: when it ends, what is written and looked at, and words about it. The seed is
# among them because a run that goes on keeps its own, with its order and its generators.
SAFE = (
    "limits", "loggers", "checkpoint", "evaluation", "metrics", "diagnose", "device", "seed", "check", "ranks",
    "data.timeout", "data.evaluation_batch_size",
    "recipe", "description", "run", "resume", "accept", "init", "trust",
)  # fmt: skip
_WIDTHS = {"fp64": "float64", "bf16_true": "bfloat16"}
_ABSENT = "(not there)"


def config_of(config: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """What a run is made from, as plain values: the config where there is one, and every setting."""
    made = dict(config)
    for name, value in dataclasses.asdict(settings).items():
        known = made.get(name)
        made[name] = {**known, **value} if isinstance(known, Mapping) and isinstance(value, dict) else value
    return made


def judged(
    saved: Mapping[str, Any],
    now: Mapping[str, Any],
    accept: Collection[str],
    where: Path,
    worlds: tuple[int, int] = (1, 1),
) -> list[str]:
    """What to say of the changed keys where a run goes on. Those that are not safe must be among `accept`.

    `worlds`: on how many ranks it was saved and goes on; another number is another value of `distributed`.

    Raises ConfigError that lists those that are not, with the words that accept them; and where the parameters would
    be of another dtype.
    """
    before, after = dict(_leaves(saved, "")), dict(_leaves(now, ""))
    if worlds[0] != worlds[1]:
        for side, world in zip((before, after), worlds, strict=True):
            side["distributed"] = f"{side.get('distributed', 'none')} on {counted(world, 'rank')}"
    for key in accept:
        if key not in before and key not in after:
            raise ConfigError(f"accept names '{key}', which is no key: {did_you_mean(key, {*before, *after})}")
    changed = {
        key: f"{key} {_shown(before.get(key, _ABSENT))} → {_shown(after.get(key, _ABSENT))}"
        for key in sorted({*before, *after})
        if not _equal(before.get(key, _ABSENT), after.get(key, _ABSENT))
    }
    widths = [_WIDTHS.get(str(tree.get("precision")), "float32") for tree in (before, after)]
    if widths[0] != widths[1]:
        raise ConfigError(
            f"{where} was saved with precision={before.get('precision')}, its numbers in {widths[0]}, and "
            f"precision={after.get('precision')} trains in {widths[1]}: set it back, or begin another run from its "
            f"parameters (init={where.as_posix()})."
        )
    refused = [key for key in changed if not (_is_safe(key, before, after) or key in accept)]
    if refused:
        more = dict.fromkeys((*accept, *refused))
        raise ConfigError(
            f"{where} was saved with other settings ({', '.join(changed[key] for key in refused)}): put them back as "
            f"they were, or say once more that the run is to go on with the new ones: accept=[{','.join(more)}]."
        )
    told = [text for key, text in changed.items() if key.partition(".")[0] not in ("run", "resume", "accept", "init")]
    if not told:
        return []
    schedule = now.get("schedule")
    follows = isinstance(schedule, Mapping) and schedule.get("total", "") is None and any("limits." in t for t in told)
    tail = "; the schedule's total follows the limits" if follows else ""
    return [f"changed since the checkpoint was saved: {', '.join(told)}{tail}."]


def machine(device: torch.device) -> dict[str, Any]:
    """What can change the last bits of a result without any setting."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "torch": f"{torch.__version__} ({str(torch.version.git_version)[:10]})",
        "CPU capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "device": name,
    }


def moved(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What to say where a run goes on under other circumstances."""
    other = [f"{what} {saved.get(what)} → {now[what]}" for what in now if saved.get(what) != now[what]]
    if not other:
        return []
    return [f"not the machine that saved the checkpoint ({', '.join(other)}): the last bits of results may differ."]


def _is_safe(key: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    if key == "data.workers":  # what items draw at random in this process comes from the run's own generators
        return bool(before.get(key)) and bool(after.get(key))
    return any(key == safe or key.startswith(f"{safe}.") for safe in SAFE)


def _leaves(tree: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping) and tree:
        for name, value in tree.items():
            yield from _leaves(value, f"{key}.{name}" if key else str(name))
    elif key:
        yield key, tree


def _equal(left: Any, right: Any) -> bool:
    plain = [list(one) if isinstance(one, tuple) else one for one in (left, right)]
    return bool(plain[0] == plain[1])


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)
