"""What a person sees: a few lines at the start, a bar or sparse lines, evaluations, skips, a summary at the end."""

import math
import sys
from threading import RLock
from time import perf_counter
from typing import Any, TextIO

from trainer.gradient.clocks import counted
from trainer.gradient.report import Report
from trainer.loggers.events import Evaluated, Found, Start, Stop
from trainer.loggers.rate import Rate
from trainer.loggers.screen import Allowance, Pace, Screen

DRAW_EVERY = 0.1
"""Seconds between two moves of the bar."""
DRAW_EVERY_IN_A_NOTEBOOK = 0.5
"""The same where each move stays in a file, as a notebook's output does."""
POSTFIX_EVERY = 0.3
"""Seconds between two readings of loss, norm and rate behind the bar."""
SKIPS_IN_FULL = 3
EVALUATIONS_AT_ONCE = 20
"""So many evaluation lines come as fast as they are there; beyond, one a second."""


class Console:
    """Writes to the stream (None: what sys.stdout is at the start).

    On a terminal and in a notebook a bar counts windows; elsewhere step lines come at the first report, after 2 s,
    and then ever more seldom, up to one a minute. Nothing is written, and nothing fails, once nobody reads any more.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._given = stream
        self._screen: Screen | None = None
        self._bar: Any = None
        self._ticks = 0
        self._look_at = math.inf
        self._prepare({})

    def _prepare(self, clocks: dict[str, int]) -> None:
        self._first = clocks
        self._drawn = 0
        self._stride = 1
        self._next_draw = 0.0
        self._draw_every = DRAW_EVERY
        self._next_postfix = 0.0
        self._rate = Rate(clocks)
        self._evaluating = 0.0
        self._lines = Pace(2.0, 1.5, 60.0, at_once=True)
        self._counts = Pace(2.0, 1.5, 60.0, at_once=False)
        self._evaluations = Allowance(EVALUATIONS_AT_ONCE)
        self._hidden = 0
        self._skips = 0
        self._uncounted = 0
        self._total: int | None = None

    def start(self, event: Start) -> None:
        self._close_bar()
        screen = self._screen = Screen(self._given if self._given is not None else sys.stdout)
        self._prepare(event.clocks)
        self._total = event.total_windows
        name = f"{screen.paint(event.recipe, 'bold')}: " if event.recipe else ""
        size = counted(event.parameters, "parameter")
        screen.line(f"{name}{event.model}, {size}, on {event.device} in {event.precision}")
        screen.line(event.window)
        if event.resumed_from is not None:
            screen.line(f"goes on at step {event.clocks.get('steps', 0):,}, from {event.resumed_from}")
        if event.folder is not None:
            screen.line(f"writes to {event.folder}")
        for note in event.notes:
            screen.line(screen.paint(f"note: {note}", "yellow"))
        if screen.notebook:
            self._draw_every = DRAW_EVERY_IN_A_NOTEBOOK
        if screen.terminal:
            self._ticks = 0
            self._bar = _bar(screen, event.total_windows, event.clocks.get("windows", 0))
            self._draw()

    def tick(self) -> None:
        """A window is done."""
        self._ticks += 1
        if self._ticks >= self._look_at:
            # A look at the clock is dear in a fast run, so there it is taken some 16 times between two moves.
            if perf_counter() >= self._next_draw:
                self._draw()
            else:
                self._look_at = self._ticks + self._stride

    def step(self, report: Report, seconds: float) -> None:
        if self._bar is not None:
            now = perf_counter()
            if now >= self._next_postfix:
                self._next_postfix = now + max(POSTFIX_EVERY, self._draw_every)
                self._bar.set_postfix_str(self._numbers(report, seconds), refresh=False)
                self._draw()
        elif self._screen is not None and self._lines.due():
            clocks = report.clocks
            place = f"step {clocks.get('steps', 0):,}"
            if self._total:
                place += f" ({clocks.get('windows', 0) / self._total:.0%})"
            self._say(f"{place}: {self._numbers(report, seconds)}")

    def evaluate(self, event: Evaluated, model: Any = None) -> None:
        self._evaluating += event.seconds
        self._rate.pause(event.seconds)
        if self._screen is None:
            return
        if not self._evaluations.take():
            self._hidden += 1
            return
        text = f"evaluated at step {event.clocks.get('steps', 0):,}: {_metrics(event.metrics)}"
        if event.best:
            text += self._screen.paint(", best so far", "green")
        if self._hidden:
            text += f" ({counted(self._hidden, 'evaluation')} before it not shown)"
            self._hidden = 0
        self._say(text)

    def skip(self, report: Report) -> None:
        self._skips += 1
        if self._screen is None:
            return
        if self._skips <= SKIPS_IN_FULL:
            clocks = report.clocks
            place = f"window {clocks.get('windows', 0):,}, after step {clocks.get('steps', 0):,}"
            self._say(self._screen.paint(f"skipped {place}: {report.reason or 'no reason was given'}", "yellow"))
        else:
            self._uncounted += 1
            if self._counts.due():
                self._count_skips()

    def found(self, event: Found) -> None:
        if self._screen is not None:
            self._say(self._screen.paint(f"found: {event.text}", "yellow"))

    def stop(self, event: Stop) -> None:
        screen = self._screen
        if screen is None:
            return
        if self._bar is not None:
            self._ticks = max(0, event.clocks.get("windows", 0) - self._first.get("windows", 0))
            self._draw()
        self._close_bar()
        if self._uncounted:
            self._count_skips()
        stopped, _, by = event.reason.partition("stopped by ")
        screen.line(f"{screen.paint('stopped', 'bold')}{f' by {by}' if by else f': {stopped}'}")
        facts = [counted(event.clocks.get("steps", 0), "step"), counted(event.skips, "skip"), _seconds(event.seconds)]
        training = event.seconds - self._evaluating
        rows = event.clocks.get("rows", 0) - self._first.get("rows", 0)
        if rows > 0 and training > 0:
            facts.append(f"{rows / training:,.0f} rows/s in training")
        screen.line("  " + ", ".join(facts))
        if event.metrics:
            screen.line(f"  last evaluation: {_metrics(event.metrics)}")
        if event.best is not None:
            name, value, step = event.best
            screen.line(screen.paint(f"  best: {name} {_number(value)} at step {step:,}", "green"))
        if event.health:
            verdict, *lines = event.health
            is_good = not verdict.startswith("not well")
            screen.line(screen.paint(f"  gradient health: {verdict}", "green" if is_good else "yellow"))
            for line in lines:
                screen.line(f"    {line}")
        width = max((len(name) for name in event.files), default=0)
        for name, path in event.files.items():
            screen.line(f"  {name.ljust(width)}  {path}")
        if event.go_on is not None:
            more = " a higher limit" if event.reason.endswith(" done") else ""
            screen.line(f"go on with{more}: {screen.paint(event.go_on, 'bold')}")
        self._screen = None

    def _numbers(self, report: Report, seconds: float) -> str:
        terms = report.terms
        facts = [f"loss {_number(report.loss)}"]
        if len(terms) > 1:
            facts[0] += f" ({', '.join(f'{name} {_number(value)}' for name, value in terms.items())})"
        norm = report.grad_norm
        if norm is not None:
            facts.append(f"norm {_number(norm)}")
        rate = self._rate.measure(report.clocks, seconds)
        if rate is not None:
            steps, rows = rate
            facts.append(f"{rows:,.0f} rows/s" if rows > 0 else f"{steps:,.4g} steps/s")
        if self._skips:
            facts.append(counted(self._skips, "skip"))
        return ", ".join(facts)

    def _count_skips(self) -> None:
        if self._screen is not None:
            self._say(self._screen.paint(f"… {self._uncounted:,} more skipped", "yellow"))
        self._uncounted = 0

    def _say(self, text: str) -> None:
        if self._screen is None:
            return
        if self._bar is None:
            self._screen.line(text)
        else:
            self._bar.clear()
            self._screen.line(text)
            self._bar.refresh()

    def _draw(self) -> None:
        if self._bar is not None:
            moved = self._ticks - self._drawn
            self._bar.update(moved)
            self._drawn = self._ticks
            self._stride = max(1, moved // 16)
            self._look_at = self._ticks + self._stride
            self._next_draw = perf_counter() + self._draw_every

    def _close_bar(self) -> None:
        self._look_at = math.inf
        bar, self._bar = self._bar, None
        if bar is not None:
            bar.close()


def _bar(screen: Screen, total: int | None, done: int) -> Any:
    # Here, so that a run without a terminal does not pay for its import.
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[misc]
        # tqdm's own thread, which wakes up bars that are forgotten, and its lock between processes: neither is needed.
        monitor_interval = 0

    Bar.set_lock(RLock())
    known = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} windows [{elapsed}<{remaining}{postfix}]"
    return Bar(
        total=total,
        initial=done,
        file=screen,
        mininterval=0,
        miniters=0,
        dynamic_ncols=screen.columns() > 0,
        ncols=None if screen.columns() > 0 else 79,
        bar_format=known if total else "{n_fmt} windows [{elapsed}{postfix}]",
    )


def _number(value: float) -> str:
    return f"{value:.4g}"


def _metrics(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {_number(value)}" for name, value in metrics.items())


def _seconds(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
