"""What of a `Step` (here `step`) is saved, and how it goes back. A friend of step.py: it reads and sets what is private
there."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from trainer.gradient import saved
from trainer.gradient.report import Trace
from trainer.gradient.zeroing import put_back


def state_of(step: Any) -> dict[str, Any]:
    """See `Step.state_dict`."""
    own = step.parameters.by_name
    return {
        "clocks": step.clocks.state_dict(),
        "skips_in_a_row": int(step.skips_in_a_row),
        "expected": {name: float(weight) for name, weight in step._expected.items()},
        "rates": step.rates.state_dict(),
        "loss_scale": step._scale.state_dict(),
        "transforms": step.transforms.state_dict(),
        "masters": step._narrow.state_dict(own),
        "open": _open_window(step),
        "gradients": saved.save(step.parameters.gradients(), step.settings.zero_grad, step._open is not None),
        "aside": saved.save_aside(step._aside, own),
    }


def load(step: Any, state: Mapping[str, Any]) -> None:
    """See `Step.load_state_dict`."""
    step.parameters.refresh()
    step._clipping.refresh()
    own = step.parameters.by_name
    for part in ("gradients", "aside", "masters"):
        saved.check_fit(state[part], own)
    step.transforms.check_fit(state["transforms"])
    step.clocks.load_state_dict(state["clocks"])
    step.skips_in_a_row = int(state["skips_in_a_row"])
    step._expected = dict(state["expected"])
    step.rates.load_state_dict(state["rates"])
    step._scale.load_state_dict(state["loss_scale"])
    step.transforms.load_state_dict(state["transforms"])
    step._narrow.load_state_dict(state["masters"], own)
    put_back(saved.load(state["gradients"], own))
    step._open, step._aside, step._moving = None, [], False
    window = state["open"]
    if window is not None:
        step._open = step._window(None)
        step._open.load_state_dict(window["sums"])
        step._trace = Trace(**window["trace"])
        step._buffers.load_state_dict(window["buffers"])
        if step.settings.zero_grad == "never":
            step._aside = saved.load(state["aside"], own)


def _open_window(step: Any) -> dict[str, Any] | None:
    if step._open is None:
        return None
    step._open.check_whole()
    return {
        "sums": step._open.state_dict(),
        "buffers": step._buffers.state_dict(),
        "trace": asdict(step._trace),
    }
