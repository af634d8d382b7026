"""Triggers by golden pixels and properties, label rules, and how many samples are poisoned."""

from types import SimpleNamespace

import pytest
import torch

import attacks
from config import UserError
from utils.seeds import generator


def options(**changes):
    base = {"trigger_type": "gridTrigger", "target_type": "all2one", "target_label": 5, "trig_w": 3, "trig_h": 3,
            "trig_distance": -1, "seed": 0}
    return SimpleNamespace(**{**base, **changes})


def stamp(shape=(3, 32, 32), value=100, **changes):
    trigger = attacks.make_trigger(options(**changes), shape)
    return trigger(torch.full((2, *shape), value, dtype=torch.uint8))


def test_grid_has_the_pixels_of_the_demo():
    image = stamp()[0]
    for channel in image:
        # from the bottom row upwards, from the right column leftwards
        assert channel[31, [31, 30, 29]].tolist() == [255, 0, 255]
        assert channel[30, [31, 30, 29]].tolist() == [0, 255, 0]
        assert channel[29, [31, 30, 29]].tolist() == [255, 0, 0]
    image[:, 29:, 29:] = 100
    assert (image == 100).all()


def test_square_takes_width_height_and_distance():
    image = stamp(trigger_type="squareTrigger", trig_w=5, trig_h=2)[0]
    assert (image[:, 29:31, 26:31] == 255).all()
    assert (image == 255).sum() == 3 * 5 * 2
    assert (stamp(trigger_type="squareTrigger", trig_distance=4)[0, :, 25:28, 25:28] == 255).all()


def test_grid_takes_width_and_height():
    image = stamp(trig_w=4, trig_h=6)[0, 0]
    assert (image != 100).sum() == 24
    assert (image[26:, 28:] != 100).all()


def test_four_corners_are_equal_and_equally_far_from_the_edges():
    image = stamp(trigger_type="fourCornerTrigger")[0, 0]
    patches = [image[rows, cols] for rows in (slice(1, 4), slice(28, 31)) for cols in (slice(1, 4), slice(28, 31))]
    assert all(torch.equal(p, patches[0]) for p in patches)
    assert (image != 100).sum() == 36


@pytest.mark.parametrize("name", sorted(attacks.TRIGGERS))
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 64, 48)])
def test_every_trigger_is_a_pure_function(name, shape):
    images = torch.randint(0, 256, (7, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    before = images.clone()
    first = attacks.make_trigger(options(trigger_type=name), shape)(images)
    again = attacks.make_trigger(options(trigger_type=name), shape)(images)
    assert first.dtype == torch.uint8
    assert first.shape == images.shape
    assert torch.equal(first, again)
    assert torch.equal(images, before)
    assert not torch.equal(first, images)


@pytest.mark.parametrize("name", sorted(attacks.TRIGGERS))
def test_bigger_than_the_image(name):
    with pytest.raises(UserError, match="--trig_w 40"):
        attacks.make_trigger(options(trigger_type=name, trig_w=40), (3, 32, 32))


def test_unknown_trigger_lists_the_known():
    with pytest.raises(UserError, match="gridTrigger.*got 'grid'"):
        attacks.make_trigger(options(trigger_type="grid"), (3, 32, 32))


@pytest.mark.parametrize("n_classes", [10, 43, 100])
def test_label_rules(n_classes):
    labels = torch.arange(n_classes)
    shifted = attacks.poisoned_labels(labels, options(target_type="all2all"), n_classes)
    assert shifted.tolist() == [*range(1, n_classes), 0]
    assert attacks.poisoned_labels(labels, options(), n_classes).unique().tolist() == [5]
    assert attacks.scored(labels, options()).sum() == n_classes - 1
    assert attacks.scored(labels, options(target_type="all2all")).all()


@pytest.mark.parametrize(("portion", "count"), [(0, 0), (0.1, 100), (0.0005, 1), (0.0004, 0), (0.3333, 333), (1, 1000)])
def test_counts(portion, count):
    labels = torch.arange(1000) % 10
    chosen = attacks.choose_poisoned(labels, options(), portion, generator(0))
    assert len(chosen) == len(chosen.unique()) == count


def test_clean_label_takes_the_target_class_only_and_not_more_than_it_has():
    labels = torch.arange(1000) % 10
    clean = options(target_type="cleanLabel", target_label=3)
    chosen = attacks.choose_poisoned(labels, clean, 0.08, generator(0))
    assert len(chosen) == 80
    assert (labels[chosen] == 3).all()
    with pytest.raises(UserError, match="class 3 has only 100"):
        attacks.choose_poisoned(labels, clean, 0.11, generator(0))
