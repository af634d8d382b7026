"""What speed.py counts and compares."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import speed
from config import EraseConfig, UserError
from utils.data import TensorData
from utils.engine import autocast, cross_entropy
from utils.optim import make_optimizer

CPU = torch.device("cpu")


def stream():
    for k in range(100):
        torch.manual_seed(k)
        yield torch.rand(8, 3, 32, 32), torch.randint(0, 10, (8,))


@pytest.mark.parametrize("amp", [False, True])
def test_networks_that_train_together_train_as_each_does_alone(amp):
    together = speed.Together(stream(), amp, CPU, 2)
    batches = list(stream())
    for _ in range(2):
        together.step()
    for k in range(2):
        alone = speed.network(CPU, False, k)
        optimizer = make_optimizer(alone, 0.05, 0.9, 5e-4)
        for step in range(2):
            images, labels = batches[2 * step + k]
            optimizer.zero_grad()
            with autocast(CPU, amp):
                loss = F.cross_entropy(alone(images), labels)
            loss.backward()
            optimizer.step()
        for name, value in alone.named_parameters():
            assert torch.allclose(together.weights[name][k], value, atol=2e-2 if amp else 2e-3), name
        assert torch.allclose(together.buffers["bn1.running_mean"][k], alone.bn1.running_mean, atol=1e-3)
        other = speed.network(CPU, False, 1 - k)
        assert not torch.allclose(together.weights["conv1.weight"][k], other.conv1.weight, atol=2e-3)


def test_bytes_and_flops_of_known_layers():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.Flatten(), nn.Linear(64, 10))
    images, labels = torch.rand(2, 3, 4, 4), torch.tensor([0, 1])
    numbers = (96 + 128 + 108) + (128 + 128) + (128 + 20 + 650)  # in + out + weights of each layer
    assert speed.traffic(model, images) == 4 * numbers
    conv, linear = 2 * 16 * 4 * 27, 2 * 64 * 10  # FLOPs of an image
    flops, data = speed.cost(model, cross_entropy, images, labels, False)
    assert flops == 2 * conv + 3 * linear  # no gradient of the images
    assert data == 3 * 4 * numbers / 2


def test_rates_are_compared_with_the_first(capsys):
    class Broken:
        def seconds(self, steps):
            raise RuntimeError("no compiler\nhere")

    class Clock:
        def __init__(self, seconds, networks=1):
            self.given, self.networks = seconds, networks

        def seconds(self, steps):
            return self.given * steps

    speed.compare({"usual": Clock(0.2), "own": Clock(0.05), "broken": Broken(), "two": Clock(0.1, 2)}, 10, 3, 3, 400)
    first, _, *lines = capsys.readouterr().out.splitlines()
    assert first == "broken: not available: here"
    lines = [line.split() for line in lines]
    assert lines == [["usual", "50", "1.00x", "12%"], ["own", "200", "4.00x", "50%"], ["two", "200", "4.00x", "50%"]]


def test_a_step_of_each_defense_is_timed(capsys):
    images = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8)
    clean = TensorData(images, torch.arange(20) % 10, range(10))
    config = EraseConfig(nc_batch_size=2, ibau_iterations=1)
    steps = speed.defense_steps(config, clean, CPU, False)
    speed.time_defenses(steps, CPU, 1e15)
    _, _, *lines = capsys.readouterr().out.splitlines()
    assert [line[:24].strip() for line in lines] == list(steps)
    assert all(float(line[24:36].replace(",", "")) > 0 for line in lines)
    assert steps["evaluation"][1] == steps["fine-tuning"][1] == 20, "no more than there are"
    assert steps["Neural Cleanse"][1] == 10 * 10 * 2 + 10 * 20
    with speed.Flops() as once:
        steps["fine-tuning"][0]()
    for name in ("evaluation", "NAD", "SAGE", "FT-SAM", "ANP"):
        with speed.Flops() as counter:
            steps[name][0]()
        ratio = counter.total / once.total
        expected = {"evaluation": 1 / 3, "NAD": 4 / 3, "SAGE": 1, "FT-SAM": 2, "ANP": 2}[name]
        assert ratio == pytest.approx(expected, rel=0.05), name


def test_a_wrong_option_is_one_line(capsys):
    with pytest.raises(SystemExit):
        speed.main(["--dataset", "nothing"])
    assert "invalid choice" in capsys.readouterr().err
    with pytest.raises(UserError, match="--rounds: at least 1 is needed, got 0"):
        speed.main(["--rounds", "0"])
