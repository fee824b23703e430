"""The recompute sentinel: what backward computes again is held against what forward computed, bit for bit.

Torch's own `determinism_check` compares shapes, types and devices. Here each tensor that a segment saves for backward
has a checksum, and these alone decide, as backward reads nothing else of a segment. The result of each operation has
one too: they say where the two runs part.
"""

import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import checkpoint

from trainer.activations.again import Again
from trainer.activations.conditions import Bits, generators_of, state_of
from trainer.activations.operations import Operation, Operations
from trainer.bits import checksum
from trainer.diagnose.places import Place, here
from trainer.diagnose.trace import storage_of
from trainer.errors import GradientError

CHECK = "bits"
"""The name of this comparison in torch's (private) table of determinism checks."""
_active: list["Recording"] = []


class RecomputeError(GradientError):
    """A segment that came out otherwise when it was computed again.

    `module` is the innermost one in which the two runs part, by name in the model.
    """

    def __init__(self, sentence: str, module: str) -> None:
        super().__init__(sentence)
        self.module = module


@dataclass(slots=True)
class _Saved:
    """A tensor that a segment saved: torch asks whether it is unequal to that of the recompute."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    sum: Any
    recording: "Recording | None"

    def __ne__(self, other: object) -> bool:
        if not isinstance(other, _Saved):
            return True
        alike = self.shape == other.shape and self.dtype == other.dtype
        if alike and (self.sum is None or bool(self.sum == other.sum)):
            return False
        if self.recording is None:
            return True
        if alike and not self.recording.parted:  # a kernel changed it after it was saved, as it did in forward
            return False
        raise self.recording.error()


def _saved(tensor: Tensor) -> _Saved:
    recording = _active[-1] if _active else None
    if recording is None:
        return _Saved(tuple(tensor.shape), tensor.dtype, checksum(tensor), None)
    with recording.paused():
        # A kernel that counts in a buffer (BatchNorm's) is handed it, and torch looks again only when it has counted.
        counts = storage_of(tensor) in recording.buffers | recording.opaque
        return _Saved(tuple(tensor.shape), tensor.dtype, None if counts else checksum(tensor), recording)


def _is_there() -> bool:
    """Whether torch still has the table that the comparison is entered into."""
    table = getattr(checkpoint, "_allowed_determinism_checks_to_fns", None)
    if isinstance(table, dict):
        table.setdefault(CHECK, _saved)
    return isinstance(table, dict)


@dataclass(slots=True)
class _Parting:
    before: Operation | None
    now: Operation
    place: Place | None


class Recording:
    """One segment's forward, operation by operation, and its recompute held against it.

    Args:
        name: the segment, for a sentence.
        modules: by name in the model.
        inside: the function that runs the segment: what lies outside of it on the stack is no line of it.
    """

    def __init__(
        self, name: str, modules: Sequence[tuple[str, nn.Module]], inputs: Any, inside: types.CodeType
    ) -> None:
        if not _is_there():
            raise GradientError(
                f"activation_checkpointing.verify does not fit torch {torch.__version__}: set it to false."
            )
        self._name = name
        self._modules = {
            where: module for prefix, outer in modules for where, module in outer.named_modules(prefix=prefix)
        }
        self._inputs = inputs
        self._inside = inside
        self.buffers = {storage_of(one) for module in self._modules.values() for one in module.buffers(recurse=False)}
        self._operations: list[Operation] = []
        self._parting: _Parting | None = None
        self._operating = Operations(self._modules, self._operations.append)
        self._state = dict(state_of(self._modules, inputs))
        self._later: dict[str, Any] = {}
        self._generators = generators_of(self._modules)
        self._drawn_from: list[str] = []

    @contextmanager
    def forward(self) -> Iterator[None]:
        with self._watching(self._operations.append):
            yield
        self._drawn_from = [name for name, (read, before) in self._generators.items() if read() != before]

    @contextmanager
    def again(self) -> Iterator[None]:
        self._later = dict(state_of(self._modules, self._inputs))
        self._parting = None
        left = iter(self._operations)
        try:
            with self._watching(lambda operation: self._hold(operation, left)):
                yield
        except checkpoint.CheckpointError as error:
            raise self.error() from error
        if getattr(checkpoint, "_enable_checkpoint_early_stop", None) is not False:
            # With all that forward saved torch would have ended it before: tensors are missing.
            raise self.error()

    @contextmanager
    def _watching(self, see: Callable[[Operation], None]) -> Iterator[None]:
        self._operating = Operations(self._modules, see)
        _active.append(self)
        try:
            with self._operating:
                yield
        finally:
            _active.remove(self)

    @property
    def opaque(self) -> set[int | None]:
        return self._operating.opaque

    @property
    def parted(self) -> bool:
        """Whether an operation came out otherwise, or found another tensor than in forward."""
        return self._parting is not None or any(
            isinstance(before, Bits) and self._later.get(words, before) != before
            for words, before in self._state.items()
        )

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, operations are not the segment's."""
        self._operating.is_paused = True
        try:
            yield
        finally:
            self._operating.is_paused = False

    def error(self) -> RecomputeError:
        """The sentence for a recompute that saved something else."""
        parting, module = self._parting, self._name
        if parting is None:
            first = ": one of its saved tensors is another, by no operation that could be seen"
        else:
            module = parting.now.module
            where = f" in {parting.place}" if parting.place is not None else ""
            inside = f" in module '{module}'" if module else ""
            if parting.before is None or parting.before.name != parting.now.name:
                was = f"{parting.before.word}()" if parting.before is not None else "nothing more"
                first = f": it takes another way{inside}, by {parting.now.word}(){where}, where forward did {was}"
            else:
                first = f", first by {parting.now.word}(){where}{inside}"
                if parting.before.dtypes != parting.now.dtypes:
                    was, now = (
                        str(one[0]).removeprefix("torch.") for one in (parting.before.dtypes, parting.now.dtypes)
                    )
                    first += f", which gave {was} in forward and gives {now} now (was autocast changed?)"
        reason = self._reason(module)
        return RecomputeError(
            f"computed again in backward, {self._name} comes out otherwise than in forward{first}{reason}: its "
            "gradient would be that of another forward. Make both runs equal (draw with torch's generator, keep what "
            "changes in a buffer), or leave this module out of activation_checkpointing.",
            module if parting is not None else "",
        )

    def _reason(self, module: str) -> str:
        if self._drawn_from:
            return f"; it draws from {' and '.join(self._drawn_from)}, which a recompute does not put back"
        changed = [
            (words, before, self._later[words])
            for words, before in self._state.items()
            if words in self._later and self._later[words] != before
        ]
        own = [one for one in changed if one[0].startswith(f"'{module}.")] if module else []
        said = []
        for words, before, now in (own or changed)[:2]:
            if isinstance(before, Bits):
                said.append(f"{words} was changed in between")
            else:
                said.append(f"{words} was {before} in forward and is {now} in the recompute")
        return f"; {', and '.join(said)}" if said else ""

    def _hold(self, now: Operation, left: Iterator[Operation]) -> None:
        if self._parting is not None:
            return
        before = next(left, None)
        if before is None or before != now:
            self._parting = _Parting(before, now, here(self._inside))


class _Recompute:
    """Entered once for every time that backward walks through the segment."""

    def __init__(self, again: Again, recording: Recording) -> None:
        self._again, self._recording = again, recording
        self._inside = ExitStack()

    def __enter__(self) -> None:
        with ExitStack() as stack:
            stack.enter_context(self._again)
            stack.enter_context(self._recording.again())
            self._inside = stack.pop_all()

    def __exit__(self, *error: Any) -> None:
        self._inside.__exit__(*error)


def checkpointed(
    name: str,
    modules: Sequence[tuple[str, nn.Module]],
    again: Again,
    forward: Callable[..., Any],
    inputs: tuple[Any, ...],
    keywords: dict[str, Any],
) -> Any:
    """A segment's forward by torch's checkpoint, whose recompute raises RecomputeError where it is another."""

    def segment(*inputs: Any, **keywords: Any) -> Any:
        return forward(*inputs, **keywords)

    recording = Recording(name, modules, (inputs, keywords), segment.__code__)

    return checkpoint.checkpoint(
        segment,
        *inputs,
        use_reentrant=False,
        preserve_rng_state=True,
        context_fn=lambda: (recording.forward(), _Recompute(again, recording)),
        determinism_check=CHECK,
        **keywords,
    )
