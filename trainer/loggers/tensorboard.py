"""TensorBoard: one event for all scalars of a step, written in line, as TensorBoard's protobufs.

`torch.utils.tensorboard` takes longer to import, writes an event for each scalar, and hands it to a thread that
gains nothing under Python's lock.
"""

import math
import time
from os import getpid
from pathlib import Path
from typing import Any

from trainer.errors import ConfigError, TrainerError
from trainer.gradient.report import Report
from trainer.loggers.events import Evaluated, Start, Stop
from trainer.loggers.files import RecordFile, make_folder
from trainer.loggers.rate import Rate
from trainer.loggers.records import record

# TensorBoard keeps scalars as float32: what is beyond its range has no point in a chart.
_LARGEST = 3.4028234663852886e38
_PREFIX = "events.out.tfevents."
_LAYOUT = {
    "loss: training against evaluation": ["loss/total", "eval/loss"],
    "gradient: norm": ["gradient/norm"],
    "gradient: clip factor": ["gradient/clip_factor"],
}


class TensorBoard:
    """Writes an event file into the folder.

    Tags: loss/, gradient/, optimizer/, clock/, time/ and eval/. The axis is the clock that `Start.step_clock` names.
    A value that is not finite is left out, a gap in its chart, and counted as `gradient/nonfinite`. Each start opens
    a new file that tells TensorBoard to forget what older files there hold after the step that the run goes on from.
    Raises ConfigError where the file cannot be opened, and TrainerError where writing fails.
    """

    def __init__(self, folder: str | Path) -> None:
        # Here, so that a run without TensorBoard does not pay for its import.
        from tensorboard.compat.proto.event_pb2 import Event

        self.folder = Path(folder)
        self.path: Path | None = None
        self.nonfinite = 0
        self._new_event = Event
        self._file: RecordFile | None = None
        self._axis = "steps"
        self._rate = Rate({})
        self._skips = 0
        self._tags: tuple[str, ...] = ()
        self._event: Any = None
        self._values: list[Any] = []

    def start(self, event: Start) -> None:
        self._close()
        self._file = _open(self.folder)
        self.path = self._file.path
        self._axis = event.step_clock
        self._rate = Rate(event.clocks)
        self.nonfinite = 0
        self._skips = _skips(event.clocks)
        resumed = any(event.clocks.values())
        # TensorBoard forgets everything from this step on; what was written at the checkpoint's own step stays.
        begin = self._step_of(event.clocks) + 1 if resumed else 0
        for head in _heads(self._new_event, begin, event.config):
            self._add(head)
        self._file.flush()

    def step(self, report: Report, seconds: float) -> None:
        clocks = report.clocks
        terms = report.terms
        scalars: dict[str, float] = {"loss/total": report.loss}
        if len(terms) > 1 or "loss" not in terms:
            for name, value in terms.items():
                scalars["loss/" + name] = value
        norm, factor = report.grad_norm, report.clip_factor
        if norm is not None:
            scalars["gradient/norm"] = norm
        if factor is not None:
            scalars["gradient/clip_factor"] = factor
        self._skips = _skips(clocks)
        scalars["gradient/skips"] = self._skips
        scalars["optimizer/lr"] = report.lr
        for name, count in clocks.items():
            scalars["clock/" + name] = count
        rate = self._rate.measure(clocks, seconds)
        if rate is not None:
            scalars["time/steps_per_second"], scalars["time/rows_per_second"] = rate
        self._write(self._step_of(clocks), scalars)

    def evaluate(self, event: Evaluated, model: Any = None) -> None:
        self._rate.pause(event.seconds)
        self._write(self._step_of(event.clocks), {f"eval/{name}": value for name, value in event.metrics.items()})
        self.flush()

    def skip(self, report: Report) -> None:
        """Nothing at once: the next step's `gradient/skips` counts it, or the end does."""

    def stop(self, event: Stop) -> None:
        try:
            if self._file is not None and _skips(event.clocks) != self._skips:
                self._write(self._step_of(event.clocks), {"gradient/skips": _skips(event.clocks)})
        finally:
            self._close()

    def flush(self) -> None:
        """Write what waits: called before a checkpoint is saved, so that a run that goes on from it misses no event."""
        if self._file is not None:
            self._file.flush()

    def _close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _step_of(self, clocks: dict[str, int]) -> int:
        if self._axis not in clocks:
            known = ", ".join(clocks) or "none"
            raise ConfigError(f"TensorBoard's axis is the clock '{self._axis}', but the clocks here are: {known}.")
        return clocks[self._axis]

    def _write(self, step: int, scalars: dict[str, float]) -> None:
        # The root of the sum of squares: one comparison that finds a NaN, an infinity or what is too large among all.
        if not math.hypot(*scalars.values()) <= _LARGEST:
            finite = {tag: value for tag, value in scalars.items() if abs(value) <= _LARGEST}
            self.nonfinite += len(scalars) - len(finite)
            scalars = finite
        if self.nonfinite:
            scalars["gradient/nonfinite"] = self.nonfinite
        tags = tuple(scalars)
        if tags != self._tags:
            # An event is kept as long as its tags stay: filling it in takes a fifth of building it.
            self._tags, self._event = tags, self._new_event()
            self._values = [self._event.summary.value.add(tag=tag) for tag in tags]
        for slot, value in zip(self._values, scalars.values(), strict=True):
            slot.simple_value = value
        self._event.step = step
        self._add(self._event)

    def _add(self, event: Any) -> None:
        if self._file is None:
            raise TrainerError(f"no event file is open in {self.folder}: call start(...) first.")
        event.wall_time = time.time()
        self._file.write(record(event.SerializeToString()))


def _skips(clocks: dict[str, int]) -> int:
    # Every window ends in a step or in a skip: this count survives a resume.
    return clocks.get("windows", 0) - clocks.get("steps", 0)


def _open(folder: Path) -> RecordFile:
    """A new event file whose name sorts behind those that are there: that is the order in which TensorBoard reads."""
    make_folder(folder)
    seconds = int(time.time())
    for path in folder.glob(_PREFIX + "*"):
        stamp = path.name.removeprefix(_PREFIX).split(".")[0]
        if stamp.isdecimal():
            seconds = max(seconds, int(stamp) + 1)
    return RecordFile(folder / f"{_PREFIX}{seconds:010d}.{getpid()}", new=True)


def _heads(new_event: Any, begin: int, config: dict[str, Any]) -> list[Any]:
    """What a file begins with: version, start, the config as text, the layout of the custom charts."""
    from tensorboard.compat.proto.event_pb2 import SessionLog
    from tensorboard.plugins.custom_scalar import layout_pb2
    from tensorboard.plugins.custom_scalar import metadata as custom_metadata
    from tensorboard.plugins.text import metadata as text_metadata

    start = new_event(step=begin, session_log=SessionLog(status=SessionLog.START))
    heads = [new_event(file_version="brain.Event:2"), start]
    if config:
        text = new_event(step=begin)
        value = text.summary.value.add(
            tag="config/text_summary", metadata=text_metadata.create_summary_metadata("config", "")
        )
        _fill(value.tensor, f"```yaml\n{_yaml(config)}```".encode())
        heads.append(text)
    charts = [
        layout_pb2.Chart(title=title, multiline=layout_pb2.MultilineChartContent(tag=[f"^{tag}$" for tag in tags]))
        for title, tags in _LAYOUT.items()
    ]
    layout = new_event(step=begin)
    value = layout.summary.value.add(
        tag=custom_metadata.CONFIG_SUMMARY_TAG, metadata=custom_metadata.create_summary_metadata()
    )
    category = layout_pb2.Category(title="run", chart=charts)
    _fill(value.tensor, layout_pb2.Layout(category=[category]).SerializeToString())
    return [*heads, layout]


def _fill(tensor: Any, text: bytes) -> None:
    from tensorboard.compat.proto.types_pb2 import DT_STRING

    tensor.dtype = DT_STRING
    tensor.string_val.append(text)


def _yaml(config: dict[str, Any]) -> str:
    import yaml

    return str(yaml.safe_dump(_plain(config), sort_keys=False, allow_unicode=True))


def _plain(value: Any) -> Any:
    """The value in the types that YAML has; anything else as its text."""
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, bool | int | float | str | None) else str(value)
