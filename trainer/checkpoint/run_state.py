"""Where a run stands: its place in the data, the best so far, and how all of it is saved and taken up again."""

import math
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainer.checkpoint import changes, contents, finished, folder, foreign, of_optimizers, of_ranks, store
from trainer.checkpoint.nested import Snapshot
from trainer.checkpoint.saving import Saving
from trainer.errors import CheckpointError, ConfigError, did_you_mean
from trainer.settings import Settings
from trainer.step import Step

LAST, BEST = "last", "best"
# Of the attributes below, those that are saved as they are.
_OWN = (
    "epoch_began", "order_seed", "epoch_rng",
    "best", "evaluations_without_best", "metrics", "evaluated_at", "owes_evaluation",
    "window_rng",
)  # fmt: skip


class RunState:
    """The state of a run beside its step: position, best, and the files they lie in.

    Args:
        parts: what else has a state (`state_dict`, `load_state_dict`) that goes along, by name.

    Attributes:
        epoch_began: the micro_batches clock at the start of the epoch.
        order_seed: of the data's order; drawn once where the run has no seed.
        best: (metric, value, step) of the best evaluation so far.
        evaluations_without_best: evaluations since then.
        metrics: of the last evaluation.
        evaluated_at: the windows clock at the last evaluation.
        owes_evaluation: whether an evaluation was due that did not come to its end.
        epoch_rng: the generators at the epoch's start, where the data draws its order from them.
        notes: what there is to say of how the run was taken up, a sentence each.
        window_rng: the generators before the open window was drawn, where one is saved open.
    """

    def __init__(
        self,
        model: Any,
        step: Step,
        settings: Settings,
        run: Path | None,
        config: dict[str, Any],
        parts: Mapping[str, Any] | None = None,
    ) -> None:
        self._model = model
        self._step = step
        self._settings = settings
        self._folder = run
        self._saving = None if run is None or step.ranks.rank else Saving(run, settings.checkpoint)
        self._config = changes.config_of(config, settings)
        self._parts = dict(parts or {})
        self.notes: list[str] = []
        self.epoch_began = 0
        self.order_seed = settings.seed if settings.seed is not None else secrets.randbits(62)
        self.best: tuple[str, float, int] | None = None
        self.evaluations_without_best = 0
        self.metrics: dict[str, float] = {}
        self.evaluated_at = -1
        self.owes_evaluation = False
        self.epoch_rng: dict[str, Any] | None = None
        self.window_rng: dict[str, Any] | None = None

    @property
    def position(self) -> int:
        """Micro-batches of the epoch that lie behind: a difference of clocks, so it cannot fall behind the step."""
        return self._step.clocks.micro_batches - self.epoch_began

    @property
    def skips(self) -> int:
        clocks = self._step.clocks.read()
        return clocks.windows - clocks.steps

    def next_epoch(self) -> None:
        self._step.clocks.epochs += 1
        self.epoch_began = self._step.clocks.micro_batches

    def judge(self, metrics: dict[str, float], due: bool = True) -> bool:
        """Take note of an evaluation; whether it is the best so far.

        One that was not due (at a stop) may be the best, but does not count as one without a new best: a run that goes
        on would else run out of patience sooner than one that was never stopped.
        """
        wanted = self._settings.best
        if wanted.metric not in metrics:
            raise ConfigError(
                f"best.metric={wanted.metric} is not among the metrics of the evaluation: "
                f"{did_you_mean(wanted.metric, metrics)}"
            )
        self.metrics, self.evaluated_at, self.owes_evaluation = metrics, self._step.clocks.windows, False
        value = metrics[wanted.metric]
        better = math.isfinite(value) and (
            self.best is None or (value < self.best[1] if wanted.mode == "min" else value > self.best[1])
        )
        if better:
            self.best = (wanted.metric, value, self._step.clocks.read().steps)
            self.evaluations_without_best = 0
        elif due:
            self.evaluations_without_best += 1
        return better

    @contextmanager
    def opened(self) -> Iterator[None]:
        """The run's folder is this run's alone meanwhile, and what it saves is on the disk afterwards."""
        if self._saving is None:
            yield
            return
        self._saving.begin()
        try:
            yield
        finally:
            self._saving.end()

    @property
    def ticks(self) -> list[Callable[[], None]]:
        """What is called after every window: an error of a save that is being written comes up there."""
        return [self._saving.look] if self._saving is not None and self._settings.checkpoint.background else []

    def save(self, name: str) -> None:
        """Take the whole state and have it written. `name` is LAST, or BEST after an evaluation that was the best.

        Raises CheckpointError; what was saved before stays.
        """
        if self._folder is None:
            raise ConfigError("there is no folder to save into: give folder=.")
        parts = {name: part.state_dict() for name, part in self._parts.items()}
        run = {name: getattr(self, name) for name in _OWN} | {"parts": parts, "machine": self._machine()}
        ranks = of_ranks.take(self._model, self._step, run)
        if self._saving is None:
            return  # the first rank writes
        state = contents.take(self._model, self._step, run, self._config, ranks)
        best = None if name != BEST or self.best is None else (self.best[0], self.best[1])
        self._saving.save(state, self._step.clocks.as_dict(), best, self._check(), len(ranks))

    def _check(self) -> Callable[[Snapshot], None] | None:
        """Refuses a copy whose optimizer state is not finite, unless such numbers were asked for."""
        if self._settings.gradient.nonfinite == "allow":
            return None
        optimizers = self._step.optimizers
        names = of_optimizers.parameter_names(optimizers, self._step.parameters.by_name)
        others = [of_optimizers.is_third_party(one) for one in optimizers]
        return lambda taken: of_optimizers.check_finite_copy(taken.tensors.get("optimizers", {}), names, others)

    def resume(self, resume: str | Path, accept: Collection[str] = ()) -> Path | None:
        """Take a saved state up; which one that was, None where the run begins. What to say of it is in `notes`.

        Args:
            resume: `never`; `auto`, the newest checkpoint of the folder that is whole, where there is one; `last`, the
                same, and it must be there; or a path.
            accept: changed keys of the config that the run may go on with.
        """
        self.notes = []
        if str(resume) == "never":
            self._begin_anew()
            return None
        if str(resume) not in ("auto", "last"):
            path = folder.found(Path(resume))
            self._load(path, self._read(path), accept)
            return path
        if self._folder is None:
            raise ConfigError(f'resume="{resume}" needs the folder that the run was saved in: give folder=.')
        newest, state, damaged = self._newest(self._folder)
        self.notes += [f"passed over: {error}" for error in damaged]
        if newest is not None:
            self._load(newest, state, accept)
        elif damaged:
            raise damaged[0]  # never taken for none at all
        elif note := foreign.beside(self._folder, must_be=str(resume) == "last"):
            self.notes.append(note)
        return newest

    def _newest(self, run: Path) -> tuple[Path | None, dict[str, Any], list[CheckpointError]]:
        """The newest checkpoint that is whole, the same on every rank: the first one chooses."""
        ranks = self._step.ranks
        newest, state, damaged = store.newest(run) if ranks.rank == 0 else (None, {}, [])
        chosen, damaged = ranks.gather((newest, damaged))[0]
        return chosen, {} if chosen is None else self._read(chosen, state), damaged

    def _read(self, path: Path, known: dict[str, Any] | None = None) -> dict[str, Any]:
        """A checkpoint; of what ranks have of their own the first rank reads all, each other only its own. Raises
        CheckpointError, on every rank, for what is damaged."""
        ranks = self._step.ranks
        state, said = known or {}, None
        if not state:
            try:
                state = store.load(path, ranks.rank or None)
                if "holds" in state:
                    raise CheckpointError(f"{path} is a {state['holds']} and no checkpoint: name one of checkpoints/.")
            except CheckpointError as error:
                said = error
        for found in ranks.gather(said):
            if found is not None:
                raise found
        return state

    def _begin_anew(self) -> None:
        """What another run has saved here is put aside: it must not be taken for this one's."""
        clocks = self._step.clocks
        if self._saving is not None and not (clocks.windows or self._step.is_open) and self._saving.put_aside():
            self.notes.append(f"the checkpoints of an earlier run in {self._folder} were put aside.")

    def _load(self, path: Path, state: Mapping[str, Any], accept: Collection[str]) -> None:
        optimizers = self._step.optimizers
        groups_here = [[{**group, "params": None} for group in optimizer.param_groups] for optimizer in optimizers]
        saved = state.get("config")
        ranks = self._step.ranks
        worlds = len(state.get("ranks", ())) or 1, ranks.world_size
        said = changes.judged(saved, self._config, accept, path, worlds) if isinstance(saved, Mapping) else []
        finite = self._settings.gradient.nonfinite != "allow"
        if any(key.partition(".")[0] == "gradient_transforms" for key in accept):
            step = state["step"]
            state = {**state, "step": {**step, "transforms": self._step.transforms.adapted(step["transforms"])}}
        own = of_ranks.of_rank(state, ranks, path)
        run = contents.put_back(own, self._model, self._step, (*_OWN, "parts", "machine"), path, finite)
        of_ranks.begin_new(state, ranks, self._step.clocks.windows)
        if any(key.startswith("optimizer.") for key in accept):
            for optimizer, groups in zip(optimizers, groups_here, strict=True):
                for group, values in zip(optimizer.param_groups, groups, strict=True):
                    group.update({name: value for name, value in values.items() if name != "params"})
            self._step.rates.check_accepted()
        self.notes += [*said, *changes.moved(run.pop("machine"), self._machine())]
        parts = run.pop("parts")
        for name, part in self._parts.items():
            part.load_state_dict(parts.get(name))
        for name, value in run.items():
            setattr(self, name, value)

    def _machine(self) -> dict[str, Any]:
        return changes.machine(next(iter(self._step.parameters.by_name.values())).device)

    def load_start(self, path: Path) -> None:
        """Only the parameters and buffers, of whatever run they are (`init=PATH`)."""
        finished.load_start(path, self._model)

    def finish(self) -> None:
        """Write the state and the model at the run's end. Raises CheckpointError."""
        if self._folder is None or not self._step.clocks.windows:
            return
        try:
            if self._settings.checkpoint.last:
                self.save(LAST)
            if self._saving is not None:
                self._saving.wait()
            self._step.ranks.gather(None)  # what comes next may read what the first rank has written
        finally:
            if self._saving is not None:
                finished.save_finished_model(self._folder / finished.MODEL, self._model, self._step.optimizers)

    def pause(self) -> None:
        """Write the state of a run that will be gone on with. Raises CheckpointError."""
        if self._folder is not None and (self._step.clocks.windows or self._step.is_open):
            self.save(LAST)
            if self._saving is not None:
                self._saving.wait()
            self._step.ranks.gather(None)

    def leave(self) -> None:
        """Write nothing: what was saved before is better."""

    def files(self) -> dict[str, Path]:
        """What lies in the folder."""
        if self._folder is None:
            return {}
        names = {"model": finished.MODEL, "metrics": "metrics.jsonl", "captured": folder.CAPTURED}
        files = {what: self._folder / name for what, name in names.items() if (self._folder / name).exists()}
        for what, path in (("checkpoint", folder.last(self._folder)), ("best", folder.best(self._folder))):
            if path is not None:
                files[what] = path
        if next(self._folder.glob("events.out.tfevents.*"), None) is not None:
            files["tensorboard"] = self._folder
        return files
