"""Two processes with gloo between them, kept for the whole session: a case costs milliseconds instead of a start.

    from ranks import over_ranks

    def case(rank, world, number): ...          # at the top of a test module: it is found there by its name
    left, right = over_ranks(case, 3)           # what each rank returned; an error of one is raised here

In a case, a process group is there. What it returns is sent back pickled, tensors too.
"""

import atexit
import importlib
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

WORLD = 2
PATIENCE = 60.0


class RankError(Exception):
    """A case raised on a rank; the text has its traceback."""


def _worker(rank: int, world: int, folder: str, pipe: Any, path: list[str], seconds: float) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the session ends its workers itself
    os.setsid()  # a test that signals its whole process group does not mean these
    sys.path[:] = path
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=seconds))
    pipe.send(("ready", None))
    while True:
        try:
            asked = pipe.recv()
        except EOFError:
            os._exit(0)
        module, name, arguments, keywords = asked
        try:
            case = getattr(importlib.import_module(module), name)
            answer = ("done", case(rank, world, *arguments, **keywords))
        except BaseException as error:
            answer = ("failed", (type(error).__name__, str(error), traceback.format_exc()))
        pipe.send(answer)


class Pool:
    """The processes. One that broke a group by an error of its own is to be closed: the next call starts new ones."""

    def __init__(self, world: int = WORLD, seconds: float = 20.0) -> None:
        self.world = world
        self._folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("spawn")
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _loopback())
        self.processes = []
        self._pipes = []
        for rank in range(world):
            here, there = context.Pipe()
            arguments = (rank, world, self._folder.name, there, [str(Path(__file__).parent), *sys.path], seconds)
            process = context.Process(target=_worker, args=arguments, daemon=True)
            process.start()
            there.close()
            self.processes.append(process)
            self._pipes.append(here)
        for rank in range(world):
            self._answer(rank)

    def __call__(self, case: Callable[..., Any], *arguments: Any, **keywords: Any) -> list[Any]:
        """Run the case on every rank; what each returned, in their order."""
        for answer in (answers := self.outcomes(case, *arguments, **keywords)):
            if answer[0] == "failed":
                self.close()
                raise RankError(answer[1][2])
        return [answer[1] for answer in answers]

    def outcomes(self, case: Callable[..., Any], *arguments: Any, **keywords: Any) -> list[tuple[str, Any]]:
        """For each rank ("done", what it returned) or ("failed", (class, sentence, traceback)). For cases that raise on
        every rank alike: then the group is still whole."""
        for pipe in self._pipes:
            pipe.send((case.__module__, case.__name__, arguments, keywords))
        return [self._answer(rank) for rank in range(self.world)]

    def _answer(self, rank: int) -> tuple[str, Any]:
        if not self._pipes[rank].poll(PATIENCE):
            self.close()
            raise RankError(f"rank {rank} did not answer within {PATIENCE:g} s")
        try:
            found: tuple[str, Any] = self._pipes[rank].recv()
        except EOFError:
            self.close()
            raise RankError(f"rank {rank} died") from None
        return found

    def close(self) -> None:
        global _pool
        if _pool is self:
            _pool = None
        for pipe in self._pipes:
            pipe.close()
        for process in self.processes:
            process.kill()
            process.join(5)
        self._folder.cleanup()


_pool: Pool | None = None


def pool() -> Pool:
    """The session's processes, started when they are first asked for, and again where something ended them."""
    global _pool
    if _pool is not None and not all(process.is_alive() for process in _pool.processes):
        _pool.close()
    if _pool is None:
        _pool = Pool()
        atexit.register(_pool.close)
    return _pool


def over_ranks(case: Callable[..., Any], *arguments: Any, **keywords: Any) -> list[Any]:
    """Run a function of a test module as case(rank, world, …) on both ranks; what each returned."""
    return pool()(case, *arguments, **keywords)


def _loopback() -> str:
    return next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
