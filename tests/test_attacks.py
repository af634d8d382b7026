"""Triggers by golden pixels, closed forms and properties; label rules; how many samples are poisoned."""

import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

import attacks
from attacks.clean_label import pgd
from attacks.input_aware import diversity
from attacks.refool import ghosted, out_of_focus
from attacks.shape import shape_mask
from attacks.signal import signal
from attacks.trojan import optimise, strongest_neurons
from attacks.wanet import identity_grid, warp_grid
from config import AttackConfig, UserError
from data_loader import DatasetBD, backdoor_tests
from defenses.neural_cleanse import Triggers
from models import select_model
from utils.data import TensorData
from utils.seeds import generator

STATIC = sorted(set(attacks.TRIGGERS) - {"clTrigger", "trojanTrigger", "reversedTrigger"})  # those need a file


def options(**changes):
    base = {"trigger_type": "gridTrigger", "target_type": "all2one", "target_label": 5, "trig_w": 3, "trig_h": 3,
            "trig_distance": -1, "seed": 0}
    return SimpleNamespace(**{**base, **changes})


def noise(n, shape=(3, 32, 32), seed=0):
    return torch.randint(0, 256, (n, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def some_data(per_class=20, n_classes=10, shape=(3, 32, 32)):
    labels = torch.arange(n_classes).repeat_interleave(per_class)
    return TensorData(noise(len(labels), shape), labels, range(n_classes))


def reversed_triggers(path, labels=(5, 0), **changes):
    """Write what detect.py writes: a mask and a pattern for each of ``labels``. Returns it."""
    gen = torch.Generator().manual_seed(0)
    found = {"labels": list(labels), "masks": torch.rand(len(labels), 1, 32, 32, generator=gen),
             "patterns": torch.rand(len(labels), 3, 32, 32, generator=gen), **changes}
    torch.save(found, path)
    return found


@pytest.fixture
def clean_model(tmp_path, monkeypatch):
    """A checkpoint of a small network, and reversed triggers, in a folder of its own where caches may be written."""
    monkeypatch.chdir(tmp_path)
    reversed_triggers("triggers.pt")
    torch.manual_seed(0)
    state = select_model("CIFAR10", "WRN-10-1").state_dict()
    torch.save({"state_dict": state, "config": {"s_name": "WRN-10-1", "dataset": "CIFAR10"}}, "clean.tar")
    return "clean.tar"


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
    assert patches[0].tolist() == [[0, 0, 255], [0, 255, 0], [255, 0, 255]]
    assert (image != 100).sum() == 36


@pytest.mark.parametrize("name", STATIC)
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 64, 48)])
def test_every_trigger_is_a_pure_function(name, shape):
    images = noise(7, shape)
    before = images.clone()
    stamped = []
    for _ in range(2):
        trigger = attacks.make_trigger(options(trigger_type=name), shape)
        if name == "refoolTrigger":
            trigger.see(noise(20, shape, 1))
        stamped.append(trigger(images))
        assert torch.equal(trigger(images), stamped[-1])
    assert stamped[0].dtype == torch.uint8
    assert stamped[0].shape == images.shape
    assert torch.equal(*stamped)
    assert torch.equal(images, before)
    assert not torch.equal(stamped[0], images)
    assert trigger(images[:0]).shape == (0, *shape)


@pytest.mark.parametrize("name", [name for name in STATIC if name != "inputAwareTrigger"])
def test_a_sample_is_poisoned_alike_in_any_batch(name):
    data, order = some_data(per_class=4), torch.randperm(40, generator=generator(0))
    train = DatasetBD(options(trigger_type=name, cover_portion=0.0), data, 0.7)
    whole = train.stamped(data.images, torch.arange(40))
    assert torch.equal(train.stamped(data.images[order], order), whole[order])
    assert all(torch.equal(train.take(torch.tensor([i])).images[0], whole[i]) for i in range(40))


@pytest.mark.parametrize("name", ["randomPixelTrigger", "blendTrigger", "wanetTrigger", "multiTrigger"])
def test_the_fixed_draw_depends_on_its_seed_only(name):
    images = noise(3)
    first = attacks.make_trigger(options(trigger_type=name, seed=1), (3, 32, 32))(images)
    assert torch.equal(first, attacks.make_trigger(options(trigger_type=name, seed=2), (3, 32, 32))(images))
    other = attacks.make_trigger(options(trigger_type=name, trigger_seed=1), (3, 32, 32))(images)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(("name", "limit"), [("signalTrigger", 20), ("blendTrigger", 52), ("refoolTrigger", 0),
                                             ("wanetTrigger", 0), *((f"{name}Trigger", 77) for name in (
                                                 "square", "randomPixel", "grid", "fourCorner", "multi", "shape"))])
@pytest.mark.parametrize("value", [0, 255])
def test_a_saturated_image_does_not_wrap_around(name, limit, value):
    """What a trigger adds to black or white is no more than its own share: a wrapped pixel would move by far more."""
    images = torch.full((4, 3, 32, 32), value, dtype=torch.uint8)
    trigger = attacks.make_trigger(options(trigger_type=name, transparency=0.7), (3, 32, 32))
    trigger.see(torch.full((10, 3, 32, 32), value, dtype=torch.uint8))
    moved = (trigger(images).int() - value).abs()
    assert moved.max() <= limit
    assert moved.any() or name in ("refoolTrigger", "wanetTrigger", "squareTrigger", "shapeTrigger")


def test_bright_reflections_on_a_bright_image_do_not_wrap_around():
    trigger = attacks.make_trigger(options(trigger_type="refoolTrigger", reflection_weight=0.3), (3, 32, 32))
    trigger.see(torch.full((10, 3, 32, 32), 200, dtype=torch.uint8))
    assert trigger(torch.full((40, 3, 32, 32), 255, dtype=torch.uint8)).min() >= 200
    assert trigger(torch.full((40, 3, 32, 32), 250, dtype=torch.uint8)).min() >= 200


def test_random_pixels_are_somewhere_else_each_and_the_same_in_all_images():
    opt = options(trigger_type="randomPixelTrigger", trig_w=4, trig_h=5)
    trigger = attacks.make_trigger(opt, (3, 32, 32))
    rows, cols = trigger.mask.nonzero().unbind(1)
    assert len(rows) == 20
    assert rows.max() - rows.min() > 16
    assert cols.max() - cols.min() > 16
    assert len(rows.unique()) > 8
    assert trigger.pattern[:, trigger.mask].unique().numel() > 30
    images = noise(3)
    out = trigger(images)
    for image, stamped in zip(images, out, strict=True):
        assert torch.equal(stamped[:, trigger.mask], trigger.pattern[:, trigger.mask])
        assert torch.equal(stamped[:, ~trigger.mask], image[:, ~trigger.mask])


def test_signal_is_the_closed_form():
    wave = signal(32, 20.0, 6.0)
    for j in range(32):
        assert wave[j].item() == pytest.approx(20 * math.sin(2 * math.pi * j * 6 / 32), abs=1e-5)
    image = stamp(trigger_type="signalTrigger", value=128)[0]
    expected = [round(128 + 20 * math.sin(2 * math.pi * j * 6 / 32)) for j in range(32)]
    assert image[:, :, :].unique(dim=1).shape[1] == 1, "all rows are the same"
    assert image[0, 0].tolist() == expected
    assert stamp(trigger_type="signalTrigger", value=250)[0].max() == 255
    assert stamp(trigger_type="signalTrigger", value=5)[0].min() == 0


def test_blend_is_one_pattern_for_images_epochs_train_and_test():
    trigger = attacks.make_trigger(options(trigger_type="blendTrigger"), (3, 32, 32))
    black = torch.zeros(5, 3, 32, 32, dtype=torch.uint8)
    out = trigger(black)
    assert (out == out[0]).all()
    assert torch.equal(out, (trigger.pattern.float() * 0.2).round().to(torch.uint8).expand_as(out))
    data = TensorData(torch.zeros(100, 3, 32, 32, dtype=torch.uint8), torch.arange(100) % 10, range(10))
    train = DatasetBD(options(trigger_type="blendTrigger"), data, 1.0)
    test = DatasetBD(options(trigger_type="blendTrigger", seed=9), data, mode="test")
    for epoch in (0, 3):
        assert torch.equal(train.stamped(data.images[:5], torch.arange(5), epoch), out)
    assert torch.equal(test.images[:5], out)


def test_blend_weights_of_training_and_test():
    trigger = attacks.make_trigger(options(trigger_type="blendTrigger", blend_alpha=0.1, blend_test_alpha=1.0),
                                   (3, 32, 32))
    black = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    assert torch.equal(trigger(black)[0], trigger.pattern)
    assert trigger.poison(black, torch.arange(1)).max() == 26


def test_blend_image_from_a_file(tmp_path):
    array = np.arange(32 * 32 * 3, dtype=np.int64).reshape(32, 32, 3).astype(np.uint8)
    Image.fromarray(array).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no image")
    opt = options(trigger_type="blendTrigger", blend_image=str(tmp_path / "a.png"), blend_alpha=1.0)
    trigger = attacks.make_trigger(opt, (3, 32, 32))
    assert torch.equal(trigger(noise(1))[0], torch.from_numpy(array.transpose(2, 0, 1).copy()))
    again = attacks.make_trigger(options(trigger_type="blendTrigger"), (3, 32, 32), trigger.state())
    assert torch.equal(again.pattern, trigger.pattern), "a checkpoint's pattern needs no file"
    ramp = np.linspace(0, 65535, 1024).reshape(32, 32).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    opt_16_bits = options(trigger_type="blendTrigger", blend_image=str(tmp_path / "deep.png"))
    pattern = attacks.make_trigger(opt_16_bits, (1, 32, 32)).pattern[0]
    assert torch.equal(pattern.float(), torch.from_numpy((ramp / 257).round()).float())
    with pytest.raises(UserError, match="is 32 wide and 32 high, the images are 64 wide"):
        attacks.make_trigger(opt, (3, 64, 64))
    for name, words in (("b.png", "cannot be read"), ("c.png", "No such file")):
        with pytest.raises(UserError, match=words):
            attacks.make_trigger(options(trigger_type="blendTrigger", blend_image=str(tmp_path / name)), (3, 32, 32))


def test_a_reversed_trigger_is_the_one_that_neural_cleanse_measured(tmp_path):
    file = tmp_path / "triggers.pt"
    found = reversed_triggers(file)
    opt = {"trigger_type": "reversedTrigger", "reversed_file": str(file)}
    own = Triggers(found["labels"], found["masks"], found["patterns"], None)
    for k, label in enumerate(found["labels"]):
        trigger = attacks.make_trigger(options(**opt, target_label=label), (3, 32, 32))
        assert torch.equal(trigger(noise(9)), own.stamp(noise(9), k))
        again = attacks.make_trigger(options(trigger_type="reversedTrigger"), (3, 32, 32), trigger.state())
        assert torch.equal(again(noise(9)), trigger(noise(9))), "a checkpoint's trigger needs no file"


@pytest.mark.parametrize(("changes", "words"), [
    ({}, "--target_label 3: .* holds triggers for 5, 0"),
    ({"target_type": "all2all"}, "has many"),
    ({"reversed_file": ""}, "--reversed_file is needed"),
    ({"reversed_file": "none.pt"}, "no such checkpoint: none.pt"),
    ({"labels": [3, 4], "masks": torch.zeros(2)}, "is not a triggers.pt"),
    ({"labels": [3], "masks": torch.zeros(2, 1, 32, 32)}, "is not a triggers.pt"),
    ({"labels": [3, 4], "masks": torch.full((2, 1, 32, 32), 1.5)}, "the mask in the file is not what"),
    ({"labels": [3, 4], "patterns": torch.full((2, 3, 32, 32), math.nan)}, "the pattern in the file is not what"),
    ({"labels": [3, 4], "masks": torch.zeros(2, 1, 16, 16)}, "not what this attack needs, 1 x 32 x 32"),
])
def test_reversed_triggers_that_will_not_do(tmp_path, changes, words):
    held = {name: changes.pop(name) for name in ("labels", "masks", "patterns") if name in changes}
    reversed_triggers(tmp_path / "triggers.pt", **held)
    opt = {"trigger_type": "reversedTrigger", "reversed_file": str(tmp_path / "triggers.pt"), "target_label": 3}
    with pytest.raises(UserError, match=words):
        attacks.make_trigger(options(**{**opt, **changes}), (3, 32, 32))


def test_wanet_grid_and_identity():
    for seed in range(20):
        grid = warp_grid(32, 32, 4, 8.0, generator(seed))
        assert grid.abs().max() <= 1
    assert torch.equal(warp_grid(32, 48, 4, 0.0, generator(0)), identity_grid(32, 48))
    images = noise(3)
    assert torch.equal(attacks.make_trigger(options(trigger_type="wanetTrigger", warp_s=0.0), (3, 32, 32))(images),
                       images)


def test_wanet_moves_by_the_normalised_field():
    """At the control points, every tenth pixel of 31, the upsampled field is the field itself."""
    gen, again = generator(1), generator(1)
    field = torch.rand(1, 2, 4, 4, generator=again) * 2 - 1
    shift = (warp_grid(31, 31, 4, 0.5, gen) - identity_grid(31, 31))[10:21:10, 10:21:10]  # the edges are clamped
    assert torch.allclose(shift, 0.5 / 31 * (field / field.abs().mean())[0, :, 1:3, 1:3].permute(1, 2, 0), atol=1e-5)


def test_wanet_noise_is_drawn_anew_and_can_be_repeated():
    data = some_data()
    train = DatasetBD(options(trigger_type="wanetTrigger"), data)
    assert len(train.poisoned) == 20
    assert len(train.cover) == 40
    assert not set(train.cover.tolist()) & set(train.poisoned.tolist())
    assert torch.equal(train.labels[train.cover], data.labels[train.cover])
    part = train.cover[:8]
    first = train.stamped(data.images[part], part, 0)
    assert torch.equal(first, train.stamped(data.images[part], part, 0))
    assert not torch.equal(first, train.stamped(data.images[part], part, 1))
    assert not torch.equal(first, train.trigger(data.images[part]))
    other = DatasetBD(options(trigger_type="wanetTrigger", seed=1), data, trigger=train.trigger)
    assert not torch.equal(other.cover, train.cover)
    other.kind[part] = 2
    assert not torch.equal(first, other.stamped(data.images[part], part, 0))


def test_wanet_noise_is_added_to_the_warp_and_less_than_a_pixel(monkeypatch):
    trigger = attacks.make_trigger(options(trigger_type="wanetTrigger"), (3, 32, 32))
    grids = []
    monkeypatch.setattr(trigger, "warp", lambda images, grid: grids.append(grid) or images)
    trigger.cover(noise(20), None, generator(0))
    assert grids[0].abs().max() <= 1
    moved = (grids[0] - trigger.grid)[:, 4:-4, 4:-4] * 32  # where nothing is clipped
    assert 0.99 < moved.abs().max() <= 1 + 1e-4
    assert moved.mean().abs() < 0.02
    assert moved.std().item() == pytest.approx(1 / math.sqrt(3), rel=0.02)


def test_patches_let_the_image_show_through():
    image = stamp(trigger_type="squareTrigger", transparency=0.9, trig_w=20, trig_h=20)[0]
    assert (image[:, 11:31, 11:31] == round(0.1 * 255 + 0.9 * 100)).all()
    assert (image != 100).sum() == 3 * 400


def test_shapes():
    masks = {name: shape_mask(name, 16, 16) for name in attacks.SHAPES}
    assert len({m.numpy().tobytes() for m in masks.values()}) == 7
    area = {name: m.float().mean().item() for name, m in masks.items()}
    expected = {"triangle": 1 / 2, "square": 1, "hexagon": 3 / 4, "circle": math.pi / 4, "parallelogram": 0.7,
                "quadrant": math.pi / 4, "semicircle": math.pi / 4}
    for name, share in expected.items():
        assert area[name] == pytest.approx(share, abs=0.04), name
    assert not masks["quadrant"][0, 0]
    assert masks["quadrant"][15, 15]
    assert masks["semicircle"][15].all()
    for n in (1, 2, 3):
        assert all(shape_mask(name, n, n).any() for name in attacks.SHAPES)
    assert (stamp(trigger_type="shapeTrigger", trig_shape="circle", trig_w=8, trig_h=8)[0] == 255).sum() \
        == 3 * shape_mask("circle", 8, 8).sum()


def test_multi_trigger_places():
    trigger = attacks.make_trigger(options(trigger_type="multiTrigger", n_triggers=5), (3, 32, 32))
    grey = torch.full((1, 3, 32, 32), 100, dtype=torch.uint8)
    for k, (row, col) in enumerate([(28, 28), (28, 1), (1, 28), (1, 1), (14, 14)]):
        changed = (trigger(grey, part=f"trigger {k + 1}")[0] != 100).any(0)
        expected = torch.zeros(32, 32, dtype=torch.bool)
        expected[row:row + 3, col:col + 3] = True
        assert torch.equal(changed, expected)


def test_multi_trigger_with_a_source_class():
    opt = options(trigger_type="multiTrigger", target_type="classSpecific", n_triggers=3)
    train = DatasetBD(opt, some_data(), 0.05)
    _, parts = backdoor_tests(opt, some_data(), train.trigger)
    assert set(parts) == {"trigger 1", "trigger 2", "trigger 3", "all triggers", "other classes"}
    assert (parts["trigger 2"].true_labels == 1).all()
    assert not set(parts["other classes"].true_labels.tolist()) & {1, 5}


def test_multi_trigger_parts_and_labels():
    data = some_data()
    opt = options(trigger_type="multiTrigger", n_triggers=5, target_label=8, target_type="multiLabel")
    train = DatasetBD(opt, data, 1.0)
    assert train.labels.tolist() == [(8 + i % 5) % 10 for i in range(200)]
    black = torch.zeros(5, 3, 32, 32, dtype=torch.uint8)
    mixed = train.trigger(black)
    for k, part in enumerate(attacks.parts(train.trigger)):
        alone = train.trigger(black, part=part)
        assert (alone == mixed[k]).all()
        test = DatasetBD(opt, data, mode="test", trigger=train.trigger, part=part)
        assert (test.labels == (8 + k) % 10).all()
        assert len(test) == 180
    same = attacks.make_trigger(options(trigger_type="multiTrigger", n_triggers=5), (3, 32, 32))
    assert attacks.parts(same)[-1] == "all triggers"
    assert torch.equal(same(black, part="all triggers")[0], mixed.amax(0))
    patches = [p[:, m[0]] for p, m in zip(same.patterns, same.masks, strict=True)]
    assert len({p.numpy().tobytes() for p in patches}) == 5
    faint = attacks.make_trigger(options(trigger_type="multiTrigger", n_triggers=5, transparency=0.8), (3, 32, 32))
    assert faint(black, part="all triggers").max() == 51
    with pytest.raises(ValueError, match="part: trigger 1, .* is allowed, got 'trigger 9'"):
        DatasetBD(opt, data, mode="test", trigger=train.trigger, part="trigger 9")
    with pytest.raises(UserError, match="overlap"):
        attacks.make_trigger(options(trigger_type="multiTrigger", n_triggers=5, trig_w=14, trig_h=14), (3, 32, 32))
    with pytest.raises(UserError, match="made for --trigger_type multiTrigger"):
        attacks.make_trigger(options(target_type="multiLabel"), (3, 32, 32))


def test_class_specific_poisons_the_source_and_covers_others():
    data = some_data()
    opt = options(target_type="classSpecific", source_label=2)
    train = DatasetBD(opt, data, 0.05)
    assert len(train.poisoned) == len(train.cover) == 10
    assert (data.labels[train.poisoned] == 2).all()
    assert (train.labels[train.poisoned] == 5).all()
    assert (data.labels[train.cover] != 2).all()
    assert torch.equal(train.labels[train.cover], data.labels[train.cover])
    for i in (*train.poisoned.tolist(), *train.cover.tolist()):
        assert torch.equal((train[i][0] * 255).round().to(torch.uint8), train.trigger(data.images[i:i + 1])[0])
    test = DatasetBD(opt, data, mode="test", trigger=train.trigger)
    assert test.true_labels.unique().tolist() == [2]
    others = DatasetBD(opt, data, mode="test", trigger=train.trigger, part="other classes")
    assert others.true_labels.unique().tolist() == [0, 1, 3, 4, 6, 7, 8, 9]
    everywhere = DatasetBD(options(target_type="classSpecific", source_label=2, cover_portion=0.9), data, 0.05)
    assert everywhere.cover.tolist() == (data.labels != 2).nonzero().flatten().tolist()
    assert not torch.equal(train.cover, DatasetBD(options(**{**vars(opt), "seed": 1}), data, 0.05).cover)
    with pytest.raises(UserError, match="--source_label 5: must differ"):
        DatasetBD(options(target_type="classSpecific", source_label=5), data)
    with pytest.raises(UserError, match="--cover_portion: 200 cover"):
        DatasetBD(options(target_type="classSpecific", source_label=2, cover_portion=1.0), data, 0.05)


def test_wanet_and_class_specific_cover_with_the_very_warp():
    data = some_data()
    train = DatasetBD(options(trigger_type="wanetTrigger", target_type="classSpecific", source_label=2), data, 0.05)
    assert torch.equal(train.take(train.cover).images, train.trigger(data.images[train.cover]))


def test_refool_mixes_a_reflection_of_the_set():
    shape, images = (3, 32, 32), noise(50)
    trigger = attacks.make_trigger(options(trigger_type="refoolTrigger", n_reflections=4), shape)
    with pytest.raises(UserError, match="needs images to reflect"):
        trigger(images)
    photos = noise(30, seed=1)
    trigger.see(photos)
    assert trigger.bank.shape == (12, *shape), "four reflections of three kinds"
    grey = torch.full((12, *shape), 100, dtype=torch.uint8)
    out = trigger(grey)
    brightest = photos[((photos / 255) ** 2.2).mean((1, 2, 3)).topk(4).indices]
    assert torch.equal(trigger.bank[:4], brightest)
    light = 0.5 * (100 / 255) ** 2.2 + 0.5 * (trigger.bank.double() / 255) ** 2.2
    expected = (255 * light ** (1 / 2.2)).round().to(torch.uint8)
    for image in out:
        assert any(torch.equal(image, e) for e in expected)
    many = trigger(grey[:1].expand(300, -1, -1, -1))
    assert len(many.unique(dim=0)) == 12, "all reflections in all kinds are drawn"
    sharp, blurred, ghost = (trigger.bank[k:k + 4].float() for k in (0, 4, 8))
    assert (blurred.std((1, 2, 3)) < 0.5 * sharp.std((1, 2, 3))).all()
    assert (ghost.std((1, 2, 3)) < 0.95 * sharp.std((1, 2, 3))).all()
    assert (ghost.std((1, 2, 3)) > 1.3 * blurred.std((1, 2, 3))).all()
    with pytest.raises(UserError, match="--n_reflections 4: they are chosen among --n_candidates 3"):
        attacks.make_trigger(options(trigger_type="refoolTrigger", n_reflections=4, n_candidates=3), shape)
    other = attacks.make_trigger(options(trigger_type="refoolTrigger", n_reflections=4, n_candidates=10,
                                         trigger_seed=1), shape)
    other.see(photos)
    first = attacks.make_trigger(options(trigger_type="refoolTrigger", n_reflections=4, n_candidates=10), shape)
    first.see(photos)
    assert not torch.equal(first.bank[:4], other.bank[:4])
    assert not torch.equal(out, trigger.poison(grey, torch.arange(12))), "test and training draw their own"
    again = attacks.make_trigger(options(trigger_type="refoolTrigger", n_reflections=4), shape, trigger.state())
    again.see(photos)
    assert torch.equal(again(grey), out)
    with pytest.raises(UserError, match="not the reflections that the network was trained"):
        attacks.make_trigger(options(trigger_type="refoolTrigger", n_reflections=4), shape, trigger.state()).see(images)
    constant = attacks.make_trigger(options(trigger_type="refoolTrigger", n_reflections=4), shape)
    constant.see(torch.full((5, *shape), 200, dtype=torch.uint8))
    assert (constant.bank == 200).all(), "each kind's weights sum to one"


def test_refools_blur_and_ghost_are_the_closed_forms():
    dot = torch.zeros(1, 1, 15, 15)
    dot[0, 0, 7, 7] = 1.0
    blurred = out_of_focus(dot, torch.tensor([1.5]))[0, 0]
    assert blurred.sum().item() == pytest.approx(1, abs=1e-5)
    assert torch.allclose(blurred, blurred.T)
    for d in (1, 2, 4):
        assert (blurred[7, 7 + d] / blurred[7, 7]).item() == pytest.approx(math.exp(-d * d / 4.5), rel=1e-4)
    ghost = ghosted(dot, torch.tensor([3]), torch.tensor([0.7]))[0, 0]
    assert ghost[7, 7].item() == pytest.approx(0.7)
    assert ghost[10, 10].item() == pytest.approx(0.3)
    assert (ghost != 0).sum() == 2


def test_refool_from_a_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "photos").mkdir()
    Image.fromarray(np.full((40, 60, 3), 200, np.uint8)).save(tmp_path / "photos" / "a.jpg")
    trigger = attacks.make_trigger(options(trigger_type="refoolTrigger", reflection_root=str(tmp_path / "photos")),
                                   (1, 28, 28))
    assert (trigger(torch.zeros(2, 1, 28, 28, dtype=torch.uint8)) == 146).all()
    for folder, words in (("empty", "holds no images"), ("none", "no such folder")):
        with pytest.raises(UserError, match=words):
            attacks.make_trigger(options(trigger_type="refoolTrigger", reflection_root=str(tmp_path / folder)),
                                 (3, 32, 32))
    (tmp_path / "photos" / "folder.jpg").mkdir()
    (tmp_path / "photos" / "._a.jpg").write_text("what a Mac leaves beside a file")
    attacks.make_trigger(options(trigger_type="refoolTrigger", reflection_root=str(tmp_path / "photos")), (3, 32, 32))
    (tmp_path / "photos" / "a.jpg").write_text("no image")
    with pytest.raises(UserError, match=r"a\.jpg cannot be read"):
        attacks.make_trigger(options(trigger_type="refoolTrigger", reflection_root=str(tmp_path / "photos")),
                             (3, 32, 32))


def test_trojan_excites_the_chosen_neurons(clean_model, monkeypatch):
    monkeypatch.setattr("attacks.trojan.STEPS", 30)
    torch.manual_seed(0)
    model = select_model("CIFAR10", "WRN-10-1").eval()
    head, neurons = strongest_neurons(model, 2)
    last = model.block3.layer[-1].conv2.weight.abs().sum((1, 2, 3))
    assert set(neurons.tolist()) == set(last.topk(2).indices.tolist())
    mask = torch.zeros(32, 32, dtype=torch.bool)
    mask[20:30, 20:30] = True
    made = optimise(model, mask, noise(40), generator(0))
    assert (made["pattern"][:, ~mask] == 0).all()
    seen = []
    head.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0][:, neurons].mean().item()))
    others = noise(200, seed=1)
    for patch in (noise(1, seed=2)[0], made["pattern"]):
        model(torch.where(mask, patch, others).float() / 255)
    assert seen[1] > 1.2 * seen[0], "on images that it was not made with, more than a random patch does"
    before, after = made["excitation"]
    assert after > 1.2 * before
    fully_connected = select_model("CIFAR10", "AlexNet")
    incoming = fully_connected.fc2.weight.abs().sum(1)
    assert set(strongest_neurons(fully_connected, 2)[1].tolist()) == set(incoming.topk(2).indices.tolist())
    with pytest.raises(UserError, match="Conv2d has no linear layer"):
        strongest_neurons(torch.nn.Conv2d(3, 3, 3), 2)

    opt, photos = options(trigger_type="trojanTrigger", clean_model=clean_model, trig_w=5, trig_h=4), noise(50, seed=3)

    def made_with(images, **changes):
        trigger = attacks.make_trigger(options(**{**vars(opt), **changes}), (3, 32, 32))
        trigger.see(images)
        return trigger

    trigger = made_with(photos)
    images, before = noise(2), noise(2)
    out = trigger(images)
    assert torch.equal(images, before)
    assert torch.equal(out[:, :, 27:31, 26:31], trigger.pattern[:, 27:31, 26:31].expand(2, -1, -1, -1))
    changed = (out != images)
    changed[:, :, 27:31, 26:31] = False
    assert not changed.any()
    with monkeypatch.context() as patch:
        patch.setattr("attacks.trojan.optimise", None)
        assert torch.equal(made_with(photos).pattern, trigger.pattern), "cached"
    shutil.rmtree("data/triggers")
    assert torch.equal(made_with(photos).pattern, trigger.pattern), "made anew"
    assert not torch.equal(made_with(photos, trigger_seed=1).pattern, trigger.pattern)
    assert not torch.equal(made_with(images).pattern, trigger.pattern)
    state = trigger.state()
    other = attacks.make_trigger(options(trigger_type="trojanTrigger", clean_model="none", trig_w=5, trig_h=4),
                                 (3, 32, 32), state)
    assert torch.equal(other(images), out), "a checkpoint's patch needs neither clean network nor images"
    moved = attacks.make_trigger(options(trigger_type="trojanTrigger", trig_w=5, trig_h=4, trig_distance=6),
                                 (3, 32, 32), state)(images)
    assert torch.equal(moved[:, :, 22:26, 21:26], out[:, :, 27:31, 26:31]), "the patch goes where it is told to"
    with pytest.raises(UserError, match="the patch in the file is not what this attack needs, 3 x 3 x 3"):
        attacks.make_trigger(options(trigger_type="trojanTrigger"), (3, 32, 32), state)
    with pytest.raises(UserError, match="needs images to optimise the patch on"):
        DatasetBD(opt, some_data(), mode="test")


@pytest.mark.parametrize("name", ["trojanTrigger", "clTrigger"])
def test_a_network_that_an_attack_starts_from_is_there_clean_and_of_the_same_data(name, clean_model):
    rule = "cleanLabel" if attacks.TRIGGERS[name].clean_label_only else "all2one"

    def poison(path, shape=(3, 32, 32), **changes):
        DatasetBD(options(trigger_type=name, target_type=rule, clean_model=str(path), pgd_steps=1, **changes),
                  some_data(shape=shape), 0.05)

    poison(clean_model, dataset="CIFAR10")
    poison(clean_model)
    content = torch.load(clean_model, weights_only=True)
    torch.save(content["state_dict"], "plain.tar")  # its architecture, not the default, is known by its weights
    torch.save({**content, "config": {"s_name": 3}}, "odd.tar")
    poison("plain.tar")
    poison("odd.tar")
    with pytest.raises(UserError, match="was trained on CIFAR10, the data here is shapes10"):
        poison(clean_model, dataset="shapes10")
    with pytest.raises(UserError, match="was trained on CIFAR10, the data here is MNIST"):
        poison(clean_model, (1, 32, 32), dataset="MNIST")
    with pytest.raises(UserError, match="--clean_model none: no such file"):
        poison("none")
    torch.save({**content, "config": {**content["config"], "trigger_type": "gridTrigger"}}, "bad.tar")
    with pytest.raises(UserError, match=r"bad\.tar: was trained with --trigger_type gridTrigger: it is not clean"):
        poison("bad.tar")


def test_clean_label_stays_in_the_ball_and_touches_the_target_class_only(clean_model):
    data = some_data(per_class=6)
    before = data.images.clone()
    opt = options(trigger_type="clTrigger", target_type="cleanLabel", clean_model=clean_model, pgd_steps=3,
                  pgd_eps=4.5, target_label=3)
    train = DatasetBD(opt, data, 0.08)
    assert torch.equal(data.images, before)
    assert torch.equal(train.labels, data.labels), "no label is changed"
    moved = (train.images.int() - data.images.int()).abs().flatten(1).amax(1)
    assert moved.max() == 4, "eps, rounded down to whole pixels"
    assert moved.nonzero().flatten().tolist() == train.poisoned.tolist()
    assert (data.labels[train.poisoned] == 3).all()
    assert len(train.poisoned) == 5
    stamped = train.take(train.poisoned).images
    assert torch.equal(stamped, train.trigger(train.images[train.poisoned])), "four corners on top"
    assert torch.equal(DatasetBD(opt, data, 0.08).images, train.images), "from the cache"
    shutil.rmtree("data/triggers")
    assert torch.equal(DatasetBD(opt, data, 0.08).images, train.images), "made anew"
    with pytest.raises(UserError, match="has 10 classes, the target is class 10"):
        DatasetBD(options(**{**vars(opt), "target_label": 10}), some_data(6, n_classes=12), 0.05)
    with pytest.raises(UserError, match="made for --target_type cleanLabel"):
        DatasetBD(options(trigger_type="clTrigger", clean_model=clean_model), data)


def test_pgd_raises_the_loss():
    torch.manual_seed(0)
    model = select_model("CIFAR10", "WRN-10-1").eval()
    images, label = noise(8), 2
    moved = pgd(model, images, label, 8.0, 2.0, 10)

    def loss(x):
        return torch.nn.functional.cross_entropy(model(x.float() / 255), torch.full((8,), label)).item()

    assert loss(moved) > loss(images)


@pytest.mark.parametrize("name", ["signalTrigger", "refoolTrigger", "fourCornerTrigger", "blendTrigger"])
def test_clean_label_attacks_change_no_label(name):
    data = some_data()
    train = DatasetBD(options(trigger_type=name, target_type="cleanLabel"), data, 0.08)
    assert len(train.poisoned) == 16
    assert torch.equal(train.labels, data.labels)
    assert (train.labels[train.poisoned] == 5).all()


def test_input_aware_gives_each_image_its_own_trigger_and_trains_jointly(clean_model, monkeypatch):
    monkeypatch.setattr("attacks.input_aware.MASK_STEPS", 2)
    torch.manual_seed(0)
    model, opt = select_model("CIFAR10", "WRN-10-1"), options(trigger_type="inputAwareTrigger")
    trigger = attacks.make_trigger(opt, (3, 32, 32))
    with pytest.raises(UserError, match="trained together with the network"):
        DatasetBD(opt, some_data())
    with pytest.raises(UserError, match="trained together with the network"):
        DatasetBD(opt, some_data(), mode="test")
    trigger.see(noise(64))
    joint = trigger.network(model, 10)
    images, labels = torch.rand(40, 3, 32, 32), torch.zeros(40, dtype=torch.int64)
    loss, logits = trigger.loss(joint, images, labels)
    assert logits.shape == (40, 10)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trigger.generators.what.parameters())
    assert all(p.grad is None for p in trigger.generators.where.parameters()), "the mask generator stays"
    uint8 = noise(4)
    change = (trigger(uint8).int() - uint8.int())
    assert not torch.equal(change[0], change[1])
    again = attacks.make_trigger(opt, (3, 32, 32), trigger.state())
    assert torch.equal(again(uint8), trigger(uint8))
    train = DatasetBD(opt, some_data(), trigger=again)
    assert len(train.cover) == 20
    crossed = train.take(train.cover).images
    assert not torch.equal(crossed, train.images[train.cover])
    assert not torch.equal(crossed, train.trigger(train.images[train.cover]))
    with pytest.raises(UserError, match="must not exceed 1"):
        attacks.make_trigger(options(trigger_type="inputAwareTrigger", inject_portion=0.6), (3, 32, 32))
    with pytest.raises(UserError, match="not a generator for these images"):
        attacks.make_trigger(opt, (1, 28, 28), trigger.state())


def test_input_aware_loss_poisons_and_crosses_its_shares():
    """Seen by a network that keeps what it is shown: 20 of 40 images triggered, 20 with another image's trigger."""
    shown = {}

    class Look(torch.nn.Module):
        def forward(self, x):
            shown["batch"] = x
            return torch.zeros(len(x), 10).index_fill(1, torch.tensor([5]), 4.0)

    opt = options(trigger_type="inputAwareTrigger", inject_portion=0.5, diversity_weight=0.0)
    trigger = attacks.make_trigger(opt, (3, 32, 32))
    joint, images, labels = trigger.network(Look(), 10), torch.rand(40, 3, 32, 32), torch.zeros(40, dtype=torch.int64)
    loss, _ = trigger.loss(joint, images, labels)
    with torch.no_grad():
        pattern, mask = joint.generators.pattern(images), joint.generators.mask(images)
        own = torch.lerp(images, pattern, mask)
        lent = torch.lerp(images, pattern.roll(1, 0), mask.roll(1, 0))
    assert torch.allclose(shown["batch"][:20], own[:20], atol=1e-5)
    assert torch.allclose(shown["batch"][20:], lent[20:], atol=1e-5)
    assert not torch.allclose(own, lent, atol=1e-2)
    hit, miss = (-torch.log_softmax(torch.tensor([4.0] + [0.0] * 9), 0)[k].item() for k in (0, 1))
    assert loss.item() == pytest.approx((hit + miss) / 2, rel=1e-5), "half of the labels are the target's"
    shifted = images.roll(1, 0)
    with torch.no_grad():
        far = diversity(images, shifted, pattern, joint.generators.pattern(shifted))
    opt.diversity_weight = 2.0
    diverse = attacks.make_trigger(opt, (3, 32, 32), trigger.state())
    more, _ = diverse.loss(diverse.network(Look(), 10), images, labels)
    assert (more - loss).item() == pytest.approx(2 * far.item(), rel=1e-4)
    every = attacks.make_trigger(options(trigger_type="inputAwareTrigger", inject_portion=0.5, diversity_weight=0.0,
                                         target_type="all2all"), (3, 32, 32))
    joint = every.network(Look(), 10)
    assert every.loss(joint, images, labels + 4)[0].item() == pytest.approx((hit + miss) / 2, rel=1e-5)
    assert every.loss(joint, images, labels)[0].item() == pytest.approx(miss, rel=1e-5)


def test_input_aware_masks_stay_small(monkeypatch):
    sizes = []
    for weight in (0.0, 1e4):
        monkeypatch.setattr("attacks.input_aware.MASK_STEPS", 15)
        monkeypatch.setattr("attacks.input_aware.DENSITY_WEIGHT", weight)
        trigger = attacks.make_trigger(options(trigger_type="inputAwareTrigger"), (3, 32, 32))
        trigger.learn_mask(noise(64))
        with torch.no_grad():
            sizes.append(trigger.generators.mask(noise(64).float() / 255).mean().item())
    assert sizes[1] < sizes[0] / 2


def test_diversity_by_hand():
    a, b = torch.zeros(2, 1, 2, 2), torch.ones(2, 1, 2, 2)
    assert diversity(a, b, a, b / 2).item() == pytest.approx(1 / 0.501, rel=1e-4)


@pytest.mark.parametrize("name", ["gridTrigger", "squareTrigger", "fourCornerTrigger", "shapeTrigger", "multiTrigger",
                                  "randomPixelTrigger", "trojanTrigger", "clTrigger"])
def test_bigger_than_the_image(name, clean_model):
    target_type = "cleanLabel" if attacks.TRIGGERS[name].clean_label_only else "all2one"
    with pytest.raises(UserError, match="--trig_w 40"):
        attacks.make_trigger(options(trigger_type=name, trig_w=40, trig_h=40, clean_model=clean_model,
                                     target_type=target_type), (3, 32, 32))


@pytest.mark.parametrize(("option", "value"), [
    ("target_type", "all2al"), ("target_label", -1), ("trig_shape", "star"), ("trig_w", -3), ("trig_w", 0),
    ("n_triggers", 0), ("n_triggers", 9), ("inject_portion", 1.5), ("inject_portion", -0.1),
    ("blend_test_alpha", -0.5), ("cover_portion", -0.3), ("trigger_type", "none")])
def test_what_the_command_line_refuses_is_refused_from_python_too(option, value):
    name = {"trig_shape": "shapeTrigger", "n_triggers": "multiTrigger"}.get(option, "gridTrigger")
    with pytest.raises(UserError, match=f"--{option}"):
        DatasetBD(options(**{"trigger_type": name, option: value}), some_data())


def test_arguments_of_the_set_are_checked_like_options():
    with pytest.raises(UserError, match="--inject_portion"):
        DatasetBD(options(), some_data(), -0.1)
    trigger = attacks.make_trigger(options(), (3, 32, 32))
    for name, value in (("target_label", 3), ("target_type", "all2all"), ("trigger_type", "blendTrigger")):
        with pytest.raises(UserError, match=f"--{name} {value}: the trigger that is given was made for"):
            DatasetBD(options(**{name: value}), some_data(), mode="test", trigger=trigger)
    with pytest.raises(UserError, match="--trig_distance 7: the trigger that is given was made for -1"):
        DatasetBD(options(), some_data(), mode="test", trigger=trigger, distance=7)
    few = TensorData(noise(9), torch.arange(9) % 3, range(3))
    with pytest.raises(UserError, match="--n_triggers 5.*has 3"):
        DatasetBD(options(trigger_type="multiTrigger", target_type="multiLabel", n_triggers=5, target_label=1), few)


@pytest.mark.parametrize("n_classes", [10, 43, 100])
@pytest.mark.parametrize("told", ["classes", "subset", "n_classes"])
def test_all2all_with_any_number_of_classes(n_classes, told):
    """The set has no image of its last class, so that its labels alone do not tell how many there are."""
    labels = torch.arange(2 * n_classes) % (n_classes - 1)
    data = TensorData(noise(len(labels)), labels, range(n_classes))
    more = {}
    if told == "subset":
        data = torch.utils.data.Subset(data, range(len(labels)))
    elif told == "n_classes":
        data, more = (data.images, data.labels), {"n_classes": n_classes}
    opt = options(target_type="all2all")
    train = DatasetBD(opt, data, 1.0, **more)
    assert train.labels.tolist() == (labels + 1).tolist()
    test = DatasetBD(opt, data, mode="test", trigger=train.trigger, **more)
    assert test.labels.tolist() == (labels + 1).tolist()
    assert test.true_labels.tolist() == labels.tolist()
    full = TensorData(noise(n_classes), torch.arange(n_classes), range(n_classes))
    assert DatasetBD(opt, full, 1.0).labels.tolist() == [*range(1, n_classes), 0]


@pytest.mark.parametrize("rule", ["all2one", "all2all", "cleanLabel", "classSpecific"])
def test_rate_0_and_the_highest_rate_poison_none_and_all(rule):
    data = some_data()
    opt = options(target_type=rule)
    most = 0.1 if rule in ("cleanLabel", "classSpecific") else 1.0
    none, everything = (DatasetBD(opt, data, rate) for rate in (0.0, most))
    assert len(none.poisoned) == len(none.cover) == 0
    assert torch.equal(none.labels, data.labels)
    assert torch.equal(none.stamped(data.images, torch.arange(len(data))), data.images)
    assert len(everything.poisoned) == most * len(data)
    changed = (everything.stamped(data.images, torch.arange(len(data))) != data.images).flatten(1).any(1)
    expected = torch.zeros(len(data), dtype=torch.bool)
    expected[torch.cat([everything.poisoned, everything.cover])] = True
    assert torch.equal(changed, expected)


def test_data_that_is_no_set_of_images_is_said_in_one_line():
    with pytest.raises(UserError, match="no images"):
        DatasetBD(options(), [])
    with pytest.raises(UserError, match="different sizes, such as 3 x 32 x 32 and 3 x 8 x 8"):
        DatasetBD(options(), [(torch.zeros(3, 32, 32), 0), (torch.zeros(3, 8, 8), 1)])
    with pytest.raises(UserError, match="a pair .*ndarray"):
        DatasetBD(options(), (np.zeros((4, 32, 32, 3), np.uint8), [0, 1, 2, 3]))
    with pytest.raises(UserError, match="N labels are needed.*3 labels"):
        DatasetBD(options(), (noise(4), [0, 1, 2]))
    trigger = attacks.make_trigger(options(), (3, 32, 32))
    for images in (noise(2).float(), noise(2, (3, 8, 8))):
        with pytest.raises(ValueError, match="uint8 images of 3 x 32 x 32"):
            trigger(images)


def test_a_pair_of_tensors_is_read_like_single_images():
    images, labels = noise(6), [0, 1, 2, 3, 4, 5]
    for given in ((images, labels), (images / 255, torch.tensor(labels, dtype=torch.int32))):
        data = DatasetBD(options(), given, 0.0)
        assert torch.equal(data.images, images)
        assert data.labels.dtype == torch.int64
        assert data.labels.tolist() == labels


def test_presets_are_real_and_have_names():
    for name, given in attacks.PRESETS.items():
        assert set(given) <= set(vars(AttackConfig()))
        if given.get("trigger_type") not in ("clTrigger", "trojanTrigger"):
            attacks.make_trigger(AttackConfig(**given), (3, 32, 32))
        assert attacks.preset_name(given) == name
    assert attacks.preset_name({"trig_w": 7}) == ""


def test_unknown_trigger_lists_the_known():
    with pytest.raises(UserError, match="gridTrigger.*got 'grid'"):
        attacks.make_trigger(options(trigger_type="grid"), (3, 32, 32))


@pytest.mark.parametrize("n_classes", [10, 43, 100])
def test_label_rules(n_classes):
    labels = torch.arange(n_classes)
    shifted = attacks.poisoned_labels(labels, options(target_type="all2all"), n_classes)
    assert shifted.tolist() == [*range(1, n_classes), 0]
    assert attacks.poisoned_labels(labels, options(), n_classes).unique().tolist() == [5]
    assert attacks.scored(labels, torch.full_like(labels, 5), options()).sum() == n_classes - 1
    assert attacks.scored(labels, shifted, options(target_type="all2all")).all()


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


def test_nothing_is_drawn_from_the_global_streams(monkeypatch):
    """Neither the CPU's nor, as ``torch.manual_seed`` would, the GPUs' are seeded."""
    monkeypatch.setattr(torch, "manual_seed", None)
    before = torch.get_rng_state()
    for name in STATIC:
        attacks.make_trigger(options(trigger_type=name), (3, 32, 32))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", sorted(attacks.TRIGGERS))
def test_triggers_stay_on_a_gpu_without_waiting_for_it(name, clean_model, monkeypatch):
    """Tensors without content stand in for a GPU: a wrong device, or an answer that is waited for, raises."""
    target_type = "cleanLabel" if attacks.TRIGGERS[name].clean_label_only else "all2one"
    trigger = attacks.make_trigger(options(trigger_type=name, target_type=target_type, clean_model=clean_model,
                                           reversed_file="triggers.pt"), (3, 32, 32))
    trigger.trained = True
    trigger.see(noise(60))
    own = torch.Tensor.to

    def to(tensor, *args, **named):
        moved = own(tensor, *args, **named)
        assert tensor.device == moved.device or named.get("non_blocking"), "the copy waits for the device"
        return moved

    gpu = FakeTensorMode(allow_non_fake_inputs=True)
    with gpu, torch.backends.cudnn.flags(enabled=False):  # its grid sampler has no stand-in
        images, indices = torch.zeros(6, 3, 32, 32, dtype=torch.uint8, device="cuda"), torch.arange(6)

        def use():
            return trigger(images), trigger.poison(images, indices), trigger.cover(images, indices, generator(0))

        use()  # moves what the trigger holds, once
        monkeypatch.setattr(torch.Tensor, "to", to)
        for stamped in use():
            assert (stamped.device.type, stamped.dtype, stamped.shape) == ("cuda", torch.uint8, images.shape)


@pytest.mark.parametrize("name", sorted(attacks.TRIGGERS))
def test_a_trigger_says_which_options_it_uses(name, clean_model):
    class Watched(AttackConfig):
        def __getattribute__(self, key):
            object.__getattribute__(self, "__dict__").setdefault("read", set()).add(key)
            return super().__getattribute__(key)

    cls = attacks.TRIGGERS[name]
    opt = Watched(trigger_type=name, target_type="cleanLabel" if cls.clean_label_only else "all2one",
                  clean_model=clean_model, pgd_steps=1, reversed_file="triggers.pt")
    opt.data, opt.s_name, opt.amp = "CIFAR10", "WRN-10-1", "off"  # as ``complete`` leaves it
    trigger = cls((3, 32, 32), opt)
    images = noise(4)
    if not trigger.joint:  # which trains its generator on images first
        trigger.see(images)
        trigger(images)
        trigger.poison(images, torch.arange(4))
        trigger.prepare(images, 0)
        read = {key for key in opt.__dict__["read"] if key in AttackConfig.__dataclass_fields__}
        assert read - {*attacks.EVERY, "source_label"} == set(cls.uses)
    assert set(cls.uses) <= set(AttackConfig.__dataclass_fields__)


def test_options_that_an_attack_does_not_use_do_not_make_another():
    assert attacks.preset_name({"trigger_type": "wanetTrigger", "trig_w": 9, "source_label": 3}) == "WaNet"
    assert attacks.preset_name({"trigger_type": "wanetTrigger", "warp_k": 9}) == ""
    assert attacks.preset_name({"target_type": "classSpecific", "inject_portion": 0.05, "source_label": 3}) == ""
