"""Architectures: parameter counts, checkpoint keys, and attention terms that are there for every model."""

import pytest
import torch

from config import EraseConfig, UserError
from defenses.nad import NADLoss, betas_for
from models import NAMES, Features, Normalize, build, feature_layers, find_stages, select_model

PARAMETERS = {"WRN-10-1": 77850, "WRN-10-2": 303706, "WRN-16-1": 175066, "WRN-16-2": 691674, "WRN-40-1": 563930,
              "WRN-40-2": 2243546, "ResNet34": 466906, "ResNet18": 11173962, "AlexNet": 4361034}


@pytest.mark.parametrize("name", NAMES)
def test_parameter_count(name):
    assert sum(p.numel() for p in build(name, 10).parameters()) == PARAMETERS[name]


def test_wrn_16_1_has_the_keys_of_the_demo():
    state = build("WRN-16-1", 10).state_dict()
    assert len(state) == 82
    for key in ("conv1.weight", "block1.layer.0.bn1.weight", "block1.layer.0.conv1.weight",
                "block2.layer.0.convShortcut.weight", "block3.layer.1.bn2.num_batches_tracked", "bn1.weight",
                "fc.weight"):
        assert key in state
    assert not any("block1.layer.0.convShortcut" in key for key in state)


def test_a_widening_block_takes_its_shortcut_from_the_activated_input():
    block = build("WRN-10-1", 10).block2.layer[0].eval()
    x = torch.randn(2, 16, 8, 8)
    activated = torch.relu(block.bn1(x))
    expected = block.convShortcut(activated) + block.conv2(torch.relu(block.bn2(block.conv1(activated))))
    assert torch.allclose(block(x), expected)


@pytest.mark.parametrize("name", [*NAMES, "WRN-22-3"])
def test_logits_for_other_classes_channels_and_sizes(name):
    model = select_model("MNIST", name, n_classes=43)
    assert model(torch.rand(2, 1, 40, 40)).shape == (2, 43)


TORCHVISION = ["resnet18", "vgg11", "mobilenet_v2", "squeezenet1_1", "shufflenet_v2_x0_5", "densenet121"]


@pytest.mark.parametrize("name", [*NAMES, *(f"torchvision:{n}" for n in TORCHVISION),
                                  *(pytest.param(f"torchvision:{n}", marks=pytest.mark.slow)
                                    for n in ("swin_t", "vit_b_32", "efficientnet_b0", "convnext_tiny", "googlenet"))])
def test_every_attention_term_counts_and_reaches_the_student_only(name):
    torch.manual_seed(0)
    size = 64 if name.startswith("torchvision:") else 16
    student, teacher = (build(name, 10, image_size=size) for _ in range(2))
    layers = feature_layers(student)
    assert len(layers) >= 2
    images, labels = torch.rand(4, 3, size, size), torch.arange(4)
    for k, layer in enumerate(layers):
        betas = [float(i == k) for i in range(len(layers))]
        loss = NADLoss(teacher, layers, betas)
        student.train()
        with Features(student, [layer]) as own, Features(loss.teacher, [layer]) as other:
            student(images)
            with torch.no_grad():
                loss.teacher(images)
            (term,) = loss.terms(own.outputs(), other.outputs())
        assert term > 1e-9, layer
        student.zero_grad()
        term.backward()
        parameters = dict(student.named_parameters())
        first = next(iter(parameters.values()))
        assert first.grad.abs().sum() > 0, f"{layer}: no gradient reaches the first layer"
        assert all(p.grad is None for p in loss.teacher.parameters())
        assert all(p.grad is None for n, p in parameters.items() if n.startswith(("fc.", "classifier", "head")))
    total, logits = NADLoss(teacher, layers, betas_for(layers, EraseConfig()))(student, images, labels)
    assert total > torch.nn.functional.cross_entropy(logits, labels)


def test_stages_are_found_at_each_resolution():
    model = build("ResNet34", 10)
    assert find_stages(model, torch.zeros(2, 3, 32, 32)) == ("layer1", "layer2", "layer3")
    assert build("torchvision:resnet18", 10, image_size=32).feature_layers == ("layer1", "layer2", "layer3")


def test_an_output_that_is_overwritten_in_place_is_refused():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(inplace=True))
    with Features(model, ["0"]) as taken:
        model(torch.rand(1, 3, 8, 8))
        with pytest.raises(UserError, match="overwritten"):
            taken.outputs()


def test_wrong_names():
    with pytest.raises(UserError, match="WRN-16-1.*torchvision"):
        build("WRN16", 10)
    with pytest.raises(UserError, match="depth is 6 n"):
        build("WRN-15-1", 10)
    with pytest.raises(UserError, match="resnet18"):
        build("torchvision:resnet19", 10)
    with pytest.raises(UserError, match="block7.*block1"):
        Features(build("WRN-16-1", 10), ["block7"])


def test_a_layer_of_one_pixel_is_refused():
    model = build("WRN-10-1", 10)
    loss = NADLoss(model, ["block3"], [1.0])
    with pytest.raises(UserError, match="one pixel"):
        loss(model, torch.rand(2, 3, 4, 4), torch.tensor([0, 1]))
    deep = NADLoss(build("ResNet18", 10), ["block1"], [1.0], teacher_layers=["layer4"])
    with pytest.raises(UserError, match="layer4.*one pixel"):
        deep(model, torch.rand(2, 3, 8, 8), torch.tensor([0, 1]))


def test_alexnet_says_how_large_images_must_be():
    assert build("AlexNet", 10, 1, 7).eval()(torch.rand(1, 1, 7, 7)).shape == (1, 10)
    with pytest.raises(UserError, match="at least 7 x 7 pixels, these have 6"):
        build("AlexNet", 10, 1, 6)


def test_normalising_after_a_measurement_still_has_a_gradient():
    """What the hook moves to another device while measuring serves training too."""
    hook, x = Normalize((0.5,), (0.5,)), torch.zeros(1, 1, 2, 2, device="meta")
    with torch.inference_mode():
        hook(None, (x,))
    hook(None, (x.requires_grad_(),))[0].sum().backward()
    assert x.grad.shape == x.shape


def test_normalize_imagenet():
    torch.manual_seed(0)
    model = select_model("folder", "WRN-10-1", n_classes=3, normalize="imagenet").eval()
    x = torch.rand(2, 3, 16, 16)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    plain = select_model("folder", "WRN-10-1", n_classes=3).eval()
    plain.load_state_dict(model.state_dict())
    assert torch.allclose(model(x), plain((x - mean[:, None, None]) / std[:, None, None]), atol=1e-5)
