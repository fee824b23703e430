"""What one forward meets: the autograd Functions of one's own that it calls, and modules, each with its inputs."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer.certificate.batches import copied

_MOST_CALLS = 3
"""So many calls of one Function are kept, each of other shapes or other options."""


@dataclass(frozen=True)
class Met:
    """One call of a Function.

    - `inputs`: copies, as they came.
    - `needed`: whether a gradient was wanted, input by input.
    - `module`: the name of the module that called it; None outside of all.
    """

    function: type[torch.autograd.Function]
    inputs: tuple[Any, ...]
    needed: tuple[bool, ...]
    module: str | None

    @property
    def names(self) -> list[str]:
        """Its inputs as its forward calls them."""
        parameters = inspect.signature(self.function.forward).parameters.values()
        own = list(parameters)[0 if _is_split(self.function) else 1 :]
        return [
            own[i].name if i < len(own) and own[i].kind is not inspect.Parameter.VAR_POSITIONAL else str(i)
            for i in range(len(self.inputs))
        ]

    def __str__(self) -> str:
        return f"{self.function.__name__}.{_backward(self.function).__name__}{_place(_backward(self.function))}"


@dataclass
class Meetings:
    """What was met."""

    functions: list[Met] = field(default_factory=list)
    modules: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)
    """The inputs of the first call of each module that was asked for."""


@contextmanager
def meeting(modules: Mapping[str, nn.Module], wanted: set[str]) -> Iterator[Meetings]:
    """Inside, calls of Functions are noted, and the first call of each wanted module.

    Args:
        modules: the model's, by name.
    """
    found = Meetings()
    names = {id(module): name for name, module in modules.items()}
    inside: list[str] = []
    seen: dict[type, set[str]] = {}

    def enter(module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        name = names.get(id(module))
        if name is not None:
            inside.append(name)
            if name in wanted and name not in found.modules:
                found.modules[name] = copied(inputs), copied(keywords)

    def leave(module: nn.Module, *_: Any) -> None:
        if id(module) in names and inside:
            inside.pop()

    def note(function: type[torch.autograd.Function], inputs: tuple[Any, ...]) -> None:
        kinds = seen.setdefault(function, set())
        kind = repr([(one.shape, one.dtype) if isinstance(one, Tensor) else one for one in inputs])
        if kind not in kinds and len(kinds) < _MOST_CALLS:
            kinds.add(kind)
            needed = tuple(isinstance(one, Tensor) and one.requires_grad for one in inputs)
            copies = tuple(one.detach().clone() if isinstance(one, Tensor) else one for one in inputs)
            found.functions.append(Met(function, copies, needed, inside[-1] if inside else None))

    with ExitStack() as stack:
        for module in modules.values():
            if not isinstance(module, torch.jit.ScriptModule):
                stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(leave).remove)
        forwards = [(one, one.forward) for one in _functions(torch.autograd.Function)]
        for function, forward in forwards:
            stack.enter_context(_noting(function, forward, note))
        yield found


@contextmanager
def _noting(function: Any, forward: Callable[..., Any], note: Callable[..., None]) -> Iterator[None]:
    """A Function's own forward notes its inputs. torch looks it up at each call, also behind a kept `apply`."""
    skipped = 0 if _is_split(function) else 1

    def noted(*args: Any) -> Any:
        note(function, args[skipped:])
        return forward(*args)

    own = vars(function).get("forward")
    function.forward = staticmethod(noted)
    try:
        yield
    finally:
        if own is None:
            del function.forward
        else:
            function.forward = own


def _functions(function: type) -> Iterator[type[torch.autograd.Function]]:
    """Every Function that somebody but torch has written, once."""
    found: dict[int, type] = {}
    todo: list[Any] = function.__subclasses__()
    while todo:
        one = todo.pop()
        todo += one.__subclasses__()
        if one.__module__.partition(".")[0] != "torch" and "forward" in dir(one):
            found[id(one)] = one
    return iter(found.values())


def _is_split(function: Any) -> bool:
    """Whether forward is without a context, which setup_context then gets."""
    base: Any = torch.autograd.Function
    return function.setup_context is not base.setup_context


def _backward(function: Any) -> Callable[..., Any]:
    base: Any = torch.autograd.Function
    found: Callable[..., Any] = function.backward if function.vjp is base.vjp else function.vjp
    return found


def _place(function: Callable[..., Any]) -> str:
    try:
        path, (lines, first) = Path(str(inspect.getsourcefile(function))), inspect.getsourcelines(function)
    except (OSError, TypeError):
        return ""
    line = first + next((index for index, text in enumerate(lines) if text.lstrip().startswith("def ")), 0)
    try:
        return f" ({path.resolve().relative_to(Path.cwd()).as_posix()}:{line})"
    except (ValueError, OSError):
        return f" ({path.as_posix()}:{line})"
