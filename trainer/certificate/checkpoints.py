"""Which module calls torch.utils.checkpoint in its own forward, and runs in which those of one module do nothing."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.nn.modules import module as hooks

from trainer.certificate.wide import replaced


class Checkpoints:
    """Watches a run as a `Probe` does. `users` are the modules in whose own forward something was checkpointed.

    Args:
        off: the name of a module whose checkpoints call their function and nothing else.
    """

    def __init__(self, off: str | None = None) -> None:
        self.users: list[str] = []
        self._off = off
        self._inside: list[str | None] = []

    @contextmanager
    def watching(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        from torch.utils import checkpoint

        names = {id(module): name for name, module in modules.items()}
        generator, function = checkpoint._checkpoint_without_reentrant_generator, checkpoint.CheckpointFunction

        def enter(module: nn.Module, _: Any) -> None:
            self._inside.append(names.get(id(module)))

        def leave(module: nn.Module, *_: Any) -> None:
            self._inside.pop()

        def without_reentrant(*args: Any, **keywords: Any) -> Iterator[None]:
            if self._is_off():
                yield
            else:
                yield from generator(*args, **keywords)

        class Reentrant:
            @staticmethod
            def apply(run: Any, preserve: Any, *inputs: Any) -> Any:
                return run(*inputs) if self._is_off() else function.apply(run, preserve, *inputs)

        with ExitStack() as stack:
            stack.callback(hooks.register_module_forward_pre_hook(enter).remove)
            stack.callback(hooks.register_module_forward_hook(leave, always_call=True).remove)
            stack.enter_context(replaced(checkpoint, "_checkpoint_without_reentrant_generator", without_reentrant))
            stack.enter_context(replaced(checkpoint, "CheckpointFunction", Reentrant))
            yield

    def _is_off(self) -> bool:
        name = next((one for one in reversed(self._inside) if one is not None), None)
        if name is not None and name not in self.users:
            self.users.append(name)
        return name is not None and name == self._off
