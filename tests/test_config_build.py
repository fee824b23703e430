"""From a config to a Trainer."""

import sys

import pytest
import torch

from tests.test_config_schema import whole
from trainer.config import schema
from trainer.config.build import build, split, ticks
from trainer.config.door import Door
from trainer.data import Split
from trainer.errors import ConfigError
from trainer.gradient.objective import Supervised


def small(**changes):
    """A config of recipe parts, small and silent."""
    tree = whole(
        model={"_target_": "trainer.recipes.xor_mlp.MLP", "width": 3},
        objective={"_target_": "torch.nn.BCEWithLogitsLoss"},
        metrics={"_target_": "trainer.recipes.xor_mlp.accuracy", "_partial_": True},
        seed=5,
    )
    tree["data"]["source"] = {"_target_": "trainer.recipes.xor.table"}
    tree["loggers"] |= {"console": False, "tensorboard": False, "metrics": False}
    for key, value in changes.items():
        tree[key] = {**tree[key], **value} if isinstance(value, dict) and isinstance(tree[key], dict) else value
    return schema.read(tree)


def built(**changes):
    return build(small(**changes), Door())


def test_every_part_reaches_the_trainer():
    trainer = built(gradient={"clip_norm": 2.0}, limits={"epochs": 3}, best={"metric": "accuracy", "mode": "max"})
    assert isinstance(trainer.step.objective, Supervised)
    assert trainer.settings.gradient.clip_norm == 2.0 and trainer.recipe == "mine" and trainer.config["seed"] == 5
    stop = trainer.fit()
    assert stop.clocks["steps"] == 3 and set(stop.metrics) == {"loss", "accuracy"} and stop.best[0] == "accuracy"


def test_the_seed_alone_determines_the_start():
    def start(seed):
        torch.rand(7)
        return torch.cat([p.detach().flatten() for p in built(seed=seed).model.parameters()])

    assert torch.equal(start(1), start(1)) and not torch.equal(start(1), start(2))


def test_parameter_groups_of_the_config_reach_the_optimizer():
    groups = [{"match": ["biases"], "weight_decay": 0.0}, {"match": "hidden.*", "lr": 0.5}]
    optimizer = built(optimizer={"groups": groups}).step.optimizers[0]
    made = [(len(group["params"]), group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    assert made == [(1, 0.1, 0.01), (2, 0.1, 0.0), (1, 0.5, 0.01)]


@pytest.mark.parametrize(
    ("limits", "data", "accumulation", "clock", "total"),
    [
        ({"epochs": 3, "steps": None}, 10, 1, "steps", 9),  # 4 + 4 + 2 rows
        ({"epochs": 3, "steps": None}, 10, 2, "steps", 6),  # the last window of an epoch is shorter
        ({"epochs": 3, "steps": 5}, 10, 1, "steps", 5),
        ({"epochs": 3, "rows": None}, 10, 1, "rows", 30),
        ({"epochs": None, "rows": 17}, 10, 1, "rows", 17),
    ],
)
def test_a_schedules_total_comes_from_the_limits(limits, data, accumulation, clock, total):
    config = small(limits=limits, gradient={"accumulation_steps": accumulation}, data={"batch_size": 4})
    assert ticks(config, clock, (torch.ones(data, 2), torch.ones(data))) == total
    assert ticks(config, clock, torch.utils.data.TensorDataset(torch.ones(data))) == total


def test_a_total_of_whole_micro_batches_and_of_loaders():
    config = small(limits={"epochs": 2}, data={"batch_size": 4, "drop_last": True})
    assert ticks(config, "steps", (torch.ones(10),)) == 4 and ticks(config, "rows", (torch.ones(10),)) == 16
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(10)), batch_size=3)
    assert ticks(config, "steps", loader) == 8


def test_a_total_that_nothing_tells_is_asked_for():
    class Endless:
        def __iter__(self):
            return iter([torch.ones(2)])

    schedule = {"_target_": "trainer.optim.schedules.cosine", "total": None, "clock": "steps"}
    with pytest.raises(ConfigError, match=r"schedule.total is not set, .* set schedule.total, or limits.steps"):
        built(schedule=schedule, limits={"epochs": None, "time": 1.0})
    with pytest.raises(ConfigError, match=r"do not tell how many rows"):
        ticks(small(), "rows", Endless())
    with pytest.raises(ConfigError, match="schedule.clock='step' is not possible: did you mean 'steps'?"):
        ticks(small(), "step", Endless())


@pytest.mark.parametrize(("total", "rate"), [(None, 0.025), (8, 0.0625)])
def test_a_schedule_without_a_total_ends_with_the_run(total, rate):
    schedule = {"_target_": "trainer.optim.schedules.linear", "total": total, "clock": "steps"}
    trainer = built(schedule=schedule, limits={"epochs": None, "steps": 4})
    trainer.fit()
    assert trainer.last_report.lr == pytest.approx(rate)  # 0.1 at the first step, the fourth sees a count of 3


def test_a_run_that_is_shorter_than_its_warm_up_is_the_beginning_of_it():
    schedule = {"_target_": "trainer.optim.schedules.wsd", "warmup": 10, "decay": 20, "clock": "steps"}
    trainer = built(schedule=schedule, limits={"epochs": None, "steps": 3})
    trainer.fit()
    assert trainer.last_report.lr == pytest.approx(0.1 * 3 / 10)
    with pytest.raises(ConfigError, match="warm-up and decay take 30 of 8 ticks"):  # a total that was given stays
        built(schedule={**schedule, "total": 8}, limits={"epochs": None, "steps": 3})


def test_a_schedule_of_torch_is_given_the_optimizer():
    trainer = built(
        schedule={"_target_": "torch.optim.lr_scheduler.StepLR", "step_size": 1, "gamma": 0.5}, limits={"epochs": 2}
    )
    trainer.fit()
    assert trainer.step.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.025)


def test_a_loss_function_makes_an_objective():
    trainer = built(objective={"_target_": "torch.nn.functional.binary_cross_entropy_with_logits"})
    assert isinstance(trainer.step.objective, Supervised)


def test_what_a_data_source_may_return():
    rows = (torch.ones(2), torch.ones(2))
    assert split(Split(rows, rows)) == (rows, rows)
    dataset = torch.utils.data.TensorDataset(*rows)
    assert split(dataset) == (dataset, None)
    for wrong in (rows, [1], {}, None):
        with pytest.raises(ConfigError, match=r"return Split\(train, evaluation\)"):
            split(wrong)


def test_a_logger_of_ones_own_is_told():
    trainer = built(loggers={"others": {"explain": {"_target_": "trainer.recipes.xor.Explain"}}}, limits={"epochs": 1})
    assert any(type(logger).__name__ == "Explain" for logger in trainer._loggers)


NOISE = {"_target_": "trainer.gradient.transforms.noise", "std": 0.1}
FREEZE = {"_target_": "trainer.gradient.transforms.freeze", "match": "hidden.*", "until": 2}


@pytest.mark.parametrize("nodes", [[NOISE, FREEZE], {"shake": NOISE, "no": None, "hold": FREEZE}])
def test_gradient_transforms_come_in_their_order_as_a_list_or_by_names(nodes):
    trainer = built(gradient_transforms=nodes)
    assert [type(one).__name__ for one in trainer.step.transforms._all] == ["Noise", "Freeze"]
    before = [p.detach().clone() for p in trainer.model.hidden.parameters()]
    trainer.fit()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.hidden.parameters(), strict=True))


def test_the_schedule_of_the_noise_is_a_node_of_its_own():
    schedule = {"_target_": "trainer.optim.schedules.linear", "total": 4, "clock": "rows"}
    trainer = built(gradient_transforms=[NOISE | {"schedule": schedule}])
    assert trainer.step.transforms._all[0]._clock == "rows"


@pytest.mark.parametrize(
    ("nodes", "sentence"),
    [
        (NOISE, "it is a list of nodes with a _target_, or nodes by names"),
        (["noise"], "gradient_transforms.0='noise' is not possible: it is built from a _target_"),
        ([{"std": 0.1}], "gradient_transforms.0 has no _target_"),
        ({"mine": {"_target_": "os.system"}}, "gradient_transforms.mine._target_=os.system is refused"),
        ([{"_target_": "trainer.gradient.norms.norm"}], "of trainer, a config may name what is in"),
        ([NOISE | {"match": "nowhere"}], "noise: no parameter under training matches 'nowhere'"),
        ([NOISE | {"sdt": 0.1}], "there is no 'gradient_transforms.0.sdt'"),
    ],
)
def test_a_transform_that_is_none_gets_a_sentence(nodes, sentence):
    with pytest.raises(ConfigError) as error:
        built(gradient_transforms=nodes)
    assert sentence in str(error.value)


def test_the_users_rule_is_a_node_beside_the_objective(tmp_path, monkeypatch):
    (tmp_path / "my_rules.py").write_text(
        "def above(report, largest):\n    return f'the loss is above {largest}' if report.loss > largest else None\n"
    )
    monkeypatch.setattr("sys.path", [*sys.path])
    node = {"_target_": "my_rules.above", "_partial_": True, "largest": 0.0}
    trainer = build(small(skip_if=node, limits={"epochs": 2}), Door(folders=[tmp_path]))
    trainer.fit()
    assert trainer.step.clocks.as_dict()["steps"] == 0
    assert trainer.last_report.reason == "the loss is above 0.0"


def test_a_groups_own_bound_goes_through():
    optimizer = {"groups": [{"match": ["biases"], "clip_norm": 1e-3}]}
    trainer = built(optimizer=optimizer, gradient={"clip_norm": 1.0, "norm_order": "inf"})
    trainer.fit()
    assert list(trainer.last_report.group_norms) == ["1", "others"]
