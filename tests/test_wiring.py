"""From the options to the formulas: every option reaches what it names, on the part of the data that it should."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_defenses import Planted, network, short, toy
from torch import nn

import defenses
import detect
import main
import strip
from at import at_loss
from config import DetectConfig, EraseConfig, as_dict
from defenses import anp, fine_pruning, ibau, linf_pruning, mcr, nad, neural_cleanse, pruning, sage
from defenses.finetune import TRAINING
from models import Features
from utils.channels import split_off
from utils.data import TensorData, to_float
from utils.engine import clone, fit

OPTIONS = [{}, {"p": 3.0}, {"attention": "max"}, {"attention": "mean", "p": 1.0}, {"at_loss": "paper"}]


def spied(monkeypatch, module, name="fit"):
    """[(arguments, named ones)] of the calls of ``module``'s function ``name``, which then runs."""
    calls, own = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args, **named: calls.append((args, named)) or own(*args, **named))
    return calls


def triggers(labels=(3,), size=16):
    """``Triggers`` of white pixels: number k in column k of the first row."""
    masks = torch.zeros(len(labels), 1, size, size)
    for k in range(len(labels)):
        masks[k, 0, 0, k] = 1
    return neural_cleanse.Triggers(list(labels), masks, torch.ones(len(labels), 3, size, size), torch.ones(len(labels)))


def same(a, b):
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def test_a_rule_of_the_losses_sets_the_rate_of_the_next_epoch():
    class Slope(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

    def loss(model, images, labels):
        return model.weight * 1.0, F.one_hot(labels, 10).float()

    asked = []

    def rule(losses):
        asked.append(len(losses))
        return 0.5 ** len(losses)

    model = fit(Slope(), loss, nad.clean_batches(toy(), short(batch_size=64), "x"), epochs=3, lr=0.1, lr_schedule=rule,
                momentum=0.0, nesterov=False, weight_decay=0.0, seed=0, stage="x")
    assert asked == [0, 1, 2]
    assert model.weight.item() == pytest.approx(-0.1 * (1 + 0.5 + 0.25))


@pytest.mark.parametrize("options", OPTIONS)
def test_the_attention_options_reach_the_losses_of_nad_and_sage(options):
    student, teacher, data = network(0), network(1), toy(8)
    images, labels, layers = to_float(data.images), data.labels, ["block1", "block2", "block3"]
    with Features(student, layers) as own, Features(teacher, layers) as others, torch.no_grad():
        plain = F.cross_entropy(student(images), labels)
        teacher(images)
        own, others = own.outputs(), others.outputs()
    named = {"p": options.get("p", 2.0), "attention": options.get("attention", "sum"),
             "form": options.get("at_loss", "demo")}
    config = short(beta1=2e3, beta2=3e4, beta3=4e5, sage_beta=5e3, **options)
    expected = sum(b * at_loss(s, t, **named) for b, s, t in zip((2e3, 3e4, 4e5), own, others, strict=True))
    found = nad.make_loss(student, teacher, config)(student, images, labels)[0] - plain
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    expected = sum(5e3 * at_loss(deep, shallow, **named) for shallow, deep in itertools.pairwise(own))
    found = sage.make_loss(student, config)(student, images, labels)[0] - plain
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)


def test_teacher_and_student_have_rates_schedules_and_epochs_of_their_own(monkeypatch):
    from defenses import finetune

    teachers, students = spied(monkeypatch, finetune), spied(monkeypatch, nad)
    nad.erase(network(), toy(), short(lr=0.011, ft_lr=0.5, epochs=2, lr_schedule="cosine", teacher_lr=0.013,
                                      teacher_epochs=1, teacher_lr_schedule="linear"))
    ((_, teacher),), ((_, student),) = teachers, students
    assert (teacher["lr"], teacher["epochs"], teacher["lr_schedule"]) == (0.013, 1, "linear")
    assert (student["lr"], student["epochs"], student["lr_schedule"]) == (0.011, 2, "cosine")


def test_fine_pruning_tunes_at_the_rate_of_fine_tuning(monkeypatch):
    calls = spied(monkeypatch, fine_pruning)
    fine_pruning.erase(network(), toy(), short(lr=0.5, ft_lr=0.012, lr_schedule="tenths"))
    ((_, named),) = calls
    assert (named["lr"], named["lr_schedule"]) == (0.012, "tenths")


def test_pruning_counts_accuracy_on_the_held_out_part(monkeypatch):
    calls, data = spied(monkeypatch, pruning, "accuracy"), toy()
    pruning.erase(network(), data, short(held_out=0.5))
    held = split_off(data, 0.5, short().seed)[1]
    assert len(calls) > 1
    assert all(torch.equal(part.images, held.images) for (_, part), _ in calls)


def test_pruning_stops_at_the_floor_below_the_whole_network(monkeypatch):
    """The accuracies of the whole network, which sets the floor, and of 1, 2, 3 pruned channels."""
    for answers, left in (([80.0, 79.0, 76.0, 74.9], 2), ([90.0, 79.0], 0), ([80.0, 75.0, 75.0, 75.0, 60.0], 3)):
        told = iter(answers)
        monkeypatch.setattr(pruning, "accuracy", lambda *_, told=told: next(told))
        assert len(pruning.dormant(network(), toy(), short(prune_drop=5.0))[1]) == left
        assert next(told, None) is None


@pytest.mark.parametrize(("norm", "channel"), [("linf", 2), ("l1", 5), ("l2", 9)])
def test_linf_pruning_follows_its_norm_and_the_smallest_trigger(monkeypatch, norm, channel):
    torch.manual_seed(0)
    model, data, used = Planted(), toy(60), []
    found = triggers((4, 3, 6))
    found.norms = torch.tensor([9.0, 1.0, 5.0])
    orders = {name: -(torch.arange(12.0) - c).abs() for name, c in (("linf", 2), ("l1", 5), ("l2", 9))}
    monkeypatch.setattr(linf_pruning, "reversed_before", lambda *_: found)
    monkeypatch.setattr(linf_pruning, "raised", lambda m, layer, images, t, which: used.append(t.labels) or orders)
    monkeypatch.setattr(linf_pruning, "choose", lambda *_: 1)
    counted = spied(monkeypatch, linf_pruning, "success")
    erased = linf_pruning.erase(model, data, short(linf_norm=norm, held_out=0.5))
    assert [k for k in range(12) if not erased.conv.weight[k].any()] == [channel]
    assert used == [[3]]
    held = split_off(data, 0.5, short().seed)[1]
    assert counted
    assert all(torch.equal(args[1].images, held.images) for args, _ in counted)


def test_unlearning_sees_the_reversed_trigger_under_true_labels(monkeypatch):
    data = toy()
    data.images[:, :, 0, 0] = 0
    data.images[:, 0, 8, 8] = data.labels.to(torch.uint8)  # which image it is
    monkeypatch.setattr(neural_cleanse, "reversed_before", lambda *_: triggers())
    monkeypatch.setattr(neural_cleanse, "outliers", lambda *_: [0])
    calls = spied(monkeypatch, neural_cleanse)
    neural_cleanse.erase(network(), data, short(nc_share=0.25, augment=False, cutout=0, lr=0.5, ft_lr=0.014))
    ((args, named),) = calls
    images, labels = (torch.cat(parts) for parts in zip(*args[2].epoch(0), strict=True))
    assert (images[:, :, 0, 0] == 1).all(1).sum() == 16
    assert torch.equal((255 * images[:, 0, 8, 8]).round().long(), labels)
    assert named["lr"] == 0.014


def test_pruning_by_reversed_triggers_stops_at_the_floor_and_leaves_its_input(monkeypatch):
    torch.manual_seed(0)
    model, data, seen = Planted(), toy(60), []
    before, answers = clone(model), iter([80.0, 79.0, 76.0, 74.0])
    monkeypatch.setattr(neural_cleanse, "accuracy", lambda m, part: seen.append(part) or next(answers))
    monkeypatch.setattr(neural_cleanse, "success", lambda *_: 100.0)
    erased = neural_cleanse.prune(model, data, short(prune_drop=5.0, held_out=0.5), triggers(), [0])
    assert sum(not erased.conv.weight[k].any() for k in range(12)) == 2
    assert same(model, before)
    held = split_off(data, 0.5, short().seed)[1]
    assert all(torch.equal(part.images, held.images) for part in seen)


def test_the_curve_bends_at_first_in_the_middle_between_the_network_and_its_tuned_version(monkeypatch):
    model, end = network(0), network(1)
    monkeypatch.setattr(mcr, "tune", lambda *_: end)
    starts, calls = [], []
    monkeypatch.setattr(mcr, "fit", lambda bend, loss, *_, **named: starts.append(clone(bend)) or calls.append(
        (loss, named)) or bend)
    bend, other = mcr.curve(model, toy(), short(ft_lr=0.015, lr=0.5, mcr_epochs=7))
    ((loss, named),) = calls
    assert other is end
    for name, w in mcr.weights(model).items():
        assert torch.equal(loss.w_0[name], w)
        assert torch.equal(loss.w_1[name], end.get_parameter(name))
        assert torch.allclose(starts[0].get_parameter(name), (w + end.get_parameter(name)) / 2)
    assert not same(bend, model)
    assert (named["lr"], named["epochs"]) == (0.015, 7)


@pytest.mark.parametrize("name", ["finetune", "nad", "sage", "ftsam", "fine_pruning", "mcr", "neural_cleanse"])
def test_what_trainings_share_reaches_all_of_them(monkeypatch, name):
    monkeypatch.setattr(neural_cleanse, "reversed_before", lambda *_: triggers())
    monkeypatch.setattr(neural_cleanse, "outliers", lambda *_: [0])
    modules = {defenses.get("finetune"), defenses.get(name)}
    calls = [spied(monkeypatch, module) for module in modules if hasattr(module, "fit")]
    wanted = {"freeze_bn": name != "mcr", "precise_bn": True, "momentum": 0.5, "weight_decay": 0.01, "seed": 7}
    defenses.get(name).erase(network(), toy(), short(**wanted))
    found = [{option: named[option] for option in wanted} for each in calls for _, named in each]
    assert found and all(each == wanted for each in found)


@pytest.mark.parametrize("name", defenses.NAMES)
def test_a_defense_says_which_options_it_reads(monkeypatch, name):
    read = set()

    class Watched(EraseConfig):
        def __getattribute__(self, key):
            read.add(key)
            return super().__getattribute__(key)

    monkeypatch.setattr(neural_cleanse, "reversed_before", lambda *_: triggers())
    monkeypatch.setattr(linf_pruning, "reversed_before", lambda *_: triggers())
    monkeypatch.setattr(neural_cleanse, "outliers", lambda *_: [0])
    config = Watched(**{k: v for k, v in as_dict(short()).items() if k != "script"})
    for mitigation in ("prune", "unlearn"):
        config.nc_mitigation = mitigation
        defenses.get(name).erase(network(), toy(), config)
    said, others = defenses.reads(name), set().union(*map(defenses.reads, defenses.NAMES))
    assert read & others <= said
    assert said & {*TRAINING, "nc_share", "nc_mitigation"} <= read


def test_the_options_of_anp(monkeypatch):
    calls = spied(monkeypatch, anp)
    anp.learn_masks(network(), toy(), short(anp_alpha=0.3, anp_eps=0.1, anp_steps=7, anp_batch_size=32, freeze_bn=True))
    ((args, named),) = calls
    masks, loss, batches = args
    assert (loss.alpha, loss.eps, masks.freeze_bn, len(batches)) == (0.3, 0.1, True, 2)
    assert named["epochs"] == 4, "7 steps, 2 an epoch"


def test_anp_clips_its_masks_before_each_step():
    masks, data = anp.Masks(clone(network())), toy(8)
    with torch.no_grad():
        masks.masks[0].fill_(1.5)
        masks.masks[1].fill_(-0.5)
    anp.MaskLoss(0.2, 0.1)(masks, to_float(data.images), data.labels)
    assert (masks.masks[0] == 1).all()
    assert (masks.masks[1] == 0).all()


def test_i_bau_unlearns_the_perturbation_of_its_own_predictions(monkeypatch):
    model, data, config = network(), toy(), short(ibau_inner_lr=1.0, ibau_rounds=1)
    used = spied(monkeypatch, ibau, "hypergradient")
    ibau.erase(model, data, config)
    assert used
    assert all(args[3].abs().max() > 1e-3 for args, _ in used)
    predicted, others = toy(), toy()
    predicted.labels = model(to_float(data.images)).argmax(1)
    others.labels = (predicted.labels + 1) % 10
    one, two = (ibau.find_perturbation(model, d, config, torch.Generator().manual_seed(1)) for d in (predicted, others))
    assert torch.equal(one, two), "labels are not looked at"


def test_the_anomaly_index_of_an_even_number_and_who_counts_as_an_outlier():
    # median of 2, 9, 11, 100 is 10; deviations 8, 1, 1, 90, their median 4.5
    index = neural_cleanse.anomaly_indices(torch.tensor([2.0, 9.0, 11.0, 100.0]))
    assert index.tolist() == pytest.approx([v / (1.4826 * 4.5) for v in (8, 1, -1, -90)])
    found = triggers(range(7))
    found.norms = torch.tensor([10.0, 9.0, 11.0, 12.0, 2.0, 1.0, 60.0])
    assert neural_cleanse.outliers(found) == [5, 4], "smallest first, not the large one"
    found.success[5] = 0.4
    assert neural_cleanse.outliers(found) == [4], "not one whose trigger does not work"


def test_more_labels_than_go_in_one_optimisation():
    data = toy(classes=12)
    found = neural_cleanse.reverse(nn.Sequential(nn.Flatten(), nn.Linear(768, 12)), data, short(nc_steps=2))
    assert found.labels == list(range(12))
    assert found.masks.shape == (12, 1, 16, 16)
    assert found.success.shape == found.norms.shape == (12,)


def test_the_weight_of_the_mask_is_what_the_rule_gives(monkeypatch):
    torch.manual_seed(0)
    model, data, config = nn.Sequential(nn.Flatten(), nn.Linear(768, 10)), toy(), short(nc_steps=40)
    plain = neural_cleanse.reverse(model, data, config)
    monkeypatch.setattr(neural_cleanse, "adapted", lambda weight, above, below, good: (weight + 100, above, below))
    heavy = neural_cleanse.reverse(model, data, config)
    assert (heavy.norms < 0.8 * plain.norms).all()


def test_strip_takes_overlays_and_threshold_from_the_clean_subset(monkeypatch):
    def full(value):
        return TensorData(torch.full((6, 1, 2, 2), value, dtype=torch.uint8), torch.zeros(6, dtype=torch.int64), "a")

    seen = []

    def entropies(model, images, overlays, bar):
        seen.append((images.unique().item(), overlays.unique().item()))
        return torch.arange(float(len(images)))

    monkeypatch.setattr(strip, "entropies", entropies)
    subject = SimpleNamespace(clean=full(1), test=full(2), poisoned_test=full(3), model=None)
    detect.look_at_inputs(subject, DetectConfig(save=False), None)
    assert seen == [(1, 1), (2, 1), (3, 1)]


def test_two_classes_get_strip_alone(capsys):
    subject = SimpleNamespace(clean=toy(8, 2), model=network())
    assert detect.cleanse(subject, DetectConfig(save=False), None) is None
    assert "2 are too few for that: STRIP alone is run" in capsys.readouterr().out


@pytest.mark.parametrize(("options", "text"), [
    ({"defense": "finetune", "lr": 0.5}, "--lr is not used by --defense finetune"),
    ({"defense": "sage", "t_model": "x.tar"}, "--t_model is not used by --defense sage"),
    ({"defense": "nad", "sage_lr": 3.0}, "--sage_lr is not used by --defense nad"),
    ({"defense": "nad", "lr": 0.1, "ft_lr": 0.02}, "the fine-tuning beside it has another learning rate, --ft_lr 0.02"),
    ({"defense": "sage", "lr_schedule": "cosine"}, "--lr_schedule is for the fine-tuning beside, --defense sage"),
    ({"defense": "sage", "lr_schedule": "cosine", "beside": False}, "--lr_schedule is not used by --defense sage"),
    ({"defense": "clp", "epochs": 3, "beside": False}, "--epochs is not used by --defense clp"),
    ({"defense": "anp", "precise_bn": True, "beside": False}, "--precise_bn is not used by --defense anp"),
    ({"defense": "sage", "sage_betas": ["1", "2"], "sage_beta": 3.0}, "--sage_beta does nothing beside --sage_betas"),
    ({"defense": "sage", "sage_rate": "step", "sage_rho": 0.5}, "--sage_rho does nothing with --sage_rate step"),
    ({"defense": "nad", "t_model": "x.tar", "teacher_lr": 0.1}, "--teacher_lr does nothing with --t_model"),
    ({"defense": "neural_cleanse", "prune_drop": 1.0}, "--prune_drop does nothing with --nc_mitigation unlearn"),
    ({"defense": "nad", "at_loss": "paper"}, "--at_loss paper: the betas are meant for the other form"),
    ({"defense": "nad", "cutout": 20}, "--cutout 20: hides a large part of images of 32 pixels"),
    ({"defense": "clp", "cutout": 20}, "--cutout is for the fine-tuning beside"),
    ({"defense": "nad", "at_loss": "paper", "beta1": 0.5}, None),
    ({"defense": "clp", "first": "", "cutout": 9, "clp_u": 2.0}, None),
    ({"defense": "anp", "anp_batch_size": 5000}, "64 clean images are fewer than --anp_batch_size 5000"),
    ({"defense": "mcr", "t_model": "x.tar"}, None), ({"defense": "nad", "lr": 0.02}, None),
    ({"defense": "nad", "lr": 0.1, "beside": False}, None),
    ({"defense": "nad", "first": "clp", "clp_u": 2.0}, None)])
def test_what_an_option_does_not_do_is_said(options, text):
    found = main.notes(EraseConfig(**options), 64, 32)
    if text is None:
        assert not [line for line in found if "_batch_size" not in line]
    else:
        assert any(line.startswith(text) for line in found)


def test_the_threshold_of_strip_is_a_normal_percentile():
    clean = torch.tensor([1.0, 2.0, 3.0])  # mean 2, standard deviation 1
    assert strip.threshold(clean, 0.01) == pytest.approx(2 - 2.326348, abs=1e-5)
    assert strip.threshold(clean, 0.5) == pytest.approx(2)
    assert strip.threshold(torch.zeros(3), 0.01) == 0
    assert math.isfinite(strip.threshold(clean, 1e-6))
