"""What torchrun says, the sentences where it says nothing, and the command itself under it."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trainer import torchrun
from trainer.cli import main
from trainer.errors import ConfigError

DOCS = Path(__file__).parents[1] / "docs" / "toggles" / "distributed.md"
TWO = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "a",
    "MASTER_PORT": "1",
}


def test_who_this_process_is() -> None:
    assert (torchrun.rank_here(TWO), torchrun.world_here(TWO), torchrun.is_first(TWO)) == (1, 2, False)
    assert torchrun.prefix(TWO) == "rank 1: " and torchrun.prefix({**TWO, "WORLD_SIZE": "1"}) == ""
    assert (torchrun.rank_here({}), torchrun.world_here({}), torchrun.is_first({})) == (None, 1, True)
    assert torchrun.is_first({**TWO, "RANK": "0"})
    assert torchrun.command("eval", TWO) == "torchrun --nproc-per-node 2 -m trainer eval"


def test_the_environment_and_the_setting_go_together() -> None:
    torchrun.check("ddp", "", TWO)
    torchrun.check("none", "", {})
    torchrun.check("none", "", {**TWO, "WORLD_SIZE": "1"})
    with pytest.raises(ConfigError, match=r"needs torchrun to start its ranks \(RANK is not set\): write THIS"):
        torchrun.check("ddp", "THIS", {})
    with pytest.raises(ConfigError, match=r"there are 2 ranks, and with distributed=none each would train alone"):
        torchrun.check("none", "", TWO)


def test_without_torchrun_a_sentence_says_what_to_type(capsys, monkeypatch) -> None:
    for name in TWO:
        monkeypatch.delenv(name, raising=False)
    assert main(["train", "recipe=xor", "distributed=ddp"]) == 2
    said = capsys.readouterr().err
    assert "write torchrun --nproc-per-node 2 -m trainer train recipe=xor distributed=ddp" in said


def test_a_sweep_is_refused_and_an_error_names_its_rank(capsys, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in TWO.items():
        monkeypatch.setenv(name, value)
    assert main(["train", "-m", "recipe=xor", "distributed=ddp", "seed=1,2"]) == 2
    assert (
        capsys.readouterr().err == "rank 1: a sweep runs its jobs in one process: give torchrun the words of one job.\n"
    )
    assert main(["train", "recipe=xor"]) == 2
    assert capsys.readouterr().err.startswith("rank 1: there are 2 ranks")
    assert not list(tmp_path.iterdir())


SCRIPT = """
import os, sys, time
if sys.argv[2] == "fails":
    sys.exit(4 if os.environ["RANK"] == "1" else 0)
import torch
from trainer import Trainer
from trainer.optim import sgd
torch.manual_seed(0)
def slow(model, batch):
    time.sleep(0.01)
    open(f"{sys.argv[1]}/going", "w").close()
    return (model(batch[0]) - batch[1]).square().mean()
model = torch.nn.Linear(3, 1)
data = torch.randn(64, 3), torch.randn(64, 1)
Trainer(model, slow, sgd(model.parameters(), lr=0.1), data=data, folder=f"{sys.argv[1]}/run", distributed="ddp", seed=1,
        batch_size=1, accumulation_steps=16, epochs=1000, console=False, tensorboard=False, audit=False).fit("auto")
"""


def started(folder: Path, mode: str) -> subprocess.Popen:
    (folder / "script.py").write_text(SCRIPT)
    environment = {name: value for name, value in os.environ.items() if name not in TWO}
    words = ["trainer.torchrun", "--nproc-per-node", "2", str(folder / "script.py"), str(folder), mode]
    return subprocess.Popen(
        [sys.executable, "-m", *words],
        env={**environment, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_a_run_that_is_stopped_ends_with_75_where_this_package_starts_torchrun(tmp_path) -> None:
    with started(tmp_path, "runs") as running:
        end = time.monotonic() + 120
        while not (tmp_path / "going").exists() and time.monotonic() < end and running.poll() is None:
            time.sleep(0.05)
        running.send_signal(signal.SIGTERM)
        said = running.communicate(timeout=120)[0]
    assert running.returncode == 75, said
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert (saved / "rank-00001.safetensors").exists()


def test_the_exit_code_of_the_rank_that_failed_first_is_passed_on(tmp_path) -> None:
    with started(tmp_path, "fails") as running:
        said = running.communicate(timeout=120)[0]
    assert running.returncode == 4, said


def test_the_command_of_the_docs_trains_on_two_ranks(tmp_path) -> None:
    """Started as the page says; what it prints is on the page."""
    page = DOCS.read_text(encoding="utf-8")
    command, printed = re.search(r"```\n\$ torchrun (.*)\n((?:.*\n)*?)```", page).groups()[:2]
    environment = {name: value for name, value in os.environ.items() if name not in TWO}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    words = [sys.executable, "-m", "torch.distributed.run", *command.split()]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    wanted = "".join(r"(?:.*\n)*?" if line == "..." else re.escape(line).replace(r"\.\.\.", ".*") + "\n"
                     for line in printed.splitlines())  # fmt: skip
    assert re.fullmatch(wanted, done.stdout), done.stdout
    (folder,) = (tmp_path / "outputs" / "digits").iterdir()
    assert (folder / "model.safetensors").exists() and len(list(folder.glob("events.out.*"))) == 1
    # `-m trainer` puts the working folder in front, so nothing else was made there.
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]
