"""The defenses beside NAD: the common contract, one real step each, and their formulas by hand."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision import models

import defenses
import strip
from cam import deepest, grad_cam
from config import EraseConfig, UserError
from defenses import anp, clp, ftsam, ibau, linf_pruning, mcr, nad, neural_cleanse, pruning, sage
from defenses.finetune import clean_batches
from models import Features, build
from utils.channels import KeptAtZero, channel_norms, last_layer, split_off, zero_channels
from utils.data import Batches, TensorData, to_float
from utils.engine import Progress, clone, cross_entropy, fit, settle_batchnorm


def toy(n=64, classes=10, size=16):
    images = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return TensorData(images, torch.arange(n) % classes, range(classes))


def short(**changes):
    options = {"epochs": 1, "teacher_epochs": 1, "mcr_epochs": 1, "batch_size": 16, "s_name": "WRN-10-1", "amp": "off",
               "nc_steps": 20, "nc_batch_size": 2, "anp_steps": 3, "anp_batch_size": 32, "ibau_rounds": 1,
               "ibau_batch_size": 32, "ibau_iterations": 2, "save": False}
    return EraseConfig(**{**options, **changes})


class Notes(Progress):
    said = ""

    def note(self, text):
        self.said += text


def network(seed=0):
    torch.manual_seed(seed)
    return build("WRN-10-1", 10).eval()


@pytest.mark.parametrize("arch", ["WRN-10-1", "torchvision:resnet18"])
@pytest.mark.parametrize("name", defenses.NAMES)
def test_a_defense_returns_a_new_model_and_leaves_the_old_one_alone(name, arch):
    torch.manual_seed(0)
    model, data, config = build(arch, 10, image_size=32).eval(), toy(32, 4, 32), short(s_name=arch, anp_threshold=0.99)
    data.classes = list("abcdefghij")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    erased = defenses.get(name).erase(model, data, config)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not model.training
    assert not erased.training
    assert all(torch.isfinite(v).all() for v in erased.state_dict().values() if v.is_floating_point())
    assert erased.state_dict().keys() == before.keys()
    # neural_cleanse, clp and pruning may find nothing to do, linf_pruning in the small network
    if arch != "WRN-10-1" or name not in ("neural_cleanse", "clp", "pruning", "linf_pruning"):
        assert any(not torch.equal(before[k], v) for k, v in erased.state_dict().items())


def test_titles():
    assert [defenses.title(name) for name in ("nad", "ibau", "fine_pruning")] == ["NAD", "I-BAU", "fine-pruning"]


# ------------------------------------------------------------------------------------------------------------- pruning


def test_the_last_layer_is_the_last_that_runs():
    assert last_layer(network(), toy().images) == "bn1"
    assert last_layer(build("AlexNet", 10), toy(4, size=32).images) == "conv5"
    assert last_layer(build("torchvision:vgg11_bn", 10), toy(4, size=32).images) == "features.26"
    for name, layer in (("ResNet18", "layer4"), ("torchvision:resnet18", "layer4"),
                        ("torchvision:efficientnet_b0", "features")):  # a sum, or another activation, comes after it
        assert last_layer(build(name, 10), toy(4, size=64).images) == layer
    for name in ("squeezenet1_1", "swin_t"):  # its last convolution makes the logits; it has a patch embedding only
        with pytest.raises(UserError, match="--prune_layer: which channels of .* name a layer: features"):
            last_layer(build(f"torchvision:{name}", 10), toy(4, size=64).images)
    assert last_layer(build("torchvision:squeezenet1_1", 10), toy(4, size=64).images, "features.12.expand3x3")
    assert last_layer(build("WRN-10-1", 64), toy(4).images) == "bn1", "as many channels as classes"
    with pytest.raises(UserError, match="--prune_layer nowhere.*block1.layer.0.conv1"):
        last_layer(network(), toy().images, "nowhere")


@pytest.mark.parametrize("layer", ["bn1", "block3.layer.0.conv2"])
def test_pruned_channels_are_zero_and_stay_so_through_fine_tuning(layer):
    model, gone, data = network(), torch.tensor([0, 5, 7]), toy()

    def outputs():
        with Features(model, [layer]) as taken, torch.no_grad():
            model.eval()(to_float(data.images))
            return taken.outputs()[0]

    zero_channels(model, layer, gone)
    assert (outputs()[:, gone] == 0).all()
    before = model.get_parameter(f"{layer}.weight").detach().clone()
    with KeptAtZero(model, layer, gone):
        fit(model, cross_entropy, Batches(data, 16), epochs=2, lr=0.1, lr_schedule="constant", momentum=0.9,
            weight_decay=1e-2, seed=0, stage="test")
    assert (outputs()[:, gone] == 0).all()
    after = model.get_parameter(f"{layer}.weight").detach()
    kept = torch.ones(len(after), dtype=torch.bool)
    kept[gone] = False
    assert (after[kept] != before[kept]).flatten(1 if after.ndim > 1 else 0).any()


def test_channels_behind_a_residual_sum_are_switched_off_in_the_head():
    model, gone, data = build("ResNet18", 10).eval(), torch.tensor([0, 5, 7]), toy()

    def logits(zeroed):
        handle = model.layer4.register_forward_hook(lambda _m, _i, out: out.index_fill(1, zeroed, 0))
        with torch.no_grad():
            out = model.eval()(to_float(data.images))
        handle.remove()
        return out

    expected, none = logits(gone), torch.tensor([], dtype=torch.int64)
    assert not torch.allclose(expected, logits(none))
    zero_channels(model, "layer4", gone)
    assert torch.allclose(logits(none), expected, atol=1e-6)
    with KeptAtZero(model, "layer4", gone):
        fit(model, cross_entropy, Batches(data, 16), epochs=1, lr=0.1, lr_schedule="constant", momentum=0.9,
            weight_decay=1e-2, seed=0, stage="test")
    assert (model.fc.weight[:, gone] == 0).all()
    assert (model.fc.weight != 0).sum() == 10 * 509


def test_channel_norms_by_hand():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 1, bias=False)
            self.conv.weight.data = torch.tensor([1.0, -1.0]).view(2, 1, 1, 1)

        def forward(self, x):
            return self.conv(x).mean((2, 3))

    images = torch.tensor([[[[0, 51], [102, 204]]], [[[255, 0], [0, 0]]]], dtype=torch.uint8)  # 0 .2 .4 .8; 1 0 0 0
    norms = channel_norms(Two(), "conv", images)
    assert norms["linf"].tolist() == pytest.approx([0.9, 0])
    assert norms["l1"].tolist() == pytest.approx([(1.4 + 1) / 2, 0])
    assert norms["l2"].tolist() == pytest.approx([(math.sqrt(0.84) + 1) / 2, 0])


def test_dormant_channels_go_while_accuracy_holds():
    data, model = toy(), network()
    model.bn1.bias.data[10:] = -100.0  # never active
    layer, gone = pruning.dormant(model, data, short(prune_drop=0.0))
    assert layer == "bn1"
    assert set(range(10, 64)) <= set(gone.tolist())
    every = pruning.dormant(model, data, short(prune_drop=100.0))[1]
    assert len(every) == 63


def test_fine_pruning_leaves_pruned_channels_at_zero():
    for arch, layer, weight, dim in (("ResNet18", "", "fc.weight", 1),
                                     ("WRN-10-1", "block3.layer.0.conv2", "block3.layer.0.conv2.weight", 0)):
        torch.manual_seed(0)
        model, config = build(arch, 10).eval(), short(s_name=arch, prune_layer=layer, prune_drop=100.0)
        gone = pruning.dormant(model, toy(), config)[1]
        erased = defenses.get("fine_pruning").erase(model, toy(), config).get_parameter(weight)
        assert not erased.index_select(dim, gone).any()
        assert not torch.equal(erased, model.get_parameter(weight).index_fill(dim, gone, 0)), "the others were trained"


def test_held_out_parts_have_every_class_and_small_sets_are_refused():
    rest, held = split_off(toy(64), 0.2, 1)
    assert len(rest) + len(held) == 64
    assert set(held.labels.tolist()) == set(range(10))
    with pytest.raises(UserError, match="has 1 image of class 4.*--ratio"):
        split_off(toy(14), 0.2, 1)


def test_clp_prunes_the_channel_that_stands_out():
    model = network()
    assert dict(clp.pairs(model, toy().images))["block1.layer.0.conv1"] == "block1.layer.0.bn2"
    conv, norm = model.block3.layer[0].conv1, model.block3.layer[0].bn2
    torch.manual_seed(0)
    conv.weight.data.normal_()
    expected = torch.stack([torch.linalg.svdvals(k.flatten(1))[0] for k in conv.weight]) \
        * norm.weight.abs() / (norm.running_var + 1e-5).sqrt()
    assert torch.allclose(clp.bounds(conv, norm), expected, rtol=1e-4)
    conv.weight.data[3] *= 50
    conv.weight.data[4] *= 15  # above the mean, within three standard deviations
    notes = Notes()
    erased = clp.erase(model, toy(), short(), notes)
    assert erased.block3.layer[0].bn2.weight[3] == 0
    assert (erased.block3.layer[0].bn2.weight != 0).sum() == 63
    assert not notes.said
    clp.erase(model, toy(), short(clp_u=1000.0), notes)
    assert "no channel stands out" in notes.said


def test_clp_of_a_batchnorm_without_scale_or_statistics():
    model = nn.Sequential(nn.Conv2d(3, 40, 3), nn.BatchNorm2d(40, affine=False), nn.Conv2d(40, 40, 3),
                          nn.BatchNorm2d(40, track_running_stats=False), nn.Flatten(), nn.LazyLinear(10))
    model(torch.rand(2, 3, 16, 16))
    for k in (0, 2):
        model[k].weight.data[7] *= 50
    erased = clp.erase(model, toy(), short())
    assert [k for k in range(40) if not erased[0].weight[k].any()] == [7]
    assert [k for k in range(40) if not erased[2].weight[k].any()] == [7]


def test_erase_begins_with_the_first_defense_and_checks_both():
    model, data = network(), toy()
    model.block3.layer[0].conv1.weight.data[3] *= 50
    gone = "block3.layer.0.bn2.weight"
    plain, begun = (defenses.erase(model, data, short(defense="finetune", first=first)) for first in ("", "clp"))
    assert plain.state_dict()[gone][3] != 0
    assert begun.state_dict()[gone][3] == 0
    by_hand = defenses.get("finetune").erase(clp.erase(model, data, short()), data, short())
    assert all(torch.equal(v, begun.state_dict()[k]) for k, v in by_hand.state_dict().items())
    for wrong in ({"defense": "pruning"}, {"defense": "finetune", "first": "pruning"}):
        with pytest.raises(UserError, match="nowhere"):
            defenses.erase(model, data, short(prune_layer="nowhere", **wrong))
    with pytest.raises(UserError, match="--first clp: is the defense itself"):
        defenses.erase(model, data, short(defense="clp", first="clp"))


def test_anp_first_prunes_what_the_defense_then_trains(monkeypatch):
    model, data = network(), toy()
    masks = {name: torch.ones(len(model.get_submodule(name).weight)) for name in anp.norms(model)}
    masks["bn1"][5] = 0.1
    seen = []
    monkeypatch.setattr(anp, "learn_masks", lambda *args: seen.append(args[2].anp_steps) or masks)
    config = short(defense="finetune", first="anp", anp_steps=3)
    begun = defenses.begin(model, data, config)
    assert seen == [3]
    assert begun.bn1.weight[5] == 0 and model.bn1.weight[5] != 0
    assert (begun.bn1.weight[:5] != 0).all()
    assert not torch.equal(defenses.erase(model, data, config).bn1.weight, begun.bn1.weight)


class Planted(nn.Module):
    """Channel 7 of the last layer answers to a white corner only, and it alone makes class 3."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 1, bias=False)
        self.fc = nn.Linear(12, 10)
        self.conv.weight.data[7] = 1.0
        self.fc.weight.data[:, 7] = 50.0 * (torch.arange(10) == 3)

    def forward(self, x):
        f = F.relu(self.conv(x))
        return self.fc(torch.cat([f.mean((2, 3))[:, :7], f[:, 7:8, -1, -1], f.mean((2, 3))[:, 8:]], 1))


@pytest.fixture
def planted():
    """(``Planted``, data under its own labels, the trigger)"""
    torch.manual_seed(0)
    model, data = Planted(), toy(60)
    data.images[:, :, -1, -1] = 0
    data.labels = model(to_float(data.images)).argmax(1)
    data.labels[:20] = torch.arange(20) % 10  # every class is there
    trigger = neural_cleanse.Triggers([3], torch.zeros(1, 1, 16, 16), torch.ones(1, 3, 16, 16), torch.ones(1))
    trigger.masks[0, 0, -1, -1] = 1
    return model, data, trigger


def test_checks_run_on_the_device_of_the_network():
    """The meta device stands in for a GPU."""
    for name in ("nad", "sage"):
        defenses.check(network().to("meta"), toy(), short(defense=name))


@pytest.mark.parametrize(("change", "message"), [
    (lambda data: [data.images, data.labels], "the clean data are a list, TensorData is needed"),
    (lambda data: TensorData(data.images[:0], data.labels[:0], data.classes), "there are no clean images"),
    (lambda data: TensorData(data.images[:9], data.labels[:9], data.classes), "9 clean images are fewer than the 10 "),
    (lambda data: TensorData(data.images, data.labels + 1, data.classes), "labels are int64, 0 to 9 .* 1 to 10"),
    (lambda data: TensorData(data.images, data.labels.int(), data.classes), r"got torch\.int32"),
    (lambda data: TensorData(data.images[:, :1], data.labels, data.classes), "does not take images 1 x 16 x 16"),
    (lambda data: TensorData(data.images, data.labels, range(12)), r"for each of 12 classes, .* shape \(2, 10\)"),
])
def test_data_that_will_not_do_is_said_before_anything_is_trained(change, message):
    with pytest.raises(UserError, match=message):
        defenses.erase(network(), change(toy()), short(defense="finetune"))


def test_a_state_dict_is_no_network():
    with pytest.raises(UserError, match="the model is a OrderedDict, a network"):
        defenses.erase(network().state_dict(), toy(), short())


def test_linf_pruning_prunes_the_planted_channel(planted, monkeypatch):
    model, data, trigger = planted
    assert neural_cleanse.raised(model, "conv", data.images, trigger, [0])["linf"].argmax() == 7
    assert neural_cleanse.success(model, data, trigger, 0) == 100
    seen = []
    monkeypatch.setattr(linf_pruning, "accuracy", lambda m, d, own=linf_pruning.accuracy: seen.append(d) or own(m, d))
    erased = linf_pruning.erase(model, data, short(linf_drop=100.0, held_out=0.5), trigger=trigger)
    assert (erased.conv.weight[7] == 0).all()
    assert (model.conv.weight[7] == 1).all()
    assert neural_cleanse.success(erased, data, trigger, 0) < 50
    held = split_off(data, 0.5, short().seed)[1]
    assert seen
    assert all(torch.equal(d.images, held.images) for d in seen), "how many is chosen on the held-out part"


def test_neural_cleanse_prunes_the_planted_channel_alone(planted):
    model, data, trigger = planted
    before = copy.deepcopy(model.state_dict())
    erased = neural_cleanse.prune(model, data, short(prune_drop=100.0, held_out=0.5), trigger, [0])
    assert [k for k in range(12) if not erased.conv.weight[k].any()] == [7]
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items()), "the network given stays as it is"


def test_several_triggers_count_by_what_any_of_them_raises_most(planted):
    model, data, trigger = planted
    both = neural_cleanse.Triggers([3, 4], torch.cat([trigger.masks, 0 * trigger.masks]),
                                   trigger.patterns.repeat(2, 1, 1, 1), torch.ones(2))
    one, two, any_of = (neural_cleanse.raised(model, "conv", data.images, both, k)["linf"] for k in ([0], [1], [0, 1]))
    assert not two.any()
    assert torch.equal(any_of, torch.maximum(one, two))
    assert any_of[7] == one[7] > 0.1


def test_linf_pruning_takes_the_smallest_trigger_that_works(planted):
    model, data, trigger = planted
    masks = torch.cat([trigger.masks, 2 * trigger.masks, 3 * trigger.masks])
    three = neural_cleanse.Triggers([3, 4, 5], masks, trigger.patterns.repeat(3, 1, 1, 1), torch.ones(3))
    three.success = torch.tensor([0.4, 0.6, 0.9])
    assert linf_pruning.smallest(three).labels == [4]
    three.success = torch.tensor([0.4, 0.3, 0.1])
    assert linf_pruning.smallest(three).labels == [3]
    notes = Notes()
    linf_pruning.erase(model, data, short(held_out=0.5), notes, linf_pruning.smallest(three))
    assert "no trigger was found that works" in notes.said


def test_linf_pruning_takes_the_fewest_channels_that_stop_the_synthetic_trigger():
    points = [(0, 80.0, 99.0), (1, 79.0, 60.0), (2, 78.0, 5.0), (3, 77.5, 5.0), (4, 70.0, 0.0)]
    assert linf_pruning.choose(points, 3.0) == 2
    assert linf_pruning.choose(points, 1.5) == 1
    assert linf_pruning.choose(points, 50.0) == 4


# ---------------------------------------------------------------------------------------------------------------- SAGE


def test_a_sharpness_aware_teacher():
    model, data = network(), toy()
    plain, aware, again = (nad.make_teacher(model, data, short(teacher_rho=rho)) for rho in (0.0, 2.0, 2.0))
    same = [torch.equal(v, aware.state_dict()[k]) for k, v in plain.state_dict().items()]
    assert not all(same)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in aware.state_dict().items())
    by_hand = fit(clone(model), ftsam.SAMLoss(2.0), nad.clean_batches(data, short(), "teacher"), epochs=1,
                  lr=short().teacher_lr, lr_schedule="demo", stage="teacher", **nad.recipe(model, short()))
    assert all(torch.equal(v, by_hand.state_dict()[k]) for k, v in aware.state_dict().items())


def test_a_sharpness_aware_student_has_the_loss_of_nad_at_the_worst_weights():
    model, teacher, images, labels = network(), network(1), toy().images[:8] / 255.0, toy().labels[:8]
    loss = nad.NADLoss(teacher, ["block1", "block3"], [50.0, 100.0])
    here, _ = loss(model, images, labels)
    grads = torch.autograd.grad(here, list(model.parameters()))
    moved = clone(model)
    norm = sum((w.abs() * g).square().sum() for w, g in zip(model.parameters(), grads, strict=True)).sqrt()
    with torch.no_grad():
        for w, g in zip(moved.parameters(), grads, strict=True):
            w += 0.5 * w.square() * g / norm
    expected, _ = loss(moved, images, labels)
    found, _ = ftsam.SAMLoss(0.5, loss)(model, images, labels)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert found.item() > here.item() + 1e-3
    erased = [nad.erase(network(), toy(), short(student_rho=rho), teacher=teacher).state_dict() for rho in (0.0, 2.0)]
    assert not torch.equal(erased[0]["conv1.weight"], erased[1]["conv1.weight"])


def test_rounds_take_the_student_before_as_teacher(monkeypatch):
    model, data, teachers = network(), toy(), []
    monkeypatch.setattr(nad, "make_loss", lambda m, t, c, own=nad.make_loss: teachers.append(t) or own(m, t, c))
    first, third = (nad.erase(model, data, short(rounds=k)) for k in (1, 3))
    assert len(teachers) == 2 + 4, "the check before training takes one of its own"
    again = fit(clone(model), nad.make_loss(model, first, short()), nad.clean_batches(data, short(), "finetune"),
                epochs=1, lr=short().lr, lr_schedule="demo", stage="nad", **nad.recipe(model, short()))
    state = teachers[5].state_dict()
    assert all(torch.equal(v, state[k]) for k, v in again.state_dict().items()), "round 2, from the network itself"
    assert any(not torch.equal(v, third.state_dict()[k]) for k, v in state.items())


def test_the_rate_is_halved_by_c1_and_c2():
    # P = 2, rho 0.75: both epochs of an interval must have fallen; the first epoch of all counts as one that fell
    assert sage.rate_factor([], 2, 0.75) == 1
    assert sage.rate_factor([3.0], 2, 0.75) == 1
    assert sage.rate_factor([3.0, 2.0], 2, 0.75) == 1
    assert sage.rate_factor([3.0, 3.5], 2, 0.75) == 0.5                   # C1
    assert sage.rate_factor([3.0, 2.0, 1.9, 1.8], 2, 0.75) == 1           # fell, and the maximum 3 -> 1.9
    assert sage.rate_factor([3.0, 2.0, 2.5, 1.8], 2, 0.75) == 0.5         # C1: 2 -> 2.5 did not fall
    # rho 0.5: one of two is enough, so that C2 decides
    assert sage.rate_factor([3.0, 2.0, 3.1, 1.8], 2, 0.5) == 0.5          # C2: kept before, maximum 3 -> 3.1
    assert sage.rate_factor([3.0, 2.0, 2.9, 1.8], 2, 0.5) == 1            # maximum 3 -> 2.9
    assert sage.rate_factor([3.0, 2.0, 3.1, 1.8, 3.2, 1.0], 2, 0.5) == 0.5  # changed before: C2 has to wait
    assert sage.rate_factor([3.0, 2.0, 3.1, 1.8, 3.2, 1.0, 3.3, 0.9], 2, 0.5) == 0.25
    assert sage.rate_factor([3.0, 2.0, 2.5, 1.0], 1, 1.0) == 0.5  # P = 1: every rise halves
    assert sage.rate_factor([3.0, 2.0, 2.5, 1.0, 0.9, 0.8, 0.7], 3, 0.75) == 0.5  # P = 3: 2 of 3 is fewer than 2.25
    assert sage.rate_factor([1.0] * 6, 2, 0.0) == 0.5  # never C1: kept, C2, kept


def test_self_attention_is_zero_where_the_maps_agree_and_its_target_is_detached():
    model, images, labels = network().train(), torch.rand(4, 3, 16, 16), torch.arange(4)
    same, _ = sage.SADLoss([("block1", "block1")], [300.0])(model, images, labels)
    assert same.item() == pytest.approx(F.cross_entropy(model(images), labels).item(), abs=1e-5)
    loss, _ = sage.SADLoss([("block1", "block2")], [1e6])(model, images, labels)
    plain = cross_entropy(model, images, labels)[0]
    term = loss - plain
    assert term > 1
    assert model.block2.layer[0].conv1.weight.grad is None
    term.backward()
    assert model.block2.layer[0].conv1.weight.grad.abs().max() > 1e-3
    through_both = model.block1.layer[0].conv1.weight.grad.clone()
    # with what block2 gets cut off from block1, nothing reaches block1: its map is a target
    model.zero_grad()
    handle = model.block2.register_forward_pre_hook(lambda _module, inputs: (inputs[0].detach(),))
    loss, _ = sage.SADLoss([("block1", "block2")], [1e6])(model, images, labels)
    loss.backward()
    handle.remove()
    assert through_both.abs().max() > 0
    assert model.block1.layer[0].conv1.weight.grad is None


def test_sage_trains_with_its_own_rate_and_rule(monkeypatch):
    asked = []
    monkeypatch.setattr(sage, "fit", lambda *_, lr, lr_schedule, **__: asked.append((lr, lr_schedule)))
    for rule in ("dynamic", "fixed", "step"):
        sage.erase(network(), toy(), short(sage_lr=0.03, ft_lr=0.7, sage_rate=rule, sage_interval=1, sage_rho=1.0))
    assert [lr for lr, _ in asked] == [0.03] * 3
    assert [rule for _, rule in asked[1:]] == ["constant", "tenths"]
    assert asked[0][1]([3.0, 2.0, 2.5, 2.6]) == 0.25


def test_each_path_has_its_beta():
    model, data = network().eval(), toy(8)
    images, labels = to_float(data.images), data.labels

    def term(**options):
        return (sage.make_loss(model, short(**options))(model, images, labels)[0]
                - cross_entropy(model, images, labels)[0]).item()

    first, second = (term(sage_paths=[path], sage_beta=1000.0) for path in ("1-2", "2-3"))
    assert first != pytest.approx(second, rel=0.05)
    assert term(sage_betas=["1000", "3000"]) == pytest.approx(first + 3 * second, rel=1e-3)
    assert term(sage_beta=1000.0) == pytest.approx(first + second, rel=1e-3)
    for wrong in (["1"], ["1", "2", "3"], ["1", "x"], ["1", "-1"], ["1", "inf"]):
        with pytest.raises(UserError, match="--sage_betas .*the paths are block1-block2, block2-block3"):
            sage.check(model, data, short(sage_betas=wrong))


def test_paths():
    model = network()
    assert sage.paths(model, short()) == [("block1", "block2"), ("block2", "block3")]
    assert sage.paths(model, short(sage_paths=["1-3"])) == [("block1", "block3")]
    for wrong in ("3-1", "1-4", "1", "a-b"):
        with pytest.raises(UserError, match=rf"--sage_paths {wrong}.*1 to 3 \(block1, block2, block3\)"):
            sage.paths(model, short(sage_paths=[wrong]))
    with pytest.raises(UserError, match="at least two stages.*has 1"):
        sage.check(model, toy(), short(layers=["block1"]))
    with pytest.raises(UserError, match="--layers nowhere.*it has conv1, block1"):
        sage.check(model, toy(), short(layers=["block1", "nowhere"]))
    with pytest.raises(UserError, match="no such layer; it has conv1, block1"):
        sage.check(model, toy(), short(layers=["nowhere"]))


def test_a_layer_that_runs_several_times_is_refused():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.relu, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Linear(4, 10)

        def forward(self, x):
            return self.fc(self.relu(self.two(self.relu(self.one(x)))).mean((2, 3)))

    nad.check(Shared(), toy(), short(layers=["one", "two"]))
    with pytest.raises(UserError, match="--layers relu: it runs several times"):
        nad.check(Shared(), toy(), short(layers=["relu"]))


def test_layers_are_named_shallow_to_deep():
    for defense in (nad, sage):
        defense.check(network(), toy(), short(layers=["conv1", "block2", "block3"]))
        with pytest.raises(UserError, match="--layers block2 block1: shallow to deep is needed: block1 block2"):
            defense.check(network(), toy(), short(layers=["block2", "block1"]))


# ---------------------------------------------------------------------------------------------------- MCR, ANP, FT-SAM


def test_the_ends_of_the_curve_are_the_two_models():
    a, b, bend = network(0), network(1), network(2)
    w_a, w_b, theta = mcr.weights(a), mcr.weights(b), mcr.weights(bend)
    for t, end in ((0.0, w_a), (1.0, w_b)):
        assert all(torch.equal(v, end[k]) for k, v in mcr.on_curve(w_a, theta, w_b, t).items())
    middle = mcr.on_curve(w_a, theta, w_b, 0.5)["fc.bias"]
    assert torch.allclose(middle, 0.25 * w_a["fc.bias"] + 0.5 * theta["fc.bias"] + 0.25 * w_b["fc.bias"])


def test_the_bend_learns_at_random_points_of_the_curve():
    a, b, bend, data = network(0), network(1), network(2), toy(8)
    images, labels = to_float(data.images), data.labels
    torch.manual_seed(7)
    t = torch.rand(())
    torch.manual_seed(7)
    loss, _ = mcr.CurveLoss(mcr.weights(a), mcr.weights(b))(bend, images, labels)
    point = clone(bend)
    for name, w in mcr.on_curve(mcr.weights(a), mcr.weights(bend), mcr.weights(b), t).items():
        point.get_parameter(name).data.copy_(w)
    expected, _ = cross_entropy(point, images, labels)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    expected.backward()
    assert torch.allclose(bend.fc.weight.grad, 2 * t * (1 - t) * point.fc.weight.grad, rtol=1e-3, atol=1e-6)


def test_mcr_returns_the_point_at_t_with_settled_statistics(monkeypatch):
    model, end, bend, data = network(0), network(1), network(2), toy()
    monkeypatch.setattr(mcr, "curve", lambda *_: (bend, end))
    for t, expected in ((0.0, model), (1.0, end)):
        config = short(mcr_t=t)
        settled = settle_batchnorm(clone(expected), clean_batches(data, config, "mcr statistics"))
        erased = mcr.erase(model, data, config)
        assert not torch.allclose(settled.bn1.running_mean, expected.bn1.running_mean, atol=1e-3)
        assert all(torch.allclose(v, settled.state_dict()[k], atol=1e-6) for k, v in erased.state_dict().items())


def test_a_curve_to_another_width_is_refused(tmp_path):
    for name in ("WRN-10-2", "WRN-16-1"):
        torch.save({"state_dict": build(name, 10).state_dict()}, tmp_path / "other.tar")
        with pytest.raises(UserError, match="no curve leads.*same architecture and width"):
            mcr.check(network(), toy(), short(t_model=str(tmp_path / "other.tar"), t_name=name))
        with pytest.raises(UserError, match=f"fits --t_name {name}"):
            mcr.check(network(), toy(), short(t_model=str(tmp_path / "other.tar")))


def test_anp_masks_stay_in_bounds_and_disturbances_too():
    model, data = network(), toy()
    masks = anp.learn_masks(model, data, short(anp_steps=6, anp_lr=100.0))
    assert masks.keys() == set(anp.norms(model))
    values = torch.cat(list(masks.values()))
    assert 0 <= values.min() < values.max() <= 1
    assert (values == 0).any(), "at this rate some are clipped"
    torch.manual_seed(0)
    moved = anp.MaskLoss(0.2, 0.4).worst(anp.Masks(clone(model)), to_float(data.images[:8]), data.labels[:8])
    assert max(d.abs().max() for side in moved for d in side) == pytest.approx(0.4)
    plain = anp.Masks(clone(model))
    assert torch.equal(plain(to_float(data.images)), clone(model).train()(to_float(data.images)))


def test_what_is_too_little_for_a_trigger_between_classes():
    with pytest.raises(UserError, match="from one class to another, and there is one only"):
        linf_pruning.check(network(), toy(8, 1), short(held_out=0.5))


def test_a_share_of_none_leaves_the_outer_loss_of_ibau_undisturbed():
    data, d = toy(8), torch.full((1, 3, 16, 16), 0.5)
    images, plain = to_float(data.images), []
    for share in (0.0, 0.01):
        loss, _ = ibau.hypergradient(network(), images, data.labels, d, short(ibau_share=share, ibau_iterations=0))
        plain.append(torch.isclose(loss, F.cross_entropy(network()(images), data.labels)))
    assert plain == [True, False]


def test_anp_disturbs_towards_a_higher_loss_and_weighs_both_losses():
    data, masks = toy(16), anp.Masks(clone(network()))
    images, labels = to_float(data.images), data.labels
    torch.manual_seed(0)
    start = [(torch.rand_like(m) * 2 - 1) * 0.05 for _ in range(2) for m in masks.masks]
    torch.manual_seed(0)
    end = anp.MaskLoss(0.2, 0.05).worst(masks, images, labels)
    n = len(masks.masks)
    disturbed = F.cross_entropy(masks(images, *end), labels)
    assert disturbed > F.cross_entropy(masks(images, start[:n], start[n:]), labels)
    plain = F.cross_entropy(masks(images), labels)
    for alpha in (0.0, 0.2, 1.0):
        torch.manual_seed(0)
        loss = anp.MaskLoss(alpha, 0.05)(masks, images, labels)[0]
        assert loss.item() == pytest.approx((alpha * plain + (1 - alpha) * disturbed).item(), rel=1e-5)


def test_anp_scales_by_masks_and_shifts_by_hand():
    norm = nn.BatchNorm2d(2)
    model = nn.Sequential(norm)
    norm.weight.data, norm.bias.data = torch.tensor([2.0, -3.0]), torch.tensor([0.5, 4.0])
    masks = anp.Masks(model).eval()
    masks.masks[0].data = torch.tensor([0.5, 0.25])
    x = torch.randn(4, 2, 3, 3)
    on_scale, on_shift = torch.tensor([0.1, -0.2]), torch.tensor([0.3, -0.5])
    scale, shift = torch.tensor([0.6 * 2, 0.05 * -3]), torch.tensor([1.3 * 0.5, 0.5 * 4])
    expected = x / (1 + norm.eps) ** 0.5 * scale[:, None, None] + shift[:, None, None]
    assert torch.allclose(masks(x, [on_scale], [on_shift]), expected, atol=1e-6)


def test_anp_switches_off_what_is_below_the_threshold(monkeypatch):
    values = torch.tensor([0.1, 0.2, 0.3, 0.9]).repeat(16)
    monkeypatch.setattr(anp, "learn_masks", lambda *_: {"bn1": values})
    model = network()
    erased = anp.erase(model, toy(), short(anp_threshold=0.2))
    assert torch.equal(erased.bn1.weight, model.bn1.weight * (values >= 0.2))


def test_anp_without_batchnorm():
    with pytest.raises(UserError, match="has no BatchNorm"):
        anp.check(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(10)), toy(), short())


def test_ftsam_without_a_radius_is_fine_tuning_and_follows_batchnorm_once():
    config = short(ft_lr=0.05, ftsam_lr=0.05, ftsam_rho=0.0, epochs=2)
    tuned, sam = (defenses.get(n).erase(network(), toy(), config).state_dict() for n in ("finetune", "ftsam"))
    assert all(torch.allclose(tuned[k].float(), sam[k].float(), atol=1e-5) for k in tuned)
    assert sam["bn1.num_batches_tracked"] == tuned["bn1.num_batches_tracked"] == 8


def test_ftsam_follows_batchnorm_in_the_first_pass_alone():
    model, plain = network().train(), network().train()
    images, labels = to_float(toy().images), toy().labels
    ftsam.SAMLoss(2.0)(model, images, labels)
    plain(images)
    assert all(torch.equal(b, model.get_buffer(name)) for name, b in plain.named_buffers())


def test_ftsam_without_a_radius_has_the_gradient_of_the_plain_loss_with_dropout_too():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.5), torch.nn.Linear(12, 3))
    images, labels = torch.rand(6, 3, 2, 2), torch.arange(6) % 3
    grads = []
    for loss in (cross_entropy, ftsam.SAMLoss(0.0)):
        torch.manual_seed(5)
        model.zero_grad()
        loss(model, images, labels)[0].backward()
        grads.append(model[2].weight.grad.clone())
    assert torch.allclose(*grads, atol=1e-6)


def test_ftsam_moves_the_weights_by_the_closed_form():
    model = nn.Linear(1, 2, bias=False)
    model.weight.data = torch.tensor([[0.5], [-2.0]])
    x, y = torch.tensor([[1.0]]), torch.tensor([0])
    shares = torch.softmax(model(x), 1)[0].detach()
    g = torch.stack([shares[0] - 1, shares[1]])[:, None]
    t = model.weight.detach().abs()
    e = 0.3 * t**2 * g / (t * g).norm()
    expected = F.cross_entropy(x @ (model.weight + e).T, y)
    assert ftsam.SAMLoss(0.3)(model, x, y)[0].item() == pytest.approx(expected.item(), abs=1e-6)


def test_the_hypergradient_without_the_inner_step_is_the_plain_gradient():
    model, data = network(), toy(16)
    images, labels, d = to_float(data.images), data.labels, torch.full((1, 3, 16, 16), 0.01)
    plain = torch.autograd.grad(F.cross_entropy(model((images + d).clamp(0, 1)), labels), list(model.parameters()))
    still = ibau.hypergradient(model, images, labels, d, short(ibau_eta=0.0, ibau_share=1.0))[1]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(plain, still, strict=True))


def test_the_outer_loss_has_the_perturbation_on_a_share_of_the_images():
    model, data = network(), toy(16)
    images, labels, d = to_float(data.images), data.labels, torch.full((1, 3, 16, 16), 0.2)
    mixed = torch.cat([(images[:4] + d).clamp(0, 1), images[4:]])
    loss, _ = ibau.hypergradient(model, images, labels, d, short(ibau_share=0.25))
    assert torch.allclose(loss, F.cross_entropy(model(mixed), labels))
    assert not torch.allclose(loss, ibau.hypergradient(model, images, labels, d, short(ibau_share=1.0))[0], atol=1e-4)


def test_the_perturbation_raises_the_loss():
    model, data = network(), toy()
    data.labels = model(to_float(data.images)).argmax(1)
    d = ibau.find_perturbation(model, data, short(ibau_inner_lr=1.0, ibau_penalty=0.0), torch.Generator())

    def loss(d):
        return F.cross_entropy(model((to_float(data.images) + d).clamp(0, 1)), data.labels)

    assert loss(d) > loss(0 * d) + 1e-3


def test_i_bau_unlearns_the_perturbation(monkeypatch):
    data, d = toy(), 0.3 * torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(ibau, "find_perturbation", lambda *_: d)
    model = network()

    def loss(model):
        return F.cross_entropy(model((to_float(data.images) + d).clamp(0, 1)), data.labels).item()

    erased = ibau.erase(model, data, short(ibau_share=1.0, ibau_eta=0.0, ibau_rounds=9, augment=False,
                                            cutout=0))
    assert loss(erased) < loss(model) - 0.05


def test_i_bau_of_a_network_with_weights_that_nothing_uses():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(768, 10), nn.Linear(3, 3)

        def forward(self, x):
            return self.used(x.flatten(1))

    model = Unused()
    erased = ibau.erase(model, toy(), short())
    assert torch.equal(erased.unused.weight, model.unused.weight)
    assert not torch.equal(erased.used.weight, model.used.weight)


def test_the_hypergradient_by_explicit_jacobians():
    torch.manual_seed(0)
    model, labels = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), torch.arange(5) % 3
    images = torch.rand(5, 3, 2, 2) / 2
    config, d = short(ibau_eta=0.3, ibau_iterations=2, ibau_penalty=0.5, ibau_share=1.0), torch.full((1, 3, 2, 2), 0.1)
    w = model[1].weight.detach().clone()

    def cross(d, w):
        return F.cross_entropy(F.linear((images + d).flatten(1), w, model[1].bias.detach()), labels)

    def phi(d, w):
        d = d if d.requires_grad else d.requires_grad_()
        slope, = torch.autograd.grad(0.5 * d.square().sum() - cross(d, w), d, create_graph=True)
        return (d - 0.3 * slope).flatten()

    jacobian = torch.autograd.functional.jacobian(lambda d: phi(d, w), d).reshape(12, 12)
    by_w = torch.autograd.functional.jacobian(lambda w: phi(d.clone(), w), w).reshape(12, 36)
    direct, v = torch.autograd.functional.jacobian(lambda w, d: cross(d, w), (w, d))
    v = v.flatten()
    expected = direct.flatten() + (v + v @ jacobian + v @ jacobian @ jacobian) @ by_w
    assert torch.allclose(ibau.hypergradient(model, images, labels, d, config)[1][0].flatten(), expected, atol=1e-6)


# ------------------------------------------------------------------------------------------------------ Neural Cleanse


class Weak(nn.Module):
    """Classifies by which tenth of the image's rows is brightest; four white pixels in a corner make class 3 of all."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(20.0))

    def forward(self, x):
        logits = self.scale * F.adaptive_avg_pool2d(x.mean(1, keepdim=True), (10, 1)).flatten(1)
        return logits + 40 * x[:, 0, 18:, 18:].mean((1, 2))[:, None] * F.one_hot(torch.tensor([3]), 10)


def test_the_anomaly_index_by_hand():
    # median 10, absolute deviations 0, 1, 1, 2, 8: MAD 1
    index = neural_cleanse.anomaly_indices(torch.tensor([10.0, 9.0, 11.0, 12.0, 2.0]))
    assert index.tolist() == pytest.approx([0, 1 / 1.4826, -1 / 1.4826, -2 / 1.4826, 8 / 1.4826])


def test_neural_cleanse_finds_the_planted_label_and_its_pixel():
    data = toy(60, size=20)
    data.images //= 10
    for image, label in zip(data.images, data.labels.tolist(), strict=True):
        image[:, 2 * label:2 * label + 2, :18] = 200
    data.images[:, 0, 18:, 18:] = 0
    config = short(nc_steps=400, nc_batch_size=8)
    triggers = neural_cleanse.reverse(Weak(), data, config)
    assert triggers.norms.argmin() == 3
    assert neural_cleanse.outliers(triggers)[0] == 3
    assert triggers.success[3] > 0.9
    corner = triggers.masks[3, 0, 18:, 18:].sum()
    assert corner > 0.5 * triggers.norms[3]
    again = neural_cleanse.reverse(Weak(), data, config, labels=[3])
    assert again.norms[0] == pytest.approx(triggers.norms[3].item(), rel=0.5)
    assert linf_pruning.smallest(triggers).labels == [3]


def test_the_weight_of_the_mask_follows_the_success():
    weight, above, below = torch.ones(2), torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    good = torch.tensor([True, False])
    for k in range(1, 11):
        weight, above, below = neural_cleanse.adapted(weight, above, below, good)
        assert weight.tolist() == pytest.approx([1.5 ** (k // 5), 1.5 ** (-1.5 * (k // 5))]), k
    weight, above, below = neural_cleanse.adapted(torch.ones(2), torch.tensor([4, 4]), torch.tensor([0, 0]), ~good)
    assert weight.tolist() == [1, 1.5], "a streak that breaks is over"
    assert (above.tolist(), below.tolist()) == ([0, 0], [1, 0])


def test_whole_sets_are_stamped_in_parts():
    images = torch.randint(0, 256, (2100, 3, 4, 4), dtype=torch.uint8)
    triggers = neural_cleanse.Triggers([3, 4], torch.rand(2, 1, 4, 4), torch.rand(2, 3, 4, 4), torch.ones(2))
    assert torch.equal(triggers.stamp(images, 1), triggers.stamp_some(images, 1))
    each = torch.arange(2100) % 2
    assert torch.equal(triggers.stamp(images, each), triggers.stamp_some(images, each))
    assert triggers.stamp(images[:0], 1).shape == (0, 3, 4, 4)


def test_reversed_triggers_are_kept_for_the_same_data_only(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    searched = []

    def reverse(model, data, config, progress=None):
        searched.append(data.n_classes)
        return neural_cleanse.Triggers([0], torch.rand(1, 1, 16, 16), torch.rand(1, 3, 16, 16), torch.ones(1))

    monkeypatch.setattr(neural_cleanse, "reverse", reverse)
    data, fewer = toy(), toy()
    fewer.classes = fewer.classes[:5]
    for model in (network(), network().bfloat16()):
        first, again = (neural_cleanse.reversed_before(model, data, short(save=True)) for _ in range(2))
        assert torch.equal(first.masks, again.masks)
    assert searched == [10, 10]
    neural_cleanse.reversed_before(network(), fewer, short(save=True))
    assert searched == [10, 10, 5]
    hooked = network()  # the same weights, other answers
    hooked.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 5,))
    neural_cleanse.reversed_before(hooked, data, short(save=True))
    assert searched == [10, 10, 5, 10]


def test_neural_cleanse_keeps_the_smallest_mask_that_reached_99_percent():
    hits = neural_cleanse.CHECK_EVERY * torch.tensor([0.5, 0.98, 0.995, 1.0])
    good, better = neural_cleanse.judged(hits, torch.tensor([1.0, 1.0, 9.0, 4.0]), torch.tensor([9.0, 9.0, 8.0, 5.0]))
    assert good.tolist() == [False, False, True, True]
    assert better.tolist() == [False, False, False, True]


def test_a_reversed_trigger_is_stamped_under_the_true_label_on_its_share():
    data = toy(50)
    triggers = neural_cleanse.Triggers([3], torch.zeros(1, 1, 16, 16), torch.ones(1, 3, 16, 16), torch.ones(1))
    triggers.masks[0, 0, 2, 2] = 1
    stamped = triggers.stamp(data.images, 0)
    assert (stamped[:, :, 2, 2] == 255).all()
    assert (stamped != data.images).flatten(1).sum(1).max() <= 3
    restamped = neural_cleanse.Restamped(data, triggers, [0], 0.2, 1)
    assert (restamped.kind >= 0).sum() == 10
    out = restamped.stamped(data.images, torch.arange(50))
    changed = (out != data.images).flatten(1).any(1)
    assert torch.equal(out[restamped.kind >= 0], stamped[restamped.kind >= 0])
    assert not changed[restamped.kind < 0].any()
    assert torch.equal(restamped.labels, data.labels)


def test_neural_cleanse_as_mitigation(planted, monkeypatch):
    found = neural_cleanse.Triggers([3], torch.rand(1, 1, 16, 16), torch.rand(1, 3, 16, 16), torch.ones(1))
    monkeypatch.setattr(neural_cleanse, "reverse", lambda *_, **__: found)
    monkeypatch.setattr(neural_cleanse, "outliers", lambda *_: [0])
    model = network()
    erased = neural_cleanse.erase(model, toy(), short())
    assert any(not torch.equal(v, erased.state_dict()[k]) for k, v in model.state_dict().items())
    pruned, data, trigger = planted
    monkeypatch.setattr(neural_cleanse, "reversed_before", lambda *_: trigger)
    erased = neural_cleanse.erase(pruned, data, short(nc_mitigation="prune", prune_drop=100.0, held_out=0.5))
    assert [k for k in range(12) if not erased.conv.weight[k].any()] == [7]
    assert neural_cleanse.success(erased, data, trigger, 0) < 5
    monkeypatch.setattr(neural_cleanse, "reversed_before", lambda *_: found)
    monkeypatch.setattr(neural_cleanse, "outliers", lambda *_: [])
    same = neural_cleanse.erase(model, toy(), short())
    assert all(torch.equal(v, same.state_dict()[k]) for k, v in model.state_dict().items())


def test_neural_cleanse_needs_labels_to_compare():
    with pytest.raises(UserError, match="2 are too few"):
        neural_cleanse.check(network(), toy(8, 2), short())


# --------------------------------------------------------------------------------------------------------------- STRIP


def test_entropies_by_hand():
    class Always(nn.Module):
        def __init__(self, logits):
            super().__init__()
            self.logits = nn.Parameter(torch.tensor(logits))

        def forward(self, x):
            return self.logits.expand(len(x), -1)

    images = toy(6).images
    assert strip.entropies(Always([0.0, 0.0, 200.0]), images, images).tolist() == [0] * 6
    assert strip.entropies(Always([1.0] * 8), images, images[:2]).tolist() == pytest.approx([3.0] * 6)  # bits
    assert strip.entropies(Always([0.0, 0.0, -200.0]), images, images[:1]).tolist() == pytest.approx([1.0] * 6)


def test_what_is_superimposed_is_added_and_clipped():
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x):
            seen.append(x)
            return x.flatten(1)[:, :2]

    seen = []
    images = torch.tensor([100, 200], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 4, 4)
    strip.entropies(Mean(), images, torch.full((1, 3, 4, 4), 100, dtype=torch.uint8))
    assert [x.unique().item() * 255 for x in seen] == pytest.approx([200, 255])


def test_auroc_by_hand():
    clean, triggered = torch.tensor([3.0, 2.0, 1.0]), torch.tensor([0.0, 1.0])
    assert strip.auroc(clean, triggered) == pytest.approx((3 + 2.5) / 6)
    assert strip.auroc(clean, clean) == pytest.approx(0.5)


def small_transformer():
    torch.manual_seed(0)
    vit = models.VisionTransformer(image_size=16, patch_size=4, num_layers=3, num_heads=2, hidden_dim=16, mlp_dim=16,
                                   num_classes=10)
    nn.init.normal_(vit.heads.head.weight)
    vit.feature_layers = tuple(f"encoder.layers.encoder_layer_{k}" for k in range(3))
    return vit.eval()


def test_i_bau_differentiates_attention_twice():
    model = small_transformer()
    erased = ibau.erase(model, toy(), short())
    assert not torch.equal(erased.heads.head.weight, model.heads.head.weight)


def test_grad_cam_of_a_transformer_looks_before_the_last_block():
    model = small_transformer()
    images = to_float(toy(4).images)
    assert not grad_cam(model, images, model.feature_layers[-1])[0].any(), "only the class token is read there"
    assert deepest(model, images, model.feature_layers) == model.feature_layers[1]


def test_grad_cam_of_a_linear_model_in_closed_form():
    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1, bias=False)
            self.fc = nn.Linear(4, 2, bias=False)

        def forward(self, x):
            return self.fc(self.conv(x).mean((2, 3)))

    torch.manual_seed(0)
    model, x = Linear(), torch.rand(5, 3, 6, 6)
    maps, classes = grad_cam(model, x.clone(), "conv")
    features = model.conv(x).detach()
    assert torch.equal(classes, model(x).argmax(1))
    expected = torch.einsum("nc,nchw->nhw", model.fc.weight[classes] / 36, features).clamp(min=0)
    assert torch.allclose(maps, expected, atol=1e-6)
    assert all(p.grad is None for p in model.parameters())


def test_grad_cam_and_strip_take_a_torchvision_model():
    torch.manual_seed(0)
    model, images = build("torchvision:resnet18", 10, image_size=32).eval(), toy(6, size=32).images
    maps, classes = grad_cam(model, to_float(images), "layer2")
    assert maps.shape == (6, 4, 4) and (maps >= 0).all() and maps.any()
    assert torch.equal(classes, model(to_float(images)).argmax(1))
    found = strip.entropies(model, images, images[:3])
    mixed = (images[0].int() + images[:3].int()).clamp(max=255).byte()
    p = model(to_float(mixed)).softmax(1)
    assert found.shape == (6,)
    assert found[0].item() == pytest.approx(-(p * p.log2()).sum(1).mean().item(), rel=1e-4)


# ----------------------------------------------------------------------------------------------------------------- GPU


def test_what_defenses_compute_stays_on_a_gpu_without_waiting_for_it():
    """Tensors without content stand in for a GPU: a wrong device, or an answer that is waited for, raises.

    Gradients and copies of networks need a real one and are not among this.
    """
    with FakeTensorMode(), torch.device("cuda"):
        model = build("WRN-10-1", 10).train()
        images, labels = torch.rand(8, 3, 16, 16), torch.zeros(8, dtype=torch.int64)
        value, logits = sage.SADLoss([("block1", "block2")], [1.0])(model, images, labels)
        assert value.device.type == logits.device.type == "cuda"
        triggers = neural_cleanse.Triggers([3], torch.rand(1, 1, 16, 16), torch.rand(1, 3, 16, 16), None)
        assert triggers.stamp(torch.zeros(8, 3, 16, 16, dtype=torch.uint8), 0).device.type == "cuda"
