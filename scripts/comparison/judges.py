"""What is said of a run, in a cell of the table."""

import math

import torch

from comparison.problem import LR, Problem, Taken, Watch

UNUSED = "second_head"


def steps(problem: Problem, watch: Watch) -> str:
    """The largest error of its steps, and whether each step is a window of its own."""
    windows = problem.windows()
    ending = {window[-1]: window for window in windows}
    worst, said = 0.0, []
    for count, taken in enumerate(watch.taken):
        window = ending.get(taken.last, windows[min(count, len(windows) - 1)])
        worst = max(worst, error(problem, taken, window))
        if taken.last not in ending:
            said.append("a step mixes two epochs")
            break
    if not said and len(watch.taken) != len(windows):
        said.append(f"{len(watch.taken)} steps for {len(windows)} windows")
    return "; ".join([figure(worst), *said])


def error(problem: Problem, taken: Taken, window: list[int]) -> float:
    wanted = problem.reference(taken.before, window)
    off, size = 0.0, 0.0
    for name, gradient in wanted.items():
        moved = (taken.before[name].double() - taken.after[name].double()) / taken.lr
        off += float((moved - gradient).square().sum())
        size += float(gradient.square().sum())
    return math.sqrt(off / size)


def figure(number: float) -> str:
    return "NaN" if math.isnan(number) else f"{number:.1e}"


def finite(problem: Problem, watch: Watch) -> str:
    """Whether the parameters are still numbers, and the error of the steps that were taken."""
    broken = [name for name, p in watch.net.named_parameters() if not bool(p.isfinite().all())]
    if broken:
        return f"NaN in {len(broken)} of {len(list(watch.net.parameters()))} parameters"
    ending = {window[-1]: window for window in problem.windows()}
    worst = max(error(problem, taken, ending[taken.last]) for taken in watch.taken)
    skipped = len(ending) - len(watch.taken)
    return figure(worst) + (f"; {skipped} step skipped" if skipped else "")


def rates(problem: Problem, watch: Watch) -> str:
    assert problem.factor is not None
    wanted = [LR * problem.factor(count) for count in range(len(watch.taken))]
    return figure(max(abs(taken.lr / rate - 1) for taken, rate in zip(watch.taken, wanted, strict=True)))


def frozen(problem: Problem, watch: Watch) -> str:
    before, after = problem.built().state_dict(), watch.net.state_dict()
    moved = any(not torch.equal(before[name], after[name]) for name in before if "running" in name)
    return steps(problem, watch) + ("; statistics moved" if moved else "")


def named(problem: Problem, watch: Watch) -> str:
    return "named" if UNUSED in watch.said else "not named"


def clipped(problem: Problem, watch: Watch) -> str:
    if not watch.taken:
        return "skipped, reason given" if "too large for its norm" in watch.said else "no step, nothing said"
    return steps(problem, watch)
