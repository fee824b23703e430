"""TensorBoard: one event for all scalars of a step, written in line, as TensorBoard's protobufs.

`torch.utils.tensorboard` takes longer to import, writes an event for each scalar, and hands it to a thread that
gains nothing under Python's lock.
"""

import math
import time
from collections.abc import Mapping
from os import getpid
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer.diagnose.history import layer_norms
from trainer.due import Due
from trainer.errors import ConfigError, TrainerError
from trainer.gradient import norms
from trainer.gradient.clocks import Clocks
from trainer.gradient.report import Report
from trainer.loggers import board, layers
from trainer.loggers.events import Evaluated, Found, Start, Stop
from trainer.loggers.files import RecordFile, make_folder, write_whole
from trainer.loggers.heat_map import HeatMap
from trainer.loggers.memory import Memory
from trainer.loggers.rate import Rate
from trainer.loggers.records import record

# TensorBoard keeps scalars as float32: what is beyond its range has no point in a chart.
_LARGEST = 3.4028234663852886e38
_PREFIX = "events.out.tfevents."
SKIPS_SAID = 20
HEAT_MAP = "gradient/by_layer"
HEAT_MAP_FILE = "gradient_norms.png"
_VARIANTS = 16
"""So many sets of tags have an event of their own that is kept and filled in again."""


class TensorBoard:
    """Writes an event file into the folder.

    Args:
        folder: where the event file goes.
        histograms: of parameters and gradients, every so many ticks of the clock (None: none).
        layer_norms: the norm of each parameter and of its gradient, every so many ticks (None: none).
        clock: the clock of these ticks; both come with the first report that is due.
        goes_on: whether what cannot be written is a warning and no error.

    Tags: eval/, gradient/, loss/, memory/ (MiB), optimizer/ and time/ (clocks and rates), and where asked for
    gradient_norm/ and parameter_norm/ (scalars), gradients/ and parameters/ (histograms) with the parameters' names.
    TensorBoard sorts them, and takes the first five for metrics of a sweep: so nothing comes before eval/. The axis is
    the clock that `Start.step_clock` names; a clock that tells nothing beside it (zero, or the same count) has no tag.
    A value that is not finite is left out, a gap in its chart, and counted as `gradient/nonfinite`. Each start opens
    a new file that tells TensorBoard to forget what older files there hold after the step that the run goes on from.
    Raises CheckpointError where the file cannot be opened or written.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        histograms: int | None = None,
        layer_norms: int | None = None,
        clock: str = "steps",
        goes_on: bool = False,
    ) -> None:
        # Here, so that a run without TensorBoard does not pay for its import.
        from tensorboard.compat.proto.event_pb2 import Event

        self.folder, self._goes_on = Path(folder), goes_on
        self.path: Path | None = None
        self.nonfinite = 0
        self._new_event = Event
        self._file: RecordFile | None = None
        self._axis = "steps"
        self._rate = Rate({})
        self._skips = self._skips_said = 0
        self._histograms = Due(histograms, clock, at_once=True)
        self._layer_norms = Due(layer_norms, clock, at_once=True)
        self._wants_norms = layer_norms is not None
        self._looks = histograms is not None or layer_norms is not None
        self._clocks_shown: set[str] = set()
        self._memory: Memory | None = None
        self._has_session = False
        self._has_layout = False
        self._events: dict[tuple[str, ...], tuple[Any, list[Any]]] = {}
        self._map: HeatMap | None = None
        self._measured: tuple[str, ...] = ()

    def start(self, event: Start) -> None:
        self._close()
        self._file = _open(self.folder, self._goes_on)
        self.path = self._file.path
        self._axis = event.step_clock
        self._rate = Rate(event.clocks)
        self._memory = Memory(event.device)
        self._clocks_shown = set()
        self._measured = event.measured
        self._map = None if event.history is None else HeatMap(event.history)
        self._has_layout = False
        self._has_session = bool(event.config)
        if self._looks:
            for due in (self._histograms, self._layer_norms):
                due.start(_as_clocks(event.clocks))
        self.nonfinite = 0
        self._skips, self._skips_said = _skips(event.clocks), 0
        resumed = any(event.clocks.values())
        # TensorBoard forgets everything from this step on; what was written at the checkpoint's own step stays.
        begin = self._step_of(event.clocks) + 1 if resumed else 0
        for head in board.heads(self._new_event, begin, event.config):
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
        if report._norm_after is not None and report.grad_norm_after is not None:
            scalars["gradient/norm_after"] = report.grad_norm_after  # something but the clip factor changed it
        for name, value in report.group_norms.items():
            scalars[f"gradient/norm_group_{name}"] = value
        if report.loss_scale is not None:
            scalars["gradient/loss_scale"] = report.loss_scale
        self._skips = _skips(clocks)
        scalars["gradient/skips"] = self._skips
        scalars["optimizer/lr"] = report.lr
        scalars.update(report.measured)
        scalars.update(self._told_by_clocks(clocks))
        rate = self._rate.measure(clocks, seconds)
        if rate is not None:
            scalars["time/steps_per_second"], scalars["time/rows_per_second"] = rate
        if self._memory is not None:
            for name, amount in self._memory.read().items():
                scalars["memory/" + name] = amount
        if not self._has_layout:
            there = {*scalars, *self._measured, *(["gradient_norm/"] if self._wants_norms else [])}
            self._add(board.layout(self._new_event, self._step_of(clocks), there))
            self._has_layout = True
        self._write(self._step_of(clocks), scalars)
        if self._map is not None and self._map.is_due():
            self._draw(self._map, clocks)

    def look(self, parameters: Mapping[str, Tensor], report: Report) -> None:
        """Norms and histograms, where due, of the parameters and of their gradients as the optimizer left them."""
        if not self._looks:
            return
        clocks = _as_clocks(report.clocks)
        norms_due, histograms_due = self._layer_norms(clocks), self._histograms(clocks)
        if not (norms_due or histograms_due):
            return
        step, gradients = self._step_of(report.clocks), layers.gradients_of(parameters)
        if norms_due:
            scalars = {f"gradient_norm/{name}": norm for name, norm in layer_norms(parameters, report).items()}
            scalars |= {f"parameter_norm/{name}": norm for name, norm in norms.each(parameters).items()}
            self._write(step, scalars)
        if histograms_due:
            found = {f"gradients/{name}": layers.histogram(gradient) for name, gradient in gradients.items()}
            found |= {f"parameters/{name}": layers.histogram(parameter) for name, parameter in parameters.items()}
            there = {tag: buckets for tag, buckets in found.items() if buckets is not None}
            self._add(board.histograms(self._new_event, step, there))

    def evaluate(self, event: Evaluated, model: Any = None) -> None:
        self._rate.pause(event.seconds)
        self._write(self._step_of(event.clocks), {f"eval/{name}": value for name, value in event.metrics.items()})
        self.flush()

    def skip(self, report: Report) -> None:
        """`gradient/skips` rises at its very place; the first ones stand in the TEXT tab with their reason."""
        clocks = report.clocks
        self._skips = _skips(clocks)
        self._write(self._step_of(clocks), {"gradient/skips": self._skips})
        if self._skips_said < SKIPS_SAID:
            self._skips_said += 1
            words = f"window {clocks.get('windows', 0):,} was skipped: {report.reason}"
            self._add(board.text(self._new_event, self._step_of(clocks), "skipped", words))

    def found(self, event: Found) -> None:
        self._add(board.text(self._new_event, self._step_of(event.clocks), "found", event.text))
        if self._map is not None:
            self._map.tell(event.text)

    def stop(self, event: Stop) -> None:
        try:
            if self._file is not None and _skips(event.clocks) != self._skips:
                self._write(self._step_of(event.clocks), {"gradient/skips": _skips(event.clocks)})
            if self._file is not None and event.health:
                words = "\n".join(f"- {line}" for line in event.health)
                self._add(board.text(self._new_event, self._step_of(event.clocks), "gradient health", words))
            if self._file is not None and self._map is not None and self._map.history.rows:
                self._map.tell(event.health[0] if event.health else "")
                write_whole(self.folder / HEAT_MAP_FILE, self._draw(self._map, event.clocks), self._goes_on)
            if self._file is not None and self._has_session:
                self._add(board.session_end(self._new_event, not event.reason.startswith("stopped by")))
        finally:
            self._close()

    def flush(self) -> None:
        """Write what waits: called before a checkpoint is saved, so that a run that goes on from it misses no event."""
        if self._file is not None:
            self._file.flush()

    def _close(self) -> None:
        file, self._file = self._file, None
        memory, self._memory = self._memory, None
        if memory is not None:
            memory.close()
        if file is not None:
            file.close()

    def _draw(self, heat_map: HeatMap, clocks: dict[str, int]) -> bytes:
        png, width, height = heat_map.png()
        self._add(board.image(self._new_event, self._step_of(clocks), HEAT_MAP, png, width, height))
        return png

    def _told_by_clocks(self, clocks: dict[str, int]) -> dict[str, float]:
        """The clocks that say something which the axis, or another clock before them, does not say already."""
        told = {"": 0, self._axis: clocks.get(self._axis, 0)}
        for name in ("steps", *clocks):
            count = clocks.get(name, 0)
            if name not in told and (name in self._clocks_shown or count not in told.values()):
                told[name] = count
                self._clocks_shown.add(name)
        return {f"time/{name}": count for name, count in told.items() if name not in ("", self._axis)}

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
        if tags not in self._events:
            # An event is kept as long as there are few sets of tags: filling it in takes a fifth of building it.
            if len(self._events) >= _VARIANTS:
                self._events.clear()
            event = self._new_event()
            self._events[tags] = event, [event.summary.value.add(tag=tag) for tag in tags]
        event, values = self._events[tags]
        for slot, value in zip(values, scalars.values(), strict=True):
            slot.simple_value = value
        event.step = step
        self._add(event)

    def _add(self, event: Any) -> None:
        if self._file is None:
            raise TrainerError(f"no event file is open in {self.folder}: call start(...) first.")
        event.wall_time = time.time()
        self._file.write(record(event.SerializeToString()))


def write_graph(folder: Path, picture: Any) -> Path:
    """A drawn graph (`trainer.diagnose.picture`) as an event file of its own. Returns its path."""
    from tensorboard.compat.proto.event_pb2 import Event

    file = _open(folder)
    for event in (*board.heads(Event, 0, {}), board.graph(Event, picture)):
        event.wall_time = time.time()
        file.write(record(event.SerializeToString()))
    file.close()
    return file.path


def _skips(clocks: dict[str, int]) -> int:
    # Every window ends in a step or in a skip: this count survives a resume.
    return clocks.get("windows", 0) - clocks.get("steps", 0)


def _as_clocks(counts: dict[str, int]) -> Clocks:
    clocks = Clocks()
    clocks.load_state_dict(counts)
    return clocks


def _open(folder: Path, goes_on: bool = False) -> RecordFile:
    """A new event file whose name sorts behind those that are there: that is the order in which TensorBoard reads."""
    make_folder(folder)
    seconds = int(time.time())
    for path in folder.glob(_PREFIX + "*"):
        stamp = path.name.removeprefix(_PREFIX).split(".")[0]
        if stamp.isdecimal():
            seconds = max(seconds, int(stamp) + 1)
    return RecordFile(folder / f"{_PREFIX}{seconds:010d}.{getpid()}", new=True, goes_on=goes_on)
