"""The recipe conv: it learns, and what it is shown depends on seed, epoch and row alone."""

import pytest
import torch
from torch.nn import functional
from trainer.recipes import conv

from tests.test_recipes import trainer_of
from trainer.errors import ConfigError


def test_conv_reaches_98_percent_of_held_out_rows_within_a_minute():
    stop = trainer_of("recipe=conv", "evaluation.every=null").fit()
    assert stop.metrics["accuracy"] >= 0.98
    assert stop.seconds < 60


def test_an_image_is_moved_by_whole_pixels_and_nothing_else_happens_to_it():
    data = conv.moved_images(most=2).train.for_epoch(3, 1)
    seen = set()
    for row in range(200):
        image, klass = data[row]
        assert image.shape == (1, 8, 8) and klass == data.classes[row]
        padded = functional.pad(data.images[row], [2] * 4)
        found = {
            (down, right)
            for down in range(5)
            for right in range(5)
            if torch.equal(image, padded[:, down : down + 8, right : right + 8])
        }
        assert found
        seen |= found if len(found) == 1 else set()
    assert len(seen) == 25  # every way to move it comes up


def test_the_draw_is_a_pure_function_of_seed_epoch_and_row():
    data = conv.moved_images().train
    state = torch.get_rng_state()

    def images(seed, epoch, rows=range(60)):
        now = data.for_epoch(seed, epoch)
        return torch.stack([now[row][0] for row in rows])

    first = images(1, 2)
    assert torch.equal(images(1, 2), first)
    assert torch.equal(images(1, 2, reversed(range(60))).flip(0), first)
    assert not torch.equal(images(1, 3), first) and not torch.equal(images(2, 2), first)
    assert torch.equal(torch.get_rng_state(), state)
    still = conv.moved_images(most=0).train.for_epoch(1, 2)
    assert torch.equal(still[5][0], still.images[5])


def short(*words, folder=None):
    words = ["data.source.held_out=1700", "model.width=4", "data.batch_size=32", *words]
    return trainer_of("recipe=conv", *words, folder=folder)


def parameters(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def test_workers_and_a_stop_in_mid_epoch_change_no_bit(tmp_path):
    whole = short("limits.epochs=3")
    whole.fit()  # 97 rows, 4 micro-batches an epoch
    wanted = parameters(whole)

    loading = short("limits.epochs=3", "data.workers=2")
    loading.fit()
    again = parameters(loading)
    assert all(torch.equal(wanted[name], again[name]) for name in wanted)

    # The schedule's end is told: else it would be that of the six steps.
    short("limits.epochs=3", "limits.steps=6", "schedule.total=12", folder=tmp_path).fit()
    other = short("limits.epochs=3", "schedule.total=12")
    other.fit(resume=tmp_path)
    resumed = parameters(other)
    assert other.step.clocks.steps == 12
    assert all(torch.equal(wanted[name], resumed[name]) for name in wanted)


def test_evaluation_leaves_the_held_out_images_where_they_are_and_batchnorm_as_it_was():
    trainer = short("limits.epochs=1")
    held_out = conv.moved_images(held_out=1700).evaluation[0]
    assert torch.equal(trainer._held_out.source.tensors[0], held_out)
    trainer.fit()
    before = parameters(trainer)
    assert trainer.evaluate() == trainer.evaluate()
    assert all(torch.equal(before[name], after) for name, after in parameters(trainer).items())


def test_a_distance_beyond_the_image_is_refused():
    with pytest.raises(ConfigError, match="data.source.most=8 is not possible"):
        conv.moved_images(most=8)
