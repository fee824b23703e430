"""What scripts/torture shows of real runs: the cost of a save, a checkpoint's files, the text after `kill -9`."""

import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tally import Tally, scratch

STEPS = 100
"""A save every so many steps."""


def char_lm(run: Path, *words: str):
    """The Trainer of `trainer train recipe=char_lm`."""
    from test_recipes import trainer_of

    return trainer_of("recipe=char_lm", "evaluation.every=null", *words, folder=run)


def cost(pairs: int = 8) -> Tally:
    """Stretches of 100 steps of one run, by turns with a save at their start and without, and what the step loses.

    Beside the wall time there is the processor time of the thread that trains: on a machine that has other things to
    do it is the quieter measure, and it leaves out what the writing thread does meanwhile.
    """
    spent: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    calls: list[float] = []
    with tempfile.TemporaryDirectory() as folder:  # on a disk, not in memory
        run = Path(folder)
        trainer = char_lm(run, f"limits.steps={STEPS * (2 * pairs + 1)}", "limits.epochs=null", "checkpoint.every=null")
        since = [0.0, 0.0]

        def tick() -> None:
            steps = trainer.step.clocks.steps
            if steps % STEPS:
                return
            now = [time.perf_counter(), time.thread_time()]
            stretch = steps // STEPS - 1
            if stretch:  # the first warms up
                spent[stretch % 2 == 1].append((now[0] - since[0], now[1] - since[1]))
            since[:] = now
            if stretch % 2 == 0:
                trainer._save("last")
                calls.append(time.perf_counter() - now[0])

        trainer._loggers.ticks.append(tick)
        trainer.fit()
        (path,) = list((run / "checkpoints").iterdir())[-1:]
        size = sum(file.stat().st_size for file in path.iterdir())
    walls = [with_[0] / without[0] - 1 for with_, without in zip(spent[True], spent[False], strict=True)]
    cpus = [with_[1] / without[1] - 1 for with_, without in zip(spent[True], spent[False], strict=True)]
    step = statistics.median(without[0] for without in spent[False]) / STEPS
    tally = Tally()
    tally.told.append(
        f"`recipe=char_lm`, {size:,} bytes a checkpoint, {pairs} stretches of {STEPS} steps ({step * 1e3:.1f} ms each) "
        "with a save at their start, by turns with as many without one:"
    )
    tally.told.append(
        "| measure | median | of the pairs, the middle half |\n|---|---|---|\n"
        f"| wall time lost, of {STEPS} steps | {statistics.median(walls):.2%} | {_half(walls)} |\n"
        f"| processor time of the training thread lost | {statistics.median(cpus):.2%} | {_half(cpus)} |\n"
        f"| the call itself (the copy in memory), of {STEPS} steps | {statistics.median(calls) / step / STEPS:.2%} | "
        f"{statistics.median(calls) * 1e3:.1f} ms |"
    )
    return tally


def _half(values: list[float]) -> str:
    low, _, high = statistics.quantiles(values, n=4)
    return f"{low:.2%} to {high:.2%}"


def layout() -> Tally:
    """The files of a run that has ended, and of its last checkpoint."""
    held = {
        "manifest.json": "the other files with their SHA-256; the clocks, the best so far, versions",
        "state.json": "numbers and texts, and the structure around the tensors",
        "model.safetensors": "parameters and buffers under the model's own names",
        "optimizers.safetensors": "the optimizers' states",
        "rest.safetensors": "the other tensors: generators, and an open window's gradients",
    }
    tally = Tally()
    with scratch() as run:
        trainer = char_lm(run, "limits.steps=20", "limits.epochs=null", "evaluation.clock=steps")
        trainer.fit()
        count = sum(parameter.numel() for parameter in trainer.model.parameters())
        (path,) = list((run / "checkpoints").iterdir())[-1:]
        sizes = {file.name: file.stat().st_size for file in path.iterdir()}
        tally.told.append(f"The last checkpoint of `recipe=char_lm` ({count:,} parameters, AdamW), `{path.name}/`:")
        rows = [f"| {name} | {sizes[name]:,} | {held[name]} |" for name in held if name in sizes]
        every = f"| in all | {sum(sizes.values()):,} | {sum(sizes.values()) / (4 * count):.2f} times the parameters |"
        tally.told.append("\n".join(["| file | bytes | holds |", "|---|---|---|", *rows, every]))
        others = [
            f"| {re.sub('[0-9.]+$', '.…', str(file.relative_to(run)))} | {file.stat().st_size:,} |"
            for file in sorted(run.rglob("*"))
            if file.is_file() and "checkpoints" not in file.relative_to(run).parts
        ]
        tally.told.append("Beside the checkpoints, in the run's folder:")
        tally.told.append("\n".join(["| file | bytes |", "|---|---|", *others]))
        if set(sizes) != set(held):
            tally.broken.append(f"the files are {sorted(sizes)}")
    return tally


def killed() -> Tally:
    """What a terminal shows: a run, `kill -9`, and the same command again."""
    words = ["train", "recipe=digits", "run=mine", "limits.epochs=12"]
    command = [sys.executable, "-m", "trainer", *words]
    shown = f"$ trainer {' '.join(words)}"
    with scratch() as folder:
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONUNBUFFERED": "1"}
        with subprocess.Popen(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        ) as running:
            first = []
            for line in running.stdout:
                first.append(line)
                if line.startswith("evaluated at step 270"):
                    running.send_signal(signal.SIGKILL)
                    break
            running.stdout.read()
        again = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, check=False, env=environment, timeout=600
        )
        text = [shown, *first, "Killed", "$ echo $?", str(128 - running.returncode if running.returncode < 0 else 1)]
        text += [shown, again.stdout + again.stderr]
        said = "\n".join(one.rstrip("\n") for one in text).replace(f"{folder}/", "").replace(str(folder), ".")
    tally = Tally()
    tally.told.append("Not at a terminal, where a bar takes the place of the lines `step …`:")
    tally.told.append(f"```text\n{re.sub(r'/[^ ]*/site-packages/', '', said)}\n```")
    if again.returncode or "goes on at step" not in again.stdout:
        tally.broken.append(f"the second run ended with {again.returncode}")
    return tally
