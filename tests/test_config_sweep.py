"""Sweeps: what became of each job, whoever ran it. Those with plugins need pip install 'gradtrainer[optuna,joblib]'."""

import importlib.util
import math
import pickle
import sys
from types import SimpleNamespace

import pytest

from trainer.cli import main
from trainer.config import hydra_app, sweep
from trainer.config.sweep import Failed, Watched
from trainer.errors import ConfigError

PLUGINS = {"optuna": "optuna_sweeper", "joblib": "joblib_launcher", "submitit": "submitit_launcher"}
OVERLAYS = {"optuna": "optuna", "joblib": "joblib", "submitit": "submitit", "submitit_local": "submitit"}
MINE = """# @package _global_
model: {_target_: sweep_model.Net, width: 3}
objective: {_target_: torch.nn.MSELoss}
data: {source: {_target_: trainer.recipes.xor.table}}
limits: {epochs: 2}
loggers: {console: false, tensorboard: false}
best: {metric: loss}
"""
MODEL = """
import torch

class Net(torch.nn.Linear):
    def __init__(self, width: int):
        super().__init__(2, 1)
        if width >= 12:
            raise RuntimeError("a mistake of the user's own")
"""


def has(name):
    return importlib.util.find_spec(f"hydra_plugins.hydra_{PLUGINS[name]}") is not None


has_plugins = importlib.util.find_spec("hydra_plugins") is not None


def needs(*names):
    there = has_plugins and all(has(name) for name in names)
    return pytest.mark.skipif(not there, reason=f"pip install 'gradtrainer[{','.join(names)}]'")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "own" / "recipe").mkdir(parents=True)
    (tmp_path / "own" / "recipe" / "mine.yaml").write_text(MINE)
    (tmp_path / "own" / "recipe" / "sweep_model.py").write_text(MODEL)
    yield tmp_path
    sys.modules.pop("sweep_model", None)


def mine(*words):
    return main(["train", "recipe=mine", "--config-dir", "own", *words])


def table(out):
    lines = out.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("sweep: "))
    return lines[start:]


def test_a_failed_job_is_a_nan_that_says_why_also_from_another_process():
    failed = pickle.loads(pickle.dumps(Failed("a\n  mistake", 3)))
    assert math.isnan(failed) and failed.reason == "a mistake" and failed.code == 3
    with pytest.raises(ValueError, match="a mistake"):
        float(failed)


def test_the_table_shows_what_sets_a_job_apart_and_which_is_best():
    jobs = [
        (["a=1", "b=1"], 0.5),
        (["a=1", "b=2"], Failed("no", 3)),
        (["a=1", "b=3"], 0.25),
        (["a=1", "b=4"], math.nan),
    ]
    lines = sweep.summary(jobs, "there", "loss", "min")
    assert lines == [
        "sweep: 4 jobs, 1 failed, in there",
        "  job 0  b=1  loss 0.5",
        "  job 1  b=2  failed: no",
        "  job 2  b=3  loss 0.25, best",
        "  job 3  b=4  loss nan",
    ]
    assert sweep.summary(jobs, "there", "loss", "max")[1].endswith("0.5, best")
    assert sweep.summary(jobs[:1], "there", "loss", "max") == [
        "sweep: 1 job, none failed, in there",
        "  job 0  a=1 b=1  loss 0.5",
    ]
    assert sweep.code(jobs) == 3 and sweep.code(jobs[:1]) == 0


def test_a_launchers_own_failure_is_a_failed_job():
    class Launcher:
        def launch(self, job_overrides, initial_job_idx):
            return [SimpleNamespace(_return_value=value) for value in (1.0, OSError("no room"))]

    watched = Watched(Launcher())
    watched.launch([["a=1"], ["a=2"]], initial_job_idx=0)
    (_, first), (words, second) = watched.jobs
    assert first == 1.0 and words == ["a=2"] and second.reason == "OSError('no room')" and second.code == 1


def test_a_grid_ends_with_its_table(here, capsys):
    assert mine("-m", "model.width=3,12", "seed=1,2") == 1
    head, *jobs = table(capsys.readouterr().out)
    assert head.startswith("sweep: 4 jobs, 2 failed, in outputs/mine/sweep-") and len(jobs) == 4
    assert sum(job.endswith(", best") for job in jobs) == 1
    assert [job.split("  ")[-1] for job in jobs[2:]] == ["failed: RuntimeError: a mistake of the user's own"] * 2
    assert jobs[3].split()[:4] == ["job", "3", "model.width=12", "seed=2"]


@pytest.mark.parametrize("name", list(OVERLAYS))
def test_a_plugin_that_is_not_there_is_said_with_the_words_that_bring_it(here, capsys, name):
    if has_plugins and has(OVERLAYS[name]):
        with hydra_app.opened(None) as (_, loader):
            assert hydra_app.sweeps(loader, "train", ["recipe=xor", f"sweep={name}"], multirun=False)
        return
    assert mine(f"sweep={name}", "seed=1,2") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "is not installed" in said
    assert f"pip install 'gradtrainer[{OVERLAYS[name]}]'" in said
    assert not (here / "outputs").exists()


def own_sweep(here, text):
    (here / "own" / "sweep").mkdir(exist_ok=True)
    (here / "own" / "sweep" / "s.yaml").write_text(f"# @package _global_\nhydra: {text}\n")
    with hydra_app.opened(here / "own") as (_, loader):
        hydra_app.sweeps(loader, "train", ["recipe=mine", "sweep=s"], multirun=False)


def test_ones_own_sweep_may_set_numbers_of_the_sweeper(here, capsys):
    (here / "own" / "sweep").mkdir()
    text = "# @package _global_\nhydra: {mode: MULTIRUN, sweeper: {params: {seed: '1,2'}}}\n"
    (here / "own" / "sweep" / "s.yaml").write_text(text)
    assert mine("sweep=s") == 0
    folder = table(capsys.readouterr().out)[0].partition(" in ")[2]
    # The words of one of its jobs run that job, and not the sweep again.
    command = (here / folder / "1" / "command.txt").read_text().splitlines()[1]
    assert command == "trainer train seed=2 recipe=mine sweep=s hydra.mode=RUN --config-dir own"
    assert main(command.split()[1:]) == 0
    assert "sweep: " not in capsys.readouterr().out


@pytest.mark.parametrize(
    "text",
    [
        "{sweeper: {_target_: os.system}}",
        "{sweeper: {direction: {_target_: os.system, command: touch canary}}}",
        "{sweeper: {direction: '${model}'}}",
        "{sweeper: {custom_search_space: os.system}}",
        "{sweeper: {storage: 'sqlite:///canary'}}",
        "{launcher: {n_jobs: {_target_: os.system}}}",
        "{launcher: {setup: [touch canary]}}",
        "{launcher: joblib}",
    ],
)
def test_but_nothing_that_hydra_or_a_plugin_would_run(here, text):
    with pytest.raises(ConfigError, match=r"sweep/s.yaml sets hydra\.\w+, where it may only set mode, run, sweep"):
        own_sweep(here, text)


@needs("joblib")
def test_joblib_runs_jobs_elsewhere_and_their_failures_are_seen_here(here, capsys):
    assert mine("sweep=joblib", "hydra.launcher.n_jobs=2", "model.width=3,12") == 1
    head, first, second = table(capsys.readouterr().out)
    assert "1 failed" in head and "loss 0" in first and "failed: RuntimeError: a mistake" in second
    folder = here / head.partition(" in ")[2]
    assert (folder / "0" / "model.safetensors").exists() and (folder / "1" / "config.yaml").exists()


@needs("optuna")
@pytest.mark.filterwarnings("ignore")  # Optuna's, of its own
def test_optuna_goes_the_way_of_best_mode_and_past_failures(here, capsys):
    words = ["sweep=optuna", "hydra.sweeper.n_trials=3", "optimizer.lr=interval(1e-4,1e-1)"]
    assert mine(*words, "best.mode=min") == 0
    head, *jobs = table(capsys.readouterr().out)
    found = (here / head.partition(" in ")[2] / "optimization_results.yaml").read_text()
    values = [float(job.split("loss ")[1].removesuffix(", best")) for job in jobs]
    assert float(found.split("best_value: ")[1]) == pytest.approx(min(values), rel=1e-5) and len(set(values)) == 3
    words = ["sweep=optuna", "hydra.sweeper.sampler.seed=1", "limits.epochs=1"]
    assert mine(*words, "hydra.sweeper.n_trials=6", "model.width=12,13,3") == 1
    head, *jobs = table(capsys.readouterr().out)
    failed = ["failed: RuntimeError" in job for job in jobs]
    assert len(failed) == 6 and failed.index(True) < 5 - failed[::-1].index(False)  # one ran after a failure
    assert mine(*words, "hydra.sweeper.n_trials=2", "model.width=12,13") == 1  # all fail: no best, and no traceback
    said = capsys.readouterr()
    assert "2 jobs, 2 failed" in said.out and "hydra_plugins" not in said.err
