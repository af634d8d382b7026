"""Training, evaluation and schedules; NAD as a defense."""

import copy
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models

import defenses
from config import EraseConfig, TrainConfig, UserError
from data_loader import DatasetBD
from defenses.nad import NADLoss
from models import build
from utils import devices
from utils.data import Augment, Batches, TensorData, to_float
from utils.devices import choose_device, hardware
from utils.engine import Progress, cross_entropy, evaluate, fit, has_tiny_maps, settle_batchnorm
from utils.optim import make_optimizer, orthogonalized, rate

RECIPE = {"lr_schedule": "constant", "momentum": 0.9, "weight_decay": 1e-4, "seed": 1, "stage": "test"}


def toy(n=64, classes=10):
    images = torch.randint(0, 256, (n, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return TensorData(images, torch.arange(n) % classes, range(classes))


@pytest.mark.parametrize(("schedule", "t", "factor"), [
    ("linear", 0, 0), ("linear", 1, 0.5), ("linear", 2, 1), ("linear", 6, 0.5), ("linear", 10, 0),
    ("cosine", 0, 1), ("cosine", 5, 0.5), ("cosine", 10, 0), ("demo", 1.99, 1), ("demo", 2, 0.1), ("demo", 9.9, 0.1),
    ("tenths", 1.9, 1), ("tenths", 2, 0.1), ("tenths", 5.5, 0.01), ("step", 4.9, 1), ("step", 5, 0.1),
    ("step", 7.5, 0.01), ("constant", 9, 1)])
def test_schedules_of_ten_epochs(schedule, t, factor):
    assert rate(schedule, t, 10) == pytest.approx(factor)


class Reader(nn.Module):
    """Reads the class from the brightness of the first pixel, unless the last one is white: then it says 5."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        said = (x[:, 0, 0, 0] * 255).round().long()
        said = torch.where((x[:, 0, -1, -1] == 1) & (said != 3), torch.tensor(5), said)
        return nn.functional.one_hot(said, 10).float() + 0 * self.weight


def test_metrics_by_hand():
    labels = torch.arange(100) % 10
    images = torch.zeros(100, 3, 16, 16, dtype=torch.uint8)
    images[:, :, 0, 0] = labels[:, None].to(torch.uint8)
    images[5, :, 0, 0] = 1  # one of ten images of the target class is misread
    test = TensorData(images, labels, range(10))
    metrics = evaluate(Reader(), test, DatasetBD(TrainConfig(), test, mode="test"), 5)
    # with the trigger, the 80 images of classes other than 3 and 5 are called 5, the 10 of class 3 stay 3
    assert metrics == {"clean_acc": 99.0, "clean_acc_non_target": 100.0, "asr": 88.89, "ra": 11.11}
    assert evaluate(Reader(), test) == {"clean_acc": 99.0, "clean_acc_non_target": None, "asr": None, "ra": None}


def test_one_sgd_step_by_hand():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 256, 10))
    data = toy(8)
    start = {k: v.clone() for k, v in model.state_dict().items()}  # channels-last inputs flatten as (C, H, W) too
    x, y = data.images.float() / 255, data.labels
    nn.functional.cross_entropy(model(x), y).backward()
    gradient = model[1].weight.grad + 1e-4 * start["1.weight"]
    fit(model, cross_entropy, Batches(data, 8), epochs=1, lr=0.1, **RECIPE)
    expected = start["1.weight"] - 0.1 * 1.9 * gradient  # the first Nesterov step is (1 + momentum) lr g
    assert torch.allclose(model[1].weight, expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 16, 27), (2, 40, 9)])
def test_orthogonalized_keeps_the_singular_vectors_and_evens_the_values(shape):
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x = orthogonalized(g)
    values = torch.linalg.svdvals(x)
    assert values.min() > 0.6
    assert values.max() < 1.3
    u, _, v = torch.linalg.svd(g, full_matrices=False)
    inner = u.mT @ x @ v.mT  # diagonal if the vectors are the same
    assert (inner - torch.diag_embed(inner.diagonal(dim1=1, dim2=2))).abs().max() < 1e-4


def test_a_step_of_muon_turns_a_convolution_and_keeps_its_norm():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, 3)
    start = conv.weight.detach().clone()
    optimizer = make_optimizer(conv, 0.1, 0.9, 0.0, turn=0.02)
    conv.weight.grad, conv.bias.grad = torch.randn_like(conv.weight), torch.randn_like(conv.bias)
    bias = conv.bias - 0.1 * 1.9 * conv.bias.grad
    optimizer.step()
    assert conv.weight.norm().item() == pytest.approx(start.norm().item(), rel=1e-5)
    assert ((conv.weight - start).norm() / start.norm()).item() == pytest.approx(0.02, rel=0.05)
    assert torch.allclose(conv.bias, bias, rtol=1e-4)


class Memory(Progress):
    def __init__(self, stored=None):
        self.stored, self.saved, self.done = stored, [], []

    def load(self, stage):
        return self.stored

    def save(self, stage, state):
        self.saved.append(copy.deepcopy(state))

    def stage_done(self, stage, model):
        self.done.append(stage)


def test_a_stage_goes_on_bit_for_bit_and_repeats_bit_for_bit():
    def run(stored=None, epochs=3):
        torch.manual_seed(0)
        model, memory = build("WRN-10-1", 10), Memory(stored)
        fit(model, cross_entropy, Batches(toy(), 16, seed=1), epochs=epochs, lr=0.1, progress=memory, **RECIPE)
        return model.state_dict(), memory

    whole, memory = run()
    again, _ = run()
    resumed, tail = run(memory.saved[0])
    assert len(tail.saved) == 2
    assert memory.done == tail.done == ["test"]
    assert [r["epoch"] for r in tail.saved[-1]["history"]] == [1, 2, 3]
    for key in whole:
        assert torch.equal(whole[key], again[key])
        assert torch.equal(whole[key], resumed[key])


def test_a_loss_that_is_not_finite_stops_and_keeps_what_was_saved():
    memory = Memory()
    with pytest.raises(UserError, match=r"loss is not finite in epoch \d.*smaller --lr than "):
        fit(build("WRN-10-1", 10), cross_entropy, Batches(toy(), 16), epochs=3, lr=1e12, progress=memory, **RECIPE)
    assert all(torch.isfinite(v).all() for s in memory.saved for v in s["state_dict"].values())


def test_bf16_is_left_where_a_convolution_sees_one_pixel():
    class Notes(Memory):
        said = ""

        def note(self, text):
            self.said += text

    def run(size):
        torch.manual_seed(0)
        model, notes = models.resnet18(num_classes=10), Notes()
        data = TensorData(toy().images[:32, :, :size, :size].contiguous(), toy().labels[:32], range(10))
        fit(model, cross_entropy, Batches(data, 16), epochs=1, lr=0.01, amp=True, progress=notes, **RECIPE)
        return model.state_dict(), notes.said

    first, said = run(16)
    assert "trained in float32" in said
    assert all(torch.equal(v, first[k]) for k, v in run(16)[0].items())
    assert all(v.dtype != torch.bfloat16 for v in first.values())
    assert not has_tiny_maps(models.resnet18(), torch.zeros(2, 3, 64, 64))


def test_nad_works_on_a_torchvision_model_and_named_layers():
    model = build("torchvision:resnet18", 10, image_size=32)
    config = EraseConfig(epochs=1, teacher_epochs=1, batch_size=16, s_name="torchvision:resnet18", amp="off",
                         layers=["layer1", "layer2"])
    assert defenses.get("nad").erase(model, toy(32), config) is not model


def test_nad_leaves_its_teacher_alone_and_runs_each_network_once_a_step():
    torch.manual_seed(0)
    student, teacher = build("WRN-10-1", 10), build("WRN-10-1", 10)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    loss = NADLoss(teacher, student.feature_layers, [1.0, 1.0, 1.0])
    student.train()
    value, logits = loss(student, torch.rand(8, 3, 16, 16), torch.arange(8))
    value.backward()
    assert logits.shape == (8, 10)
    assert student.bn1.num_batches_tracked == 1
    assert all(torch.equal(before[k], v) for k, v in loss.teacher.state_dict().items())
    assert all(p.grad is None for p in [*teacher.parameters(), *loss.teacher.parameters()])


def test_nad_of_a_network_with_itself_is_cross_entropy():
    torch.manual_seed(0)
    model = build("WRN-10-1", 10).eval()
    images, labels = torch.rand(8, 3, 16, 16), torch.arange(8)
    with_itself, _ = NADLoss(model, model.feature_layers, [500.0, 1000.0, 1000.0])(model, images, labels)
    assert with_itself.item() == pytest.approx(cross_entropy(model, images, labels)[0].item(), abs=1e-6)


def test_nad_with_beta_zero_is_fine_tuning_bit_for_bit():
    torch.manual_seed(0)
    model = build("WRN-10-1", 10)
    config = EraseConfig(epochs=2, teacher_epochs=1, batch_size=16, s_name="WRN-10-1", amp="off", lr=0.05, ft_lr=0.05,
                         beta1=0, beta2=0, beta3=0)
    tuned, student = (defenses.get(name).erase(model, toy(), config).state_dict() for name in ("finetune", "nad"))
    assert all(torch.equal(tuned[k], student[k]) for k in tuned)


def test_frozen_batchnorm_keeps_its_statistics():
    torch.manual_seed(0)
    model = build("WRN-10-1", 10)
    before = model.bn1.running_mean.clone()
    fit(model, cross_entropy, Batches(toy(), 16), epochs=1, lr=0.1, freeze_bn=True, **RECIPE)
    assert torch.equal(model.bn1.running_mean, before)
    fit(model, cross_entropy, Batches(toy(), 16), epochs=1, lr=0.1, **RECIPE)
    assert not torch.equal(model.bn1.running_mean, before)


def test_batchnorm_is_settled_on_all_batches():
    torch.manual_seed(0)
    model, data = build("WRN-10-1", 10), toy(600)
    data.images[250:] //= 4
    weights = [p.clone() for p in model.parameters()]
    out = F.conv2d(to_float(data.images), model.conv1.weight, padding=1)
    assert settle_batchnorm(model, Batches(data, 200), 3) is model
    first = model.block1.layer[0].bn1
    assert torch.allclose(first.running_mean, out.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(first.running_var, out.var((0, 2, 3)), rtol=0.02)
    assert first.momentum == 0.1 and not any(m.training for m in model.modules())
    assert all(torch.equal(w, p) for w, p in zip(weights, model.parameters(), strict=True))


def test_precise_batchnorm_changes_the_statistics_alone():
    plain, precise = build("WRN-10-1", 10), build("WRN-10-1", 10)
    precise.load_state_dict(plain.state_dict())
    batches = Batches(toy(), 16, Augment(2))
    fit(plain, cross_entropy, batches, epochs=2, lr=0.1, **RECIPE)
    fit(precise, cross_entropy, batches, epochs=2, lr=0.1, precise_bn=True, **RECIPE)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), precise.parameters(), strict=True))
    assert not torch.equal(plain.bn1.running_var, precise.bn1.running_var)
    settle_batchnorm(plain, batches, 2)  # the epoch after the last
    assert torch.equal(plain.bn1.running_var, precise.bn1.running_var)


def test_batchnorm_is_not_both_frozen_and_settled():
    with pytest.raises(UserError, match="--precise_bn: takes anew what --freeze_bn keeps"):
        defenses.erase(build("WRN-10-1", 10), toy(), EraseConfig(freeze_bn=True, precise_bn=True))


def test_devices_that_are_not_there():
    with pytest.raises(UserError, match="--device cuda:77: not on this machine, which has .*cpu"):
        choose_device("cuda:77")
    with pytest.raises(UserError, match="--device gpu"):
        choose_device("gpu")


def test_float32_is_not_shortened_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    choose_device()
    assert not torch.backends.cudnn.allow_tf32


@pytest.mark.slow
def test_a_compiled_network_learns_the_same():
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler on the CPU")
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = build("WRN-10-1", 10)
        fit(model, cross_entropy, Batches(toy(), 16, seed=1), epochs=1, lr=0.01, compiled=compiled, **RECIPE)
        results.append(model.fc.weight.detach())
    assert torch.allclose(*results, atol=1e-4)


@pytest.mark.parametrize(("amp", "has", "numbers"), [("auto", True, "bf16"), ("auto", False, "float32"),
                                                     ("bf16", False, "bf16"), ("off", True, "float32")])
def test_hardware_says_in_what_numbers_training_computes(monkeypatch, amp, has, numbers):
    monkeypatch.setattr(devices, "has_bf16_instructions", lambda: has)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert hardware(torch.device("cpu"), amp).endswith(f" threads, {numbers}")
