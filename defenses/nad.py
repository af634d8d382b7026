"""Neural Attention Distillation (Li et al., ICLR 2021, arXiv 2101.05930).

    teacher:  the network itself, fine-tuned on the clean subset (or any network, --t_model)
    student:  the network, trained on CE(student(x), y) + sum_l beta_l AT(F_s^l, F_t^l)
    rounds:   from the second on (``--rounds``), the student of the round before is the teacher of a new student

The attention-transfer loss AT is in ``at.py``. The teacher is frozen, in eval mode, and runs without gradient; student
and teacher see the same augmented images, once a step each (twice with ``--student_rho``).
"""

import torch
import torch.nn.functional as F

from at import at_loss
from config import UserError, not_default
from defenses.finetune import clean_batches, recipe, tune
from defenses.ftsam import SAMLoss
from models import Features, check_order, feature_layers, needs_pixels, select_model
from utils.data import to_float
from utils.engine import clone, cross_entropy, fit

USES = ("attention", "teacher")
SIDES = (32, 16, 8)  # of the feature maps that the default betas are meant for


class NADLoss:
    """``loss(student, images, labels) -> (loss, logits)`` with the attention of ``teacher`` at ``layers``.

    ``betas``: one weight a layer; a layer with weight 0 is left out. ``teacher_layers`` default to ``layers``.
    """

    def __init__(self, teacher, layers, betas, p=2.0, attention="sum", form="demo", teacher_layers=None):
        assert len(layers) == len(betas)
        used = [i for i, beta in enumerate(betas) if beta]
        self.layers = [layers[i] for i in used]
        self.teacher_layers = [(teacher_layers or layers)[i] for i in used]
        self.betas = [betas[i] for i in used]
        self.teacher = clone(teacher).eval().requires_grad_(False)
        self.p, self.attention, self.form = p, attention, form
        self.checked = False

    def terms(self, features_s, features_t):
        """The attention losses of the layers, each times its beta."""
        return [beta * at_loss(f_s, f_t, self.p, self.attention, self.form)
                for beta, f_s, f_t in zip(self.betas, features_s, features_t, strict=True)]

    def __call__(self, student, images, labels):
        with Features(student, self.layers) as taken_s, Features(self.teacher, self.teacher_layers) as taken_t:
            logits = student(images)
            with torch.no_grad():
                self.teacher(images)
            features_s, features_t = taken_s.outputs(), taken_t.outputs()
        if not self.checked:
            for layer, f in zip(self.layers + self.teacher_layers, features_s + features_t, strict=True):
                needs_pixels(layer, f)
            self.checked = True
        loss = F.cross_entropy(logits, labels)
        for term in self.terms(features_s, features_t):
            loss = loss + term
        return loss, logits


def betas_for(layers, config):
    """One beta a layer: beta1, beta2, beta3, and beta3 again for any further one."""
    betas = [config.beta1, config.beta2, config.beta3]
    return [betas[min(i, 2)] for i in range(len(layers))]


def make_teacher(model, clean_data, config, progress=None):
    """The teacher: the network in ``config.t_model``, or a copy of ``model`` fine-tuned on ``clean_data``."""
    if not config.t_model:
        return tune(model, clean_data, config, config.teacher_epochs, config.teacher_lr, config.teacher_lr_schedule,
                    "teacher", progress, SAMLoss(config.teacher_rho) if config.teacher_rho else cross_entropy,
                    "teacher_lr")
    channels, size = clean_data.shape[0], clean_data.shape[1]
    try:
        teacher = select_model(config.dataset, config.t_name or config.s_name, True, config.t_model,
                               clean_data.n_classes, in_channels=channels, image_size=size, normalize=config.normalize)
    except UserError as e:
        raise UserError(str(e).replace("--s_name", "--t_name")) from None
    return teacher.to(next(model.parameters()).device)


def make_loss(model, teacher, config):
    """The loss of ``config`` for a student like ``model``."""
    layers = feature_layers(model, config.layers)
    own = layers if config.layers else feature_layers(teacher)
    if len(own) != len(layers):
        raise UserError(f"--t_name {config.t_name}: it has {len(own)} stages, the student {len(layers)}; name layers "
                        f"that both have with --layers")
    return NADLoss(teacher, layers, betas_for(layers, config), config.p, config.attention, config.at_loss, own)


def check(model, clean_data, config):
    """Raise ``UserError`` for layers or a teacher that will not do, before anything is trained."""
    teacher = make_teacher(model, clean_data, config) if config.t_model else model
    student, images = clone(model).eval(), to_float(clean_data.images[:2])
    make_loss(student, teacher, config)(student, images, clean_data.labels[:2])
    check_order(student, feature_layers(model, config.layers), images)


def advice(model, clean_data, config):
    """A line about the betas, if they are the default ones and the feature maps are of another size than theirs."""
    betas, names = [config.beta1, config.beta2, config.beta3], ("beta1", "beta2", "beta3")
    if config.at_loss != "demo" or not {*names}.isdisjoint(not_default(config)):
        return []
    with Features(model, feature_layers(model, config.layers)) as taken, torch.no_grad():
        model(to_float(clean_data.images[:2]))
        sizes = [f.shape[2:] for f in taken.outputs()][:3]
    scaled = [beta * (h * w) / side**2 for beta, (h, w), side in zip(betas, sizes, SIDES, strict=False)]
    if scaled == betas[:len(scaled)]:
        return []
    here = ", ".join(f"{h} x {w}" for h, w in sizes)
    alike = " ".join(f"--{name} {beta:.3g}" for name, beta in zip(names, scaled, strict=False))
    return [f"the default betas are for attention maps of 32 x 32, 16 x 16 and 8 x 8 pixels, here they have {here}: "
            f"the same weight is {alike}"]


def erase(model, clean_data, config, progress=None, teacher=None):
    """Erase the backdoor of ``model`` by attention distillation. Returns the student.

    ``teacher`` defaults to ``make_teacher(...)``: the network in ``config.t_model``, or ``model`` fine-tuned.
    """
    clean_data = clean_data.to(next(model.parameters()).device)
    if teacher is None:
        check(model, clean_data, config)
        teacher = make_teacher(model, clean_data, config, progress)
    for k in range(config.rounds):
        loss = make_loss(model, teacher, config)
        # the batches of fine-tuning, so that what differs between the two is the distillation alone
        teacher = fit(clone(model), SAMLoss(config.student_rho, loss) if config.student_rho else loss,
                      clean_batches(clean_data, config, "finetune"), epochs=config.epochs, lr=config.lr,
                      lr_schedule=config.lr_schedule, stage=f"nad {k + 1}" if k else "nad", progress=progress,
                      **recipe(model, config))
    return teacher
