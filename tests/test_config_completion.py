"""Tab completion: what may come next, and the three shells with their scripts in them."""

import os
import select
import shutil
import subprocess
import sys
import time

import pytest

from trainer.cli import main
from trainer.config import catalogue, completion, help

MINE = "# @package _global_\ndescription: my own\nmodel: {_target_: my.Net, width: 3}\n"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own" / "recipe").mkdir(parents=True)
    (tmp_path / "own" / "recipe" / "mine.yaml").write_text(MINE)
    return tmp_path


def words(*line):
    return [one.partition("\t")[0] for one in completion.lines(line)]


def test_the_first_word_is_a_verb(here):
    assert words("") == [*help.VERBS, "--help", "--version", "--completion"]
    assert words("ev") == ["eval"] and words("nothing", "") == [] and words() == words("")
    assert words("--completion", "") == ["bash", "zsh", "fish"]


def test_recipes_come_with_their_lines_and_ones_own_among_them(here):
    assert words("train", "recipe=") == [f"recipe={name}" for name in sorted(catalogue.options("recipe"))]
    assert completion.lines(["eval", "--config-dir", "own", "recipe=mi"]) == ["recipe=mine\tmy own"]
    assert words("train", "--config-dir", "nowhere", "recipe=mi") == []


def test_keys_come_a_level_at_a_time_and_those_of_the_recipe_as_well(here):
    assert words("train", "grad") == ["gradient.", "gradient_transforms="]
    assert words("train", "gradient.clip") == [
        "gradient.clip_norm=", "gradient.clip_value=", "gradient.clip_adaptive=",
    ]  # fmt: skip
    assert words("train", "recipe=xor_mlp", "model.w") == ["model.width="]
    assert completion.lines(["train", "recipe=mine", "--config-dir", "own", "model.w"]) == ["model.width=\tnow 3"]
    assert words("train", "model.w") == []
    assert words("train", "recipe=xor_mlp", "gradient.nope=1", "-m", "model.w") == ["model.width="]  # a mistake before
    assert words("train", "opt") == ["optimizer=", "optimizer."]
    assert "+optimizer.lr=" in words("train", "+optimizer.")
    assert words("train", "optimizer.lr.") == [] and words("train", "nope.") == []


def test_replay_offers_the_windows_that_runs_have_captured(here):
    (here / "outputs" / "digits" / "mine" / "captured" / "window-000018").mkdir(parents=True)
    assert words("replay", "out") == ["outputs/digits/mine/captured/window-000018"]
    assert "recipe=" in words("replay", "")
    assert words("replay", "outputs/digits/mine", "out") == []


def test_values_are_listed_where_they_can_be(here):
    assert words("train", "optimizer=") == ["optimizer=adamw", "optimizer=manual", "optimizer=sgd"]
    assert words("train", "gradient.zero_grad=") == [
        f"gradient.zero_grad={v}" for v in ("set_to_none", "zeros", "never")
    ]
    assert words("train", "loggers.console=") == ["loggers.console=true", "loggers.console=false"]
    assert words("train", "evaluation.every=n") == ["evaluation.every=null"]
    assert words("train", "data.batch_size=") == words("train", "nope.a=") == words("train", "init=") == []
    for name in ("one", "two", "sweep-1"):
        (here / "outputs" / "xor" / name).mkdir(parents=True)
    assert words("train", "recipe=xor", "run=") == ["run=one", "run=two"]


def test_flags_and_what_follows_them(here):
    assert words("train", "--config") == ["--config-dir", "--config-name"]
    assert words("train", "--cfg", "") == ["job", "hydra", "all"]
    assert words("train", "--config-dir", "") == words("train", "-p", "") == words("recipes", "") == []
    assert words("recipes", "-") == ["--help", "-h", "--config-dir", "-cd"]


def test_verbs_recipes_and_values_need_no_hydra(here):
    code = "import sys; from trainer.cli import main; main(['--complete', 'train', sys.argv[1]]); print(*sys.modules)"
    for word, hydra in (("recipe=", False), ("optimizer=", False), ("grad", True)):
        found = subprocess.run([sys.executable, "-c", code, word], capture_output=True, text=True, check=True)
        modules = found.stdout.splitlines()[-1].split()
        assert "torch" not in modules and ("hydra" in modules) == hydra


def test_an_unknown_shell_is_a_sentence(here, capsys):
    assert main(["--completion", "tcsh"]) == 2
    assert capsys.readouterr().err == "--completion tcsh: choose one of: bash, zsh, fish.\n"
    assert main(["--completion"]) == 2


@pytest.fixture
def command(here, monkeypatch):
    """A command `trainer` on the PATH."""
    folder = here / "bin"
    folder.mkdir()
    (folder / "trainer").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m trainer "$@"\n')
    (folder / "trainer").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("TERM", "xterm")
    return folder / "trainer"


def typed(shell: list[str], prepare: str, keys: list[str]) -> list[str]:
    """What a shell's line reads after the keys were typed into a terminal, for each of them; Ctrl-O shows it."""
    import pty

    child, terminal = pty.fork()
    if child == 0:
        os.execvp(shell[0], shell)
    got = b""

    def until(mark: bytes) -> bytes:
        nonlocal got
        end = time.monotonic() + 30
        while mark not in got and time.monotonic() < end:
            if select.select([terminal], [], [], 0.1)[0]:
                got += os.read(terminal, 65536)
        before, _, got = got.partition(mark)
        return before

    try:
        os.write(terminal, f"{prepare}\necho rea''dy\n".encode())
        until(b"ready\r\n")
        read = []
        for text in keys:
            os.write(terminal, f"{text}\t\x0f".encode())
            read.append(until(b">END").decode().rpartition("LINE<")[2])
            os.write(terminal, b"\x15")
        return read
    finally:
        os.close(terminal)  # which is a hang-up
        os.waitpid(child, 0)


KEYS = {
    "trainer ev": "trainer eval ",
    "trainer train recipe=xor_m": "trainer train recipe=xor_mlp ",
    "trainer train recipe=xor_mlp model.wid": "trainer train recipe=xor_mlp model.width=",
    "trainer eval init=oth": "trainer eval init=other.safetensors",
}


@pytest.mark.skipif(os.name == "nt" or not shutil.which("bash"), reason="there is no bash")
def test_bash_completes_what_is_typed(command, here):
    (here / "other.safetensors").touch()
    prepare = r"""eval "$(trainer --completion bash)"; bind -x '"\C-o":echo "LINE<$READLINE_LINE>END"'"""
    read = typed(["bash", "--norc", "--noprofile", "-i"], prepare, list(KEYS))
    assert [line.rstrip(" ") for line in read] == [line.rstrip(" ") for line in KEYS.values()]
    assert read[1].endswith(" ") and read[2].endswith("=")


@pytest.mark.skipif(not shutil.which("zsh"), reason="there is no zsh")
def test_zsh_completes_what_is_typed(command, here):
    (here / "other.safetensors").touch()
    prepare = (
        'autoload -Uz compinit; compinit -u -D; eval "$(trainer --completion zsh)"; '
        'show() { print -r -- "LINE<$BUFFER>END" }; zle -N show; bindkey "^O" show'
    )
    read = typed(["zsh", "-f", "-i"], prepare, list(KEYS))
    assert [line.rstrip(" ") for line in read] == [line.rstrip(" ") for line in KEYS.values()]


@pytest.mark.skipif(not shutil.which("fish"), reason="there is no fish")
def test_fish_offers_the_words(command, here):
    (here / "other.safetensors").touch()
    asked = "; ".join(f"complete -C '{line}'" for line in KEYS)
    script = f"trainer --completion fish | source; {asked}"
    found = subprocess.run(
        ["fish", "--no-config", "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    offered = [line.partition("\t")[0] for line in found.stdout.splitlines()]
    assert offered == ["eval", "recipe=xor_mlp", "model.width=", "init=other.safetensors"]
