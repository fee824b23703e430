"""The command line: most of it in this process, what only a process can show as one."""

import json
import os
import re
import signal
import subprocess
import sys
import warnings

import pytest

from trainer import cli
from trainer.checkpoint import lock
from trainer.cli import main
from trainer.config import catalogue, help
from trainer.errors import TrainerWarning

RECIPES = sorted(catalogue.options("recipe"))
MINE = """# @package _global_
# trainer train recipe=mine --config-dir .
description: a recipe of one's own
model: {_target_: cli_model.Net, width: 3}
objective: {_target_: torch.nn.MSELoss}
metrics: {_target_: cli_model.error, _partial_: true}
data: {source: {_target_: trainer.recipes.xor.table}}
limits: {epochs: 2}
seed: 0
loggers: {console: false, tensorboard: false}
"""
MODEL = """
import time
import torch
from trainer import ConfigError, Sum

class Net(torch.nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.width = width
        self.hidden, self.output = torch.nn.Linear(2, width), torch.nn.Linear(width, 1)
        if width == 11:
            raise KeyError("of the user's own")

    def forward(self, x):
        if self.width == 12:
            return self.deeper(x)
        if self.width == 13:
            print("ready", flush=True)
            time.sleep(60)
        return self.output(self.hidden(x).tanh())

    def deeper(self, x):
        raise RuntimeError("a mistake of the user's own")

def error(model, micro_batch):
    inputs, targets = micro_batch
    return {"error": Sum((model(inputs) - targets).abs().sum(), len(inputs))}
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder, with a recipe of one's own in ./own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "own" / "recipe").mkdir(parents=True)
    (tmp_path / "own" / "recipe" / "mine.yaml").write_text(MINE)
    (tmp_path / "own" / "recipe" / "cli_model.py").write_text(MODEL)
    yield tmp_path
    sys.modules.pop("cli_model", None)


def process(*words, **options):
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "trainer", *words],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **options,
    )


def mine(*words, verb="train"):
    return main([verb, "recipe=mine", "--config-dir", "own", *words])


def test_help_comes_in_half_a_second_and_imports_nothing_heavy(here):
    code = "import sys; from trainer.cli import main; main(['--help']); print(*sys.modules, file=sys.stderr)"
    best = float("inf")
    for _ in range(5):  # the processor's time and not the clock's: the machine may have other things to do
        before = os.times()
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        after = os.times()
        best = min(best, after.children_user + after.children_system - before.children_user - before.children_system)
    modules = set(found.stderr.split())
    assert not modules & {"torch", "hydra", "omegaconf", "numpy", "tensorboard", "sklearn", "tqdm"}
    assert "digits" in found.stdout and "gradient.clip_norm" in found.stdout and "eval" in found.stdout
    assert best < 0.5


def test_a_mistake_is_answered_before_torch_is_imported(here):
    code = (
        "import sys; from trainer.cli import main\n"
        "for words in (['gradient.clip_nrm=1'], ['+gradient.foo=1'], ['gradient.clip_norm=-1'], ['recipe=digit'],\n"
        "              ['optimizer=adam'], ['seed=abc'], ['model._target_=torch.load'], ['-m', 'seed=1,x'],\n"
        "              ['run=a/b']):\n"
        "    assert main(['train', 'recipe=digits', *words]) == 2, words\n"
        "assert 'torch' not in sys.modules"
    )
    found = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    lines = found.stderr.splitlines()
    assert len(lines) == 9 and all(re.search(r"[.?]$", line) for line in lines) and "Traceback" not in found.stderr
    assert lines[0] == "there is no setting 'gradient.clip_nrm': did you mean 'gradient.clip_norm'?"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["trian", "recipe=xor"], "there is no verb 'trian': did you mean 'train'?"),
        (["recipe=xor"], "the verb is missing before 'recipe=xor': write trainer train recipe=xor"),
        (["train"], f"there is no recipe: write recipe=NAME with one of: {', '.join(RECIPES)}."),
        (["train", "--mutlirun"], "there is no flag '--mutlirun': did you mean '--multirun'?"),
        (["train", "-m", "--cfg", "job"], "--multirun and --cfg do not go together: give one of them."),
        (["train", "--resolve"], "--resolve goes with --cfg: add --cfg job."),
        (["train", "--cfg", "job", "-p", "nowhere"], "--package nowhere: there is no such part of the config."),
        (["train", "--config-dir", "nowhere"], "--config-dir nowhere: there is no such folder."),
        (["recipes", "--config-dir", "nowhere"], "--config-dir nowhere: there is no such folder."),
        (["train", "--config-name", "nowhere"], "there is no config 'nowhere': look at the name, and at --config-dir."),
        (["recipes", "digits"], "recipes takes no 'digits': it lists all recipes."),
        (["eval", "recipe=xor", "run=nowhere"], "run=nowhere: there is no folder outputs/xor/nowhere, train it first"),
        (["eval", "recipe=xor", "init=nowhere"], "init=nowhere: there is no such file or folder"),
        (["train", "-sc", "install=fsh"], "No completion plugin for 'fsh' found"),
    ],
)  # fmt: skip
def test_wrong_words_are_one_sentence_and_exit_code_2(here, capsys, words, sentence):
    assert main(words) == 2
    said = capsys.readouterr()
    assert said.err.startswith(sentence) and said.err.count("\n") == 1 and not said.out
    assert not (here / "outputs").exists()


def test_recipes_lists_shipped_ones_and_ones_own(here, capsys):
    assert main(["recipes", "--config-dir", "own"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {"digits", "xor", "xor_mlp"} <= set(RECIPES)
    names = [line.split()[0] for line in lines]
    assert names == sorted([*RECIPES, "mine"])
    assert lines[names.index("mine")].endswith("a recipe of one's own") and all(len(line.split()) > 3 for line in lines)


def test_the_config_is_shown_whole_in_part_and_resolved(here, capsys):
    assert main(["train", "recipe=xor", "--cfg", "job", "gradient.clip_norm=3", "-p", "gradient"]) == 0
    assert "clip_norm: 3\n" in capsys.readouterr().out
    assert main(["train", "recipe=xor", "run=a", "--cfg", "hydra", "--resolve", "-p", "hydra.run"]) == 0
    assert capsys.readouterr().out == "# @package hydra.run\ndir: outputs/xor/a\n"
    assert main(["train", "recipe=xor", "--cfg", "job", "-p", "gradient.reduction"]) == 0
    assert capsys.readouterr().out == "mean\n"
    assert main(["train", "recipe=xor", "--cfg", "all"]) == 0
    assert "\nhydra:\n" in f"\n{capsys.readouterr().out}"
    assert main(["train", "recipe=xor", "--cfg", "job", "--resolve", "run=${nope}"]) == 2
    assert "Interpolation key 'nope' not found" in capsys.readouterr().err
    assert main(["train", "recipe=xor", "--info", "defaults"]) == 0
    assert "optimizer/manual" in capsys.readouterr().out
    assert main(["train", "--hydra-help"]) == 0
    assert "hydra/launcher" in capsys.readouterr().out


def test_shell_completion_knows_the_verb(here, capsys, monkeypatch):
    for line, wanted in (
        ("trainer ", " ".join(help.VERBS)),
        ("trainer train recipe=xor_", "recipe=xor_mlp"),
    ):
        monkeypatch.setenv("COMP_LINE", line)
        assert main(["-sc", "query=bash"]) == 0
        assert capsys.readouterr().out.split("\n")[0] == wanted
    assert main(["-sc", "install=bash"]) == 0
    assert "hydra_bash_completion()" in capsys.readouterr().out


def test_a_run_goes_into_its_folder_and_the_same_command_goes_on(here, capsys):
    folder = here / "outputs" / "mine" / "a"
    assert mine("run=a") == 0
    assert {"checkpoints", "model.safetensors", "metrics.jsonl", ".hydra"} <= {path.name for path in folder.iterdir()}
    assert mine("run=a", "limits.epochs=5") == 0
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluated = [event["epochs"] for event in events if event["event"] == "evaluation"]
    assert evaluated == [1, 2, 3, 4, 5]  # none twice: it went on where it had stopped
    assert not capsys.readouterr().err

    def loss(*words):
        assert mine(*words, verb="eval") == 0
        return capsys.readouterr().out.splitlines()

    before = sorted(here.glob("**/*"))
    trained = loss("run=a")
    assert trained[0] == "mine: outputs/mine/a" and [line.split()[0] for line in trained[1:]] == ["loss", "error"]
    assert loss(f"init={folder}/model.safetensors")[1:] == trained[1:]
    fresh = loss()
    assert fresh[0] == "mine: a fresh model" and fresh[1:] != trained[1:]
    assert sorted(here.glob("**/*")) == before  # evaluation writes nothing


def test_a_run_without_a_name_lies_under_the_time_and_says_how_to_go_on(here, capsys):
    assert mine("loggers.console=true") == 0
    (folder,) = (here / "outputs" / "mine").iterdir()
    assert re.fullmatch(r"[-_\d]+", folder.name)
    said = capsys.readouterr().out
    assert f"outputs/mine/{folder.name}/model.safetensors" in said
    assert f"trainer train recipe=mine loggers.console=true run={folder.name} --config-dir own" in said


def test_the_users_own_exception_keeps_its_traceback_without_ours(here, capsys):
    for width, last in (("12", "RuntimeError: a mistake of the user's own"), ("11", 'KeyError: "of the user\'s own"')):
        assert mine(f"model.width={width}") == 1
        said = capsys.readouterr().err
        assert said.startswith("Traceback") and said.rstrip().endswith(last) and "cli_model.py" in said
        assert "hydra" not in said and "trainer/cli.py" not in said and "loop.py" not in said and "torch/nn" not in said


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("model.width=x", "model.width='x' is not possible: cli_model.Net wants int."),
        ("+model.wdth=3", "there is no 'model.wdth': of what cli_model.Net takes, did you mean 'width'?"),
        ("model._target_=cli_model.net", "model._target_=cli_model.net: cli_model has no 'net': did you mean 'Net'?"),
        (
            "optimizer.lr=-1",
            "optimizer: trainer.optim.adamw does not take these arguments: Invalid learning rate: -1.0",
        ),
        ("model._target_=cli_model.time.sleep", "model._target_=cli_model.time.sleep: cli_model has no 'time'"),
    ],
)
def test_what_only_the_code_can_tell_is_a_sentence_as_well(here, capsys, word, sentence):
    assert mine(word) == 2
    said = capsys.readouterr().err
    assert said.startswith(sentence) and said.count("\n") == 1


def test_a_sweep_says_which_job_failed_and_runs_the_others(here, capsys):
    assert mine("-m", "model.width=3,12,4", "best.metric=error") == 1
    said = capsys.readouterr()
    assert re.search(r"^job 0: error [\d.]+$", said.out, re.M) and re.search(r"^job 2: error [\d.]+$", said.out, re.M)
    assert "job 1: failed" in said.err and "a mistake of the user's own" in said.err and "job 0" not in said.err
    (sweep,) = (here / "outputs" / "mine").iterdir()
    assert re.fullmatch(r"sweep-[-_\d]+", sweep.name)
    assert {path.name for path in sweep.iterdir() if path.is_dir()} == {"0", "1", "2"}
    assert (sweep / "2" / "model.safetensors").exists()


def test_a_sweep_with_one_wrong_value_does_not_begin(here, capsys):
    assert mine("-m", "gradient.clip_norm=1,-1") == 2
    said = capsys.readouterr()
    assert said.err == "gradient.clip_norm=-1 is not possible: input should be greater than 0.\n" and not said.out


def test_hostile_targets_are_refused_from_every_place_and_nothing_runs(here, capsys):
    canary = here / "canary"
    node = f"{{_target_: os.system, command: touch {canary}}}"
    for key in (
        "++model",
        "++objective",
        "++metrics",
        "schedule",
        "++data.source",
        "+loggers.others.a",
        "++model.width",
        "+optimizer.x",
    ):
        assert mine(f"{key}={node}") == 2, key
        said = capsys.readouterr().err
        assert "os.system" in said and "trust=[os]" in said and said.count("\n") == 1
    for word in (
        f"+hydra.callbacks.a={node}",
        "hydra.launcher._target_=os.system",
        "hydra.sweeper._target_=os.system",
    ):
        assert mine("-m", "seed=1,2", word) == 2
        said = capsys.readouterr().err
        assert "os.system" in said and said.count("\n") == 1
    assert not canary.exists()


def test_ctrl_c_is_one_line_and_the_exit_code_of_what_can_go_on(here):
    words = [sys.executable, "-m", "trainer", "train", "recipe=mine", "--config-dir", "own", "model.width=13"]

    def listen() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background job ignores it, and so would its children

    with subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=listen if os.name == "posix" else None,
    ) as running:
        assert running.stdout.readline() == "ready\n"
        running.send_signal(signal.SIGINT)
        _, said = running.communicate(timeout=60)
    assert running.returncode == 75 and said == "stopped by Ctrl-C.\n"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGPIPE to be like")
def test_a_reader_that_leaves_is_no_error(here):
    for words in (["--help"], ["train", "recipe=digits", "--cfg", "job"], ["train", "--info", "defaults"]):
        reading, writing = os.pipe()
        os.close(reading)
        found = subprocess.run(
            [sys.executable, "-m", "trainer", *words],
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            timeout=60,
        )
        os.close(writing)
        assert found.returncode in (0, 141) and found.stderr == "", words


def test_the_module_and_its_version_as_a_process(here):
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", process("--version").stdout)
    found = process("train", "recipe=xor", "debug=fast", "loggers.console=false")
    assert found.returncode == 0 and "No straight line" in found.stdout and found.stderr == ""


def test_ctrl_c_while_a_value_is_resolved_is_ctrl_c(here, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("trainer.config.schema.read", interrupted)
    assert mine() == 130
    assert capsys.readouterr().err == "stopped by Ctrl-C.\n"


def test_a_folder_that_cannot_be_made_is_a_sentence(here, capsys):
    (here / "outputs").write_text("a file where the folder should be")
    assert mine() == 5
    said = capsys.readouterr().err
    assert said.startswith("the run's folder outputs/mine/") and said.count("\n") == 1


def test_the_words_to_go_on_are_those_that_were_typed(here, capsys, monkeypatch):
    monkeypatch.setenv("TRAINER_COMMAND", "./scripts/train")
    assert mine("loggers.console=true") == 0
    assert "./scripts/train recipe=mine loggers.console=true run=" in capsys.readouterr().out


def test_a_folder_in_which_another_run_is_going_on_is_left_as_it_is(here, capsys):
    assert mine("run=a") == 0
    folder = here / "outputs" / "mine" / "a"
    before = (folder / "config.yaml").read_text()
    with lock.held(folder):
        assert mine("run=a", "optimizer.lr=1e-4") == 5
        assert "is in use by another Trainer of this process: wait for it" in capsys.readouterr().err
    assert (folder / "config.yaml").read_text() == before
    assert not (folder / lock.NAME).exists()


def test_our_warnings_are_a_sentence_and_those_of_others_stay_what_they_are(capsys, monkeypatch):
    def act(words):
        warnings.warn("it is so.", TrainerWarning, stacklevel=1)
        warnings.warn("theirs", UserWarning, stacklevel=1)
        return 0

    monkeypatch.setattr(cli, "_main", act)
    before = warnings.showwarning
    with pytest.warns(UserWarning, match="theirs") as others:
        assert cli.main([]) == 0
    assert warnings.showwarning is before
    assert [str(one.message) for one in others] == ["theirs"]
    assert capsys.readouterr().err == "warning: it is so.\n"


def test_ctrl_c_while_the_command_is_imported_is_one_line(capsys, monkeypatch):
    class Interrupts:
        def find_spec(self, name, path=None, target=None):
            if name == "trainer.cli":
                raise KeyboardInterrupt

    from trainer import __main__

    monkeypatch.delitem(sys.modules, "trainer.cli")
    monkeypatch.delattr("trainer.cli")
    monkeypatch.setattr(sys, "meta_path", [Interrupts(), *sys.meta_path])
    assert __main__.main() == 130
    assert capsys.readouterr().err == "stopped by Ctrl-C.\n"


def test_a_terminal_that_cannot_show_a_letter_is_no_reason_to_end(tmp_path):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii:strict"}
    words = [sys.executable, "-m", "trainer", "recipes"]
    done = subprocess.run(words, capture_output=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0 and b"scalar" in done.stdout and not done.stderr
