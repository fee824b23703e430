"""A segment as it was, while it is computed again: unchanged parameters, and buffers as its forward found them."""

from dataclasses import dataclass

from torch import Tensor, nn

from trainer.errors import GradientError


@dataclass(slots=True)
class Kept:
    """A buffer as it was before its segment ran. Without a copy it is itself still what it was."""

    name: str
    holder: nn.Module
    key: str
    buffer: Tensor | None
    copy: Tensor | None
    version: int


class Again:
    """The segment as it was: unchanged parameters, and copies of the buffers in place of the buffers.

    Entered once for every time that backward walks through the segment.
    """

    def __init__(self, versions: list[tuple[str, Tensor, int]], kept: list[Kept]) -> None:
        self._versions = versions
        self._kept = kept
        self._now: list[Tensor | None] = []

    def __enter__(self) -> None:
        for name, parameter, version in self._versions:
            if parameter._version != version:
                raise _changed("parameter", name)
        for one in self._kept:
            if one.copy is None and one.buffer is not None and one.buffer._version != one.version:
                raise _changed("buffer", one.name)
        copies: dict[int, Tensor] = {}
        self._now = [one.holder._buffers.get(one.key) for one in self._kept]
        for one in self._kept:
            value = one.buffer
            if one.copy is not None:
                value = copies.get(id(one.copy))
                if value is None:
                    value = copies[id(one.copy)] = one.copy.clone()
            one.holder._buffers[one.key] = value

    def __exit__(self, *_: object) -> None:
        for one, buffer in zip(self._kept, self._now, strict=True):
            one.holder._buffers[one.key] = buffer
        self._now = []


def _changed(what: str, name: str) -> GradientError:
    return GradientError(
        f"the {what} '{name}' was changed between forward and the recompute of its segment: the gradient would be "
        f"silently wrong. Change {what}s after the step, or set activation_checkpointing=none."
    )
