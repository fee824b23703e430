"""Going on with other settings or on another machine: what is said, what is refused, and what then counts."""

from pathlib import Path

import pytest
import torch
from runs import trainer_of
from test_run_state import run

from trainer import CheckpointError, ConfigError, Settings
from trainer.checkpoint import changes, folder
from trainer.cli import main

WHERE = Path("the checkpoint")


def of(**flat) -> dict:
    from trainer.settings import from_flat

    return changes.config_of({"schedule": {"_target_": "x", "total": None}, "data": {"source": "y"}}, from_flat(flat))


def test_the_config_is_every_setting_and_what_only_the_command_line_knows() -> None:
    made = of(clip_norm=2.0)
    assert made["gradient"]["clip_norm"] == 2.0
    assert made["data"]["source"] == "y" and made["data"]["batch_size"] == 32
    assert changes.config_of({}, Settings())["checkpoint"]["last"] is True


def test_what_is_safe_goes_through_and_is_told() -> None:
    assert changes.judged(of(steps=3), of(steps=3), (), WHERE) == []
    said = changes.judged(of(steps=3), of(steps=5, log_every=7, seed=9), (), WHERE)
    assert said == [
        "changed since the checkpoint was saved: limits.steps 3 → 5, loggers.every 50 → 7, seed null → 9; the "
        "schedule's total follows the limits."
    ]
    assert "total" not in changes.judged(of(), of(log_every=7), (), WHERE)[0]
    assert (
        changes.judged(of(), of() | {"run": "b", "resume": "auto", "accept": ["gradient.reduction"]}, (), WHERE) == []
    )


def test_what_is_not_safe_must_be_said_twice() -> None:
    before, after = of(clip_norm=1.0, batch_size=4), of(clip_norm=0.5, batch_size=8, steps=3)
    with pytest.raises(ConfigError) as refused:
        changes.judged(before, after, (), WHERE)
    said = str(refused.value)
    assert "data.batch_size 4 → 8, gradient.clip_norm 1.0 → 0.5)" in said
    assert said.endswith("accept=[data.batch_size,gradient.clip_norm].")
    with pytest.raises(ConfigError, match=r"accept=\[data.batch_size,gradient.clip_norm\]"):
        changes.judged(before, after, ["data.batch_size"], WHERE)
    (told,) = changes.judged(before, after, ["data.batch_size", "gradient.clip_norm"], WHERE)
    assert "gradient.clip_norm 1.0 → 0.5" in told
    with pytest.raises(ConfigError, match="accept names 'gradient.clip_nrom', which is no key: did you mean"):
        changes.judged(before, after, ["gradient.clip_nrom"], WHERE)


@pytest.mark.parametrize(("before", "after", "safe"), [(2, 4, True), (0, 4, False), (1, 0, False)])
def test_another_number_of_workers_is_safe_where_all_items_come_from_workers(before, after, safe) -> None:
    if safe:
        assert changes.judged(of(workers=before), of(workers=after), (), WHERE)
    else:
        with pytest.raises(ConfigError, match=f"data.workers {before} → {after}"):
            changes.judged(of(workers=before), of(workers=after), (), WHERE)


def test_a_precision_of_another_dtype_is_refused_also_where_it_is_accepted() -> None:
    for accept in ((), ("precision",)):
        with pytest.raises(ConfigError, match=r"in float32, and precision=fp64 trains in float64: set it back.*init="):
            changes.judged(of(), of(precision="fp64"), accept, WHERE)
    with pytest.raises(ConfigError, match=r"accept=\[precision\]"):
        changes.judged(of(), of(precision="bf16"), (), WHERE)
    assert changes.judged(of(), of(precision="bf16"), ["precision"], WHERE)


def test_a_key_that_is_new_or_gone_is_a_change() -> None:
    with pytest.raises(ConfigError, match=r"model.width \(not there\) → 3"):
        changes.judged({}, {"model": {"width": 3}}, (), WHERE)
    with pytest.raises(ConfigError, match=r"model.width 3 → \(not there\)"):
        changes.judged({"model": {"width": 3}}, {}, (), WHERE)


def test_another_machine_is_told() -> None:
    here = changes.machine(torch.device("cpu"))
    assert torch.__version__ in here["torch"] and here["threads"] == torch.get_num_threads()
    assert here["CPU capability"] and here["device"] == "cpu"
    assert changes.moved(here, here) == []
    (said,) = changes.moved({**here, "threads": 64}, here)
    assert f"threads 64 → {here['threads']}" in said and "the last bits of results may differ" in said


# In runs.


def fit(path, resume="auto", accept=(), **settings):
    trainer = trainer_of("momentum", folder=path, **{"steps": 4, "console": True, **settings})
    trainer.fit(resume=resume, accept=accept)
    return trainer


def test_a_run_that_goes_on_says_what_changed_or_refuses(tmp_path, capsys) -> None:
    fit(tmp_path)
    capsys.readouterr()
    fit(tmp_path, steps=6)
    assert "changed since the checkpoint was saved: limits.steps 4 → 6." in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"gradient.clip_norm null → 1.0.*accept=\[gradient.clip_norm\]"):
        fit(tmp_path, steps=8, clip_norm=1.0)
    assert fit(tmp_path, steps=8, clip_norm=1.0, accept=["gradient.clip_norm"]).step.clocks.steps == 8
    fit(tmp_path, steps=9, clip_norm=1.0)  # said once more it is what the next checkpoint was saved with


def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path, capsys) -> None:
    expected = run("momentum", tmp_path / "whole", steps=8)
    fit(tmp_path / "b", steps=6, checkpoint_every=2, checkpoint_clock="steps", metrics_file=True)
    (_, newest) = (one.path for one in folder.listed(tmp_path / "b"))
    file = newest / "model.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    file.write_bytes(damaged)
    capsys.readouterr()
    trainer = fit(tmp_path / "b", steps=8)
    said = capsys.readouterr().out
    assert f"passed over: {newest}" in said.replace("\n", " ") and "goes on at step 4" in said
    weight = trainer.model[0].weight
    assert torch.equal(weight, expected.model[0].weight)


def test_where_every_checkpoint_is_damaged_nothing_begins_anew(tmp_path) -> None:
    fit(tmp_path)
    for one in folder.listed(tmp_path):
        (one.path / "state.json").write_text("{}")
    for resume in ("auto", "last"):
        with pytest.raises(CheckpointError, match="state.json"):
            fit(tmp_path, resume=resume)


def test_last_must_be_there_and_auto_need_not(tmp_path) -> None:
    with pytest.raises(
        CheckpointError, match=r"holds no checkpoint to go on from: name the run .* begin anew \(resume=auto\)"
    ):
        fit(tmp_path, resume="last")
    assert fit(tmp_path).step.clocks.steps == 4
    assert fit(tmp_path, resume="last", steps=5).step.clocks.steps == 5
    with pytest.raises(ConfigError, match='resume="last" needs the folder'):
        trainer_of("momentum", steps=1).fit(resume="last")


def test_a_run_that_begins_anew_puts_the_checkpoints_of_an_earlier_one_aside(tmp_path, capsys) -> None:
    fit(tmp_path, resume="never")
    before = [one.path.name for one in folder.listed(tmp_path)]
    capsys.readouterr()
    fit(tmp_path, resume="never", steps=2)
    assert "the checkpoints of an earlier run" in capsys.readouterr().out
    assert [one.manifest.clocks["steps"] for one in folder.listed(tmp_path)] == [2]
    assert sorted(path.name for path in (tmp_path / "checkpoints.previous").iterdir()) == before
    fit(tmp_path, resume="never", steps=1)
    assert (tmp_path / "checkpoints.previous-2").is_dir()


def test_other_words_are_refused_with_the_words_that_allow_them_and_then_count(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["train", "recipe=xor_mlp", "run=mine", "loggers.tensorboard=false", "data.batch_size=4"]
    assert main([*words, "limits.steps=3"]) == 0
    other = [*words, "limits.steps=6", "optimizer.lr=0.5", "optimizer.weight_decay=0.25"]
    assert main(other) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "optimizer.lr" in said and "accept=[optimizer.lr,optimizer.weight_decay]" in said
    assert main([*other, "accept=[optimizer.lr,optimizer.weight_decay]"]) == 0
    rates = [line for line in Path("outputs/xor_mlp/mine/metrics.jsonl").read_text().splitlines() if '"lr":0.5' in line]
    assert rates, "the new rate is what the step is taken with"
    assert main([*words, "limits.steps=7", "optimizer.lr=0.5", "optimizer.weight_decay=0.25"]) == 0
