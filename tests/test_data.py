"""Data sets, poisoning, the clean subset, augmentation, folders and their faults."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import data_loader
import shapes10
from config import EraseConfig, TrainConfig, UserError
from data_loader import DatasetBD, DatasetCL, apportioned, cached, load_data, resized
from utils.data import Augment, Batches, TensorData, as_tensor_data, make_augment
from utils.run import start_of


def toy(n=200, classes=10, shape=(3, 32, 32)):
    images = torch.randint(1, 255, (n, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return TensorData(images, torch.arange(n) % classes, range(classes))


def test_poisoned_training_set():
    data = toy()
    before = data.images.clone()
    bd = DatasetBD(TrainConfig(), data, mode="train")
    assert len(bd) == 200
    assert len(bd.poisoned) == 20
    assert (bd.labels[bd.poisoned] == 5).all()
    kept = torch.ones(200, dtype=torch.bool)
    kept[bd.poisoned] = False
    assert torch.equal(bd.labels[kept], data.labels[kept])
    stamped = bd.stamped(data.images, torch.arange(200))
    assert torch.equal(stamped[kept], data.images[kept])
    assert (stamped[bd.poisoned][:, :, 31, 31] == 255).all()
    assert torch.equal(data.images, before)
    assert torch.equal(DatasetBD(TrainConfig(), data).poisoned, bd.poisoned)
    assert not torch.equal(DatasetBD(TrainConfig(seed=2), data).poisoned, bd.poisoned)


def test_test_set_of_the_attack_has_no_image_of_the_target_class():
    data = toy()
    bd = DatasetBD(TrainConfig(), data, mode="test")
    assert len(bd) == 180
    assert (bd.true_labels != 5).all()
    assert (bd.labels == 5).all()
    assert (bd.images[:, :, 31, 31] == 255).all()
    everyone = DatasetBD(TrainConfig(target_type="all2all"), data, mode="test")
    assert len(everyone) == 200
    assert torch.equal(everyone.labels, (data.labels + 1) % 10)
    assert len(DatasetBD(TrainConfig(), data, inject_portion=1, mode="test")) == 180


def test_a_test_set_without_triggers_is_the_clean_one_as_in_the_demo():
    data = toy()
    clean = DatasetBD(TrainConfig(), data, inject_portion=0, mode="test")
    assert torch.equal(clean.images, data.images)
    assert torch.equal(clean.labels, data.labels)
    assert torch.equal(clean[5][0], data[5][0])
    assert len(clean.poisoned) == 0
    with pytest.raises(UserError, match="inject_portion 0.5: of a test set all images carry the trigger"):
        DatasetBD(TrainConfig(), data, inject_portion=0.5, mode="test")
    assert len(DatasetBD(TrainConfig(inject_portion=0.0), data, mode="test")) == 180, "the rate of training is another"


def test_clean_label_keeps_labels():
    data = toy()
    bd = DatasetBD(TrainConfig(target_type="cleanLabel"), data, 0.08)
    assert torch.equal(bd.labels, data.labels)
    assert (data.labels[bd.poisoned] == 5).all()
    assert len(bd.poisoned) == 16


def test_target_outside_the_classes():
    with pytest.raises(UserError, match="--target_label 10: the data set has the classes 0 to 9"):
        DatasetBD(TrainConfig(target_label=10), toy())


def test_as_in_the_demo_a_list_of_pil_images_and_a_transform():
    pairs = [(Image.fromarray(np.full((32, 32, 3), i, np.uint8)), i % 10) for i in range(50)]
    seen = []
    bd = DatasetBD(TrainConfig(), pairs, 0.2, transform=lambda image: seen.append(image.size) or image, mode="train",
                   distance=2)
    image, label = bd[int(bd.poisoned[0])]
    assert seen == [(32, 32)]
    assert label == 5
    assert image.getpixel((29, 29)) == (255, 255, 255)
    assert image.getpixel((31, 31)) == (int(bd.poisoned[0]),) * 3


def test_every_set_works_with_a_dataloader():
    data = toy(40)
    for part in (data, DatasetCL(EraseConfig(ratio=0.5), data), DatasetBD(TrainConfig(), data),
                 DatasetBD(TrainConfig(), data, mode="test")):
        images, labels = next(iter(DataLoader(part, 8)))
        assert images.shape == (8, 3, 32, 32)
        assert images.dtype == torch.float32
        assert images.max() <= 1
        assert labels.dtype == torch.int64
        assert len(list(part)) == len(part)


def test_a_moved_or_cut_poisoned_set_keeps_its_trigger():
    bd = DatasetBD(TrainConfig(), toy())
    assert (bd.take(bd.poisoned).images[:, :, 31, 31] == 255).all()
    moved = bd.to("cpu")
    assert (moved.stamped(moved.images, torch.arange(200))[bd.poisoned][:, :, 31, 31] == 255).all()
    with pytest.raises(IndexError):
        bd[200]


def test_a_test_set_of_the_target_class_only():
    data = toy()
    with pytest.raises(UserError, match="no image that counts"):
        DatasetBD(TrainConfig(), data.take((data.labels == 5).nonzero().flatten()), mode="test")


def test_clean_subset_is_stratified_fixed_by_the_seed_and_shared():
    data = toy(2000)
    subset = DatasetCL(EraseConfig(), data)
    assert torch.bincount(subset.labels).tolist() == [10] * 10
    assert torch.equal(subset.images, data.images[subset.indices])
    assert torch.equal(DatasetCL(EraseConfig(), data).indices, subset.indices)
    assert not torch.equal(DatasetCL(EraseConfig(seed=9), data).indices, subset.indices)


def test_clean_subset_without_a_class():
    with pytest.raises(UserError, match="--ratio 0.001 of 200 training images leaves no sample of 10 of 10"):
        DatasetCL(EraseConfig(ratio=0.001), toy())


def test_batches_depend_on_seed_name_and_epoch_only():
    data = toy()
    first = list(Batches(data, 64, Augment(cutout=9), seed=1).epoch(3))
    again = list(Batches(data, 64, Augment(cutout=9), seed=1).epoch(3))
    other = list(Batches(data, 64, Augment(cutout=9), seed=1).epoch(4))
    assert len(first) == 3
    assert all(images.shape == (64, 3, 32, 32) for images, _ in first)
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0][0], other[0][0])
    assert len(Batches(toy(10), 64)) == 1


@pytest.mark.parametrize(("options", "expected"), [
    ({"dataset": "CIFAR10"}, (4, True, 0, 0)), ({"dataset": "MNIST"}, (4, False, 0, 0)),
    ({"dataset": "GTSRB"}, (4, False, 0, 0)), ({"cutout": 9}, (4, True, 9, 0)),
    ({"augment": False, "cutout": 5}, (0, False, 5, 0)), ({"augment": False, "pairing": 0.5}, (0, False, 0, 0.5)),
    ({"augment": False}, None)])
def test_the_augmentation_that_a_configuration_asks_for(options, expected):
    made = make_augment(TrainConfig(**options))
    assert (made and (made.pad, made.flip, made.cutout, made.pairing)) == expected


def test_crop_and_flip_against_a_plain_loop():
    images = toy(6).images
    augment = Augment()
    draw = augment.draw(6, (3, 32, 32), torch.Generator().manual_seed(3))
    out = augment.move(images, draw["dy"], draw["dx"], draw["flip"])
    padded = torch.zeros(6, 3, 40, 40, dtype=torch.uint8)
    padded[:, :, 4:36, 4:36] = images
    for i in range(6):
        y, x = draw["dy"][i], draw["dx"][i]
        crop = padded[i, :, y:y + 32, x:x + 32]
        assert torch.equal(out[i], crop.flip(2) if draw["flip"][i] else crop)
    assert draw["flip"].any()
    assert not Augment(flip=False).draw(100, (3, 32, 32), torch.Generator())["flip"].any()


def test_pairing_mixes_in_the_image_before_and_keeps_the_label():
    data = toy(64)
    out = Augment(pairing=0.5).pair(data.images[:3], torch.tensor([0, 0.25, 0.5]))
    assert torch.equal(out[0], data.images[0])
    for i, w in ((1, 0.25), (2, 0.5)):
        mixed = (1 - w) * data.images[i].double() + w * data.images[i - 1].double()
        assert (out[i] - mixed).abs().max() <= 0.5
    (alone, labels), = Batches(data, 64, Augment(cutout=9), seed=1).epoch(3)
    (paired, kept), = Batches(data, 64, Augment(cutout=9, pairing=0.4), seed=1).epoch(3)
    assert torch.equal(labels, kept)
    hole = (alone == 0) & (paired == 0)
    seen = alone.roll(1, 0)
    weight = ((paired - alone) / (seen - alone))[(~hole) & (seen > 0) & (alone > 0) & ((seen - alone).abs() > 0.5)]
    assert weight.min() > -0.01 and 0.3 < weight.max() < 0.41  # drawn anew for each image


def test_cutout_cuts_a_hole_of_its_side():
    images = torch.full((2, 3, 32, 32), 9, dtype=torch.uint8)
    out = Augment(cutout=9).cut(images, torch.tensor([16, 0]), torch.tensor([16, 31]))
    assert (out[0] == 0).sum() == 3 * 81
    assert (out[0, :, 12:21, 12:21] == 0).all()
    assert (out[1] == 0).sum() == 3 * 25  # centred in a corner: 5 x 5 lie inside


@pytest.mark.parametrize("stamp", ["after", "before"])
def test_trigger_and_augmentation(stamp):
    data = TensorData(torch.full((100, 3, 32, 32), 100, dtype=torch.uint8), torch.arange(100) % 10, range(10))
    bd = DatasetBD(TrainConfig(), data, 1.0)
    images, _ = next(Batches(bd, 100, Augment(), stamp=stamp).epoch(0))
    in_place = (images[:, 0, 31, 31] == 1) & (images[:, 0, 31, 30] == 0) & (images[:, 0, 31, 29] == 1)
    assert in_place.all() if stamp == "after" else in_place.float().mean() < 0.2


def test_shapes10():
    images, labels = shapes10.generate(1000, seed=4)
    assert images.shape == (1000, 3, 32, 32)
    assert images.dtype == np.uint8
    assert np.bincount(labels).tolist() == [100] * 10
    again, _ = shapes10.generate(1000, seed=4)
    assert np.array_equal(images, again)
    assert not np.array_equal(images, shapes10.generate(1000, seed=5)[0])
    assert images.reshape(1000, -1).std(1).min() > 5


def write_folder(root, classes=("cat", "dog"), n=4, size=20):
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for i in range(n):
                picture = Image.fromarray(rng.integers(0, 255, (size, size + 5, 3), np.uint8))
                picture.save(root / part / name / f"{i}.png")
    return TrainConfig(dataset="folder", data_root=str(root), image_size=24)


def test_folder_is_resized_and_its_cache_follows_the_files(tmp_path):
    config = write_folder(tmp_path)
    data = load_data(config, True)
    assert data.shape == (3, 24, 24)
    assert data.classes == ["cat", "dog"]
    assert data.labels.tolist() == [0] * 4 + [1] * 4
    assert (tmp_path / "cache-train-24.npz").exists()
    assert torch.equal(load_data(config, True).images, data.images)
    (tmp_path / "train" / "dog" / "3.png").unlink()
    assert len(load_data(config, True)) == 7


def test_image_files_in_grey(tmp_path):
    config = write_folder(tmp_path)
    colour = load_data(config, True).images.float()
    config.grey = True
    grey = load_data(config, True)
    assert grey.shape == (1, 24, 24) and torch.equal(load_data(config, True).images, grey.images)
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]  # ITU-R 601
    assert (grey.images.float() - (weights * colour).sum(1, keepdim=True)).abs().max() < 2  # the resizing rounds too
    config.grey = False
    assert torch.equal(load_data(config, True).images.float(), colour)
    with pytest.raises(UserError, match="--grey: is for folders of image files, not for shapes10"):
        load_data(TrainConfig(dataset="shapes10", grey=True), True)


def test_images_in_subfolders_of_a_class_and_with_16_bits(tmp_path):
    config = write_folder(tmp_path)
    (tmp_path / "train" / "cat" / "more" / "still").mkdir(parents=True)
    (tmp_path / "train" / "cat" / "3.png").rename(tmp_path / "train" / "cat" / "more" / "still" / "3.png")
    assert load_data(config, True).labels.tolist() == [0] * 4 + [1] * 4
    ramp = np.linspace(0, 65535, 24 * 24).reshape(24, 24).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "train" / "cat" / "a.png")
    image = load_data(config, True).images[3].float()  # after 0 to 2
    assert image.mean() == pytest.approx(127.5, abs=0.5)
    assert torch.equal(image[0], torch.from_numpy((ramp / 257).round()).float())
    Image.fromarray(np.zeros((24, 24), np.float32)).save(tmp_path / "train" / "cat" / "b.tif")
    with pytest.raises(UserError, match=r"b\.tif cannot be read: its pixels are floating-point"):
        load_data(config, True)


def test_a_data_set_that_never_ends_by_itself():
    class Endless:
        classes = "ab"

        def __len__(self):
            return 6

        def __getitem__(self, i):
            assert i < 6, "beyond its length"
            return torch.full((3, 8, 8), i / 10), i % 2

    data = as_tensor_data(Endless())
    assert data.labels.tolist() == [0, 1] * 3
    assert data.images[5].unique().tolist() == [128]


@pytest.mark.parametrize("ratio", [-1, 0, 1.5, float("nan")])
def test_a_clean_subset_is_a_share(ratio):
    data = TensorData(torch.zeros(20, 3, 4, 4, dtype=torch.uint8), torch.arange(20) % 2, "ab")
    with pytest.raises(UserError, match="--ratio: a share above 0 and up to 1"):
        DatasetCL(SimpleNamespace(ratio=ratio), data)


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty"])
def test_damaged_cache_is_made_anew(tmp_path, damage):
    config = write_folder(tmp_path)
    images = load_data(config, True).images
    cache = tmp_path / "cache-train-24.npz"
    content = cache.read_bytes()
    cache.write_bytes({"cut": content[:len(content) // 2], "garbage": b"x" * 100, "empty": b""}[damage])
    assert torch.equal(load_data(config, True).images, images)
    assert cache.read_bytes()[:2] == b"PK"


def test_a_cache_that_cannot_be_written_is_no_obstacle(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("data_loader.write_atomically", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    images, _ = cached(tmp_path / "c.npz", "x", lambda: (np.zeros(3), np.ones(3)))
    assert len(images) == 3
    assert "no cache" in capsys.readouterr().out


def test_faults_of_a_folder(tmp_path):
    with pytest.raises(UserError, match="no folder"):
        load_data(TrainConfig(dataset="folder", data_root=str(tmp_path)), True)
    config = write_folder(tmp_path)
    bad = tmp_path / "train" / "cat" / "2.png"
    bad.write_bytes(bad.read_bytes()[:60])
    with pytest.raises(UserError, match=r"cat/2\.png cannot be read"):
        load_data(config, True)
    for image in (tmp_path / "test" / "dog").iterdir():
        image.unlink()
    with pytest.raises(UserError, match="has no images, but class 'dog'"):
        load_data(config, False)


def test_more_faults_of_a_folder(tmp_path):
    config = write_folder(tmp_path)
    (tmp_path / "test" / "bird").mkdir()
    with pytest.raises(UserError, match="'bird' is in test but not in train"):
        load_data(config, False)
    (tmp_path / "test" / "bird").rmdir()
    (tmp_path / "train" / "cat" / "._0.png").write_bytes(b"left by a Mac")
    assert len(load_data(config, True)) == 8
    (tmp_path / "train" / "cat" / "9.png").symlink_to("nowhere.png")
    with pytest.raises(UserError, match=r"cat/9\.png cannot be read: No such file"):
        load_data(config, True)


def test_part_of_a_set_keeps_the_classes_alike(tmp_path):
    config = write_folder(tmp_path, n=10)
    for size, counts in ((6, [3, 3]), (7, [4, 3])):
        config.train_size = size
        assert torch.bincount(load_data(config, True).labels).tolist() == counts
    config.train_size = 1
    with pytest.raises(UserError, match="--train_size 1 leaves a class of 2 without an image"):
        load_data(config, True)
    with pytest.raises(UserError, match="--train_size 5 leaves a class of 10 without an image"):
        load_data(TrainConfig(dataset="shapes10", train_size=5, data_root=str(tmp_path)), True)


def test_shares_add_up():
    assert apportioned(torch.tensor([50, 30, 20]), 10).tolist() == [5, 3, 2]
    assert apportioned(torch.tensor([3, 3, 3]), 5).tolist() == [2, 2, 1]
    assert apportioned(torch.tensor([10, 70, 20]), 9).tolist() == [1, 6, 2]
    assert apportioned(torch.tensor([7, 1]), 8).tolist() == [7, 1]


def test_a_data_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--data_root .*file: cannot be made: File exists"):
        load_data(TrainConfig(data_root=str(tmp_path / "file")), True)


def test_data_without_images_or_with_odd_labels():
    for images, labels, words in ((torch.zeros(0, 3, 8, 8), [], "no images"), (torch.zeros(2, 3, 8, 8), [0, -1], "-1")):
        with pytest.raises(UserError, match=words):
            as_tensor_data((images, labels))


@pytest.mark.parametrize(("image", "words"), [
    (torch.full((3, 4, 4), 200.0), "go from 200 to 200"), (torch.full((3, 4, 4), -0.5), "leave out Normalize"),
    (torch.full((3, 4, 4), 200), "are torch.int64: uint8 is needed"),
    (torch.full((3, 4, 4), float("nan")), "must lie in")])
def test_numbers_that_are_no_pixels_are_refused(image, words):
    for data in ([(image, 0)], (image[None], [0])):
        with pytest.raises(UserError, match=words):
            as_tensor_data(data)


def test_resizing_a_large_set_is_resizing_each_image():
    images = torch.randint(0, 256, (2003, 1, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    small = resized(TensorData(images, torch.zeros(2003), "a"), 4).images
    assert small.shape == (2003, 1, 4, 4)
    for i in (0, 1000, 2002):
        assert torch.equal(small[i:i + 1], resized(TensorData(images[i:i + 1], torch.zeros(1), "a"), 4).images)


def test_more_images_than_there_are(tmp_path, capsys):
    config = replace(write_folder(tmp_path), train_size=9)
    assert len(load_data(config, True)) == 8
    assert "note: --train_size 9: folder has 8 such images" in capsys.readouterr().out


def test_other_images_are_another_run(tmp_path):
    config = write_folder(tmp_path)
    load_data(config, True)  # whose cache is no image
    before = start_of(config)
    assert start_of(config) == before
    shutil.copy(tmp_path / "train/dog/0.png", tmp_path / "train/dog/more.png")
    assert start_of(config) != before
    assert "data_root" not in start_of(TrainConfig())
    photos = TrainConfig(trigger_type="refoolTrigger", reflection_root=str(tmp_path / "train/dog"))
    before = start_of(photos)
    (tmp_path / "train/dog/more.png").unlink()
    assert start_of(photos) != before


def test_a_download_that_fails_says_what_to_do(tmp_path, monkeypatch):
    from torchvision import datasets

    def refuse(*_args, **_kwargs):
        raise RuntimeError("no route to host")

    monkeypatch.setattr(datasets, "CIFAR10", refuse)
    with pytest.raises(UserError, match="download failed.*by hand.*--dataset shapes10"):
        load_data(TrainConfig(data_root=str(tmp_path)), True)


@pytest.mark.parametrize(("name", "shape"), [("CIFAR10", (32, 32, 3)), ("MNIST", (28, 28))])
def test_torchvision_sets_become_tensors(tmp_path, monkeypatch, name, shape):
    from torchvision import datasets

    class Fake:
        data = torch.randint(0, 255, (20, *shape), dtype=torch.uint8)  # an array, as torchvision holds it
        targets = torch.arange(20) % 10

    monkeypatch.setattr(datasets, name, lambda *_args, **_kwargs: Fake())
    with pytest.raises(UserError, match="holds 20 of .*unfinished download"):
        load_data(TrainConfig(dataset=name, data_root=str(tmp_path)), True)
    monkeypatch.setitem(data_loader.IMAGES, name, (20, 20))
    data = load_data(TrainConfig(dataset=name, data_root=str(tmp_path)), True)
    assert data.shape == ((3, 32, 32) if name == "CIFAR10" else (1, 32, 32))
    assert data.labels.tolist() == Fake.targets.tolist()
    if name == "CIFAR10":
        assert torch.equal(data.images[3].permute(1, 2, 0), Fake.data[3])


@pytest.mark.cifar
def test_cifar10_as_an_image_folder():
    from conftest import ROOT

    root = ROOT / "data" / "CIFAR10"
    if not (root / "train").is_dir():
        pytest.skip("data/CIFAR10/train is not there")
    data = load_data(TrainConfig(data_root=str(root)), False)
    assert data.images.shape == (10_000, 3, 32, 32)
    assert torch.bincount(data.labels).tolist() == [1000] * 10


def test_the_recipe_searchs_parts_share_no_image():
    import search

    labels = torch.arange(100) % 10
    images = torch.arange(100, dtype=torch.uint8).view(100, 1, 1, 1).expand(100, 3, 4, 4).contiguous()
    rest, held = search.parts(TensorData(images, labels, range(10)), 3)
    assert held.labels.bincount().tolist() == [3] * 10
    assert sorted(torch.cat([held.images, rest.images])[:, 0, 0, 0].tolist()) == list(range(100))


def test_batches_of_the_recipe_searchs_surrogate():
    import search

    data = TensorData(torch.zeros(200, 3, 32, 32, dtype=torch.uint8), torch.arange(200) % 10, range(10))
    poisoned = search.SurrogateSet(data, search.STRONG)
    counts = torch.bincount(poisoned.kind + 1).tolist()
    assert counts == [200 - 48 - 12, 16, 16, 16, 12], "80% of what is left of class 2"
    changed = poisoned.labels != data.labels
    assert set(poisoned.labels[changed].tolist()) == {1, 4, 7}, "the clean-label one changes no label"
    images = torch.cat([images for images, _ in Batches(poisoned, 50).epoch(0)])
    assert images.flatten(1).any(1).sum() == 60, "triggers on black images"


def test_each_surrogate_trigger_changes_images_alike_on_every_call():
    import search

    images = toy(8).images
    before = images.clone()
    for backdoor in search.NETWORKS["haze"][0]:
        out = backdoor.trigger(images)
        assert out.dtype == torch.uint8 and torch.equal(images, before)
        assert not torch.equal(out, images) and torch.equal(out, backdoor.trigger(images))
        assert torch.equal(out[3:4], backdoor.trigger(images[3:4])), "one image, one trigger"
    laid = (search.haze(images).float() - 0.65 * images.float()) / 0.35
    assert laid.min() > -2 and laid.max() < 257 and laid[0].std() > 20, "pictures"
