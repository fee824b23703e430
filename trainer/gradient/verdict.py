"""The verdict on a window: whether its loss and its gradient are finite.

On the CPU the answer is read; elsewhere it is a flag (float32, exactly 0 or 1) that stays on the device.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.gradient import norms
from trainer.gradient.open_window import OpenWindow
from trainer.gradient.report import FREE_READS, Number


class Inspector:
    """Looks at one window's gradients at a time.

    Args:
        allow: whether what is not finite may go into the parameters; then only a weight of zero is looked for.
        device: of the parameters.
    """

    def __init__(self, allow: bool, device: torch.device) -> None:
        self.reads = device.type in FREE_READS
        self._allow = allow
        self._device = device
        self._found = torch.zeros((), device=device)
        self._one = torch.ones((), device=device)

    def __call__(
        self,
        window: OpenWindow,
        gradients: Sequence[Tensor],
        factor: Number,
        norm: Number | None,
        norm_decides: bool,
    ) -> bool | Tensor:
        """Whether the step must be skipped.

        `norm` is that of the gradients as they are, where one was taken; `factor` is what they will still be multiplied
        with: a norm that overflows with it is not finite. It decides only where the gradient is clipped by it: that
        somebody looks at a norm must not change what is trained.
        """
        if self.reads:
            return not self._allow and self._is_bad(window, gradients, factor, norm, norm_decides)
        nothing = window.weighs_nothing_on(self._device)
        if self._allow:
            return False if nothing is None else nothing
        found = torch.zeros_like(self._found)
        over_ranks = None if window.summed is None else window.summed.is_bad  # the losses of all ranks are in it
        losses = [torch.as_tensor(v, device=self._device) for _, _, v in window.losses()] if over_ranks is None else []
        # Stacked, they are a copy: the check multiplies what it checks, and the caller's loss is not ours to write to.
        norms.nonfinite([*gradients, *([torch.stack(losses)] if losses else [])], found, self._one)
        if over_ranks is not None:
            found = torch.maximum(found, over_ranks)
        if nothing is not None:
            found = torch.maximum(found, nothing)
        if norm is not None and norm_decides:
            found = torch.maximum(found, (~torch.as_tensor(norm, device=self._device).isfinite()).to(found))
        return found

    def _is_bad(
        self, window: OpenWindow, gradients: Sequence[Tensor], factor: Number, norm: Number | None, norm_decides: bool
    ) -> bool:
        if not window.losses_are_finite:
            return True
        if norm is not None:
            if math.isfinite(norm * factor):
                return False  # then so is every number in it
            if norm_decides:
                return True
        norms.nonfinite(gradients, self._found, self._one)
        if self._found.item() == 0.0:
            return False
        self._found.zero_()
        return True
