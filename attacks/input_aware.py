"""Input-aware dynamic backdoor (Nguyen and Tran 2020, arXiv 2010.08138): every image gets a trigger of its own.

Two small generators look at the image: one gives where (mask), one what (pattern); the triggered image is
``x + mask (pattern - x)``. The mask generator is trained first, for masks that are sparse (``--mask_density``) and
differ from image to image. Then pattern generator and classifier are trained together: in each batch a share
``--inject_portion`` carries its own trigger and the target label, a share ``--cover_portion`` carries the trigger of
another image and its own label (cross-trigger), and a diversity loss keeps patterns of different images apart.

Weights 1 and 100, density 0.032 [the authors' code]; generators of 16 to 64 channels, 200 steps for the mask generator,
its density counted over the image as a whole, and one optimiser for generator and classifier [ours].
"""

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from attacks.base import MIX, Trigger, draw, positions, register, to_uint8
from config import UserError
from utils.checkpoint import cached
from utils.data import to_float

MASK_STEPS, MASK_BATCH, MASK_RATE, DENSITY_WEIGHT = 200, 64, 0.01, 100.0
LENDERS = 1000


class Generator(nn.Module):
    """Encoder and decoder over three resolutions: ``(N, C, H, W)`` in [0, 1] -> ``(N, out, H, W)``, unbounded."""

    def __init__(self, channels, out, width=16):
        super().__init__()

        def block(a, b):
            return nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.GroupNorm(4, b), nn.ReLU())

        self.down1, self.down2 = block(channels, width), block(width, 2 * width)
        self.middle = block(2 * width, 4 * width)
        self.up2, self.up1 = block(4 * width, 2 * width), block(2 * width, width)
        self.out = nn.Conv2d(width, out, 3, padding=1)

    def forward(self, x):
        a = self.down1(2 * x - 1)
        b = self.down2(F.max_pool2d(a, 2))
        c = self.middle(F.max_pool2d(b, 2))
        b = b + self.up2(F.interpolate(c, size=b.shape[2:], mode="bilinear", align_corners=False))
        a = a + self.up1(F.interpolate(b, size=a.shape[2:], mode="bilinear", align_corners=False))
        return self.out(a)


class Generators(nn.Module):
    """Mask and pattern for a batch of images in [0, 1]."""

    def __init__(self, channels):
        super().__init__()
        self.where, self.what = Generator(channels, 1), Generator(channels, channels)
        nn.init.constant_(self.where.out.bias, 0.5)  # where the threshold is: elsewhere it has no gradient

    def mask(self, x):
        """(N, 1, H, W) in (0, 1), nearly binary."""
        return torch.tanh(20 * self.where(x).float() - 10) / 2 + 0.5

    def pattern(self, x):
        """(N, C, H, W) in (0, 1)."""
        return torch.sigmoid(2 * self.what(x).float())


def diversity(inputs_1, inputs_2, outputs_1, outputs_2):
    """Mean over pairs of the distance of the inputs over the distance of what the generator makes of them."""
    def distance(a, b):
        return (a - b).square().flatten(1).mean(1).add(1e-12).sqrt()

    return (distance(inputs_1, inputs_2) / (distance(outputs_1, outputs_2) + 1e-3)).mean()


class Joint(nn.Module):
    """The classifier with the generators beside it; called, it is the classifier."""

    def __init__(self, classifier, generators):
        super().__init__()
        self.classifier, self.generators = classifier, generators

    def forward(self, x):
        return self.classifier(x)


@register("inputAwareTrigger")
class InputAwareTrigger(Trigger):
    uses = ("diversity_weight", "mask_density")
    cover_share = 1.0
    joint = True

    def __init__(self, shape, opt, state=None):
        super().__init__(shape, opt)
        if opt.target_type not in ("all2one", "all2all"):
            raise UserError(f"--trigger_type inputAwareTrigger: --target_type all2one or all2all is allowed, "
                            f"got {opt.target_type!r}")
        self.cross_portion = opt.inject_portion if opt.cover_portion < 0 else opt.cover_portion
        if opt.inject_portion + self.cross_portion > 1:
            raise UserError(f"--inject_portion {opt.inject_portion}, --cover_portion {self.cross_portion}: together "
                            f"they must not exceed 1 for --trigger_type inputAwareTrigger")
        if min(self.shape[1:]) < 4:
            raise UserError("--trigger_type inputAwareTrigger: needs images of at least 4 x 4 pixels")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(draw(opt, self.name).initial_seed())  # not the GPU's
            self.generators = Generators(self.shape[0])
        self.trained = bool(state)
        if state:
            try:
                self.generators.load_state_dict(state)
            except (RuntimeError, TypeError, AttributeError):
                raise UserError("the checkpoint's trigger is not a generator for these images") from None
            if not all(torch.isfinite(p).all() for p in self.generators.parameters()):
                raise UserError("the checkpoint's generator holds weights that are not finite")
        for p in self.generators.where.parameters():
            p.requires_grad_(False)

    @torch.no_grad()
    def __call__(self, images, indices=None, part=None):
        self.ready(images)
        out = []
        for batch in images.split(max(1, 1_000_000 // images[:1].numel() * 3) if len(images) else 1):
            x = to_float(batch)
            out.append(to_uint8(255 * torch.lerp(x, self.generators.pattern(x), self.generators.mask(x))).contiguous())
        return torch.cat(out) if out else images.clone()

    @torch.no_grad()
    def cover(self, images, indices, gen):
        """On each image the trigger of another, one of ``lenders``."""
        self.ready(images)
        x = to_float(images)
        other = to_float(self.lenders[positions(images, indices) * MIX % 2**32 % len(self.lenders)])
        return to_uint8(255 * torch.lerp(x, self.generators.pattern(other), self.generators.mask(other))).contiguous()

    def see(self, images):
        """Train the mask generator on ``images``, unless that is done, and keep some that lend their triggers."""
        self.to(images.device)
        chosen = torch.randperm(len(images), generator=draw(self.opt, self.name, "lenders"))[:LENDERS]
        self.lenders = images[chosen.to(images.device)]
        if self.trained:
            return
        key = (self.shape, self.opt.trigger_seed, self.opt.mask_density, len(images),
               images.sum(dtype=torch.int64).item(), MASK_STEPS, MASK_BATCH, MASK_RATE, DENSITY_WEIGHT)
        state = cached("input-aware-mask", key, lambda: self.learn_mask(images))
        self.generators.where.load_state_dict(state)

    def learn_mask(self, images):
        where, gen = self.generators.where, draw(self.opt, self.name, "mask")
        for p in where.parameters():
            p.requires_grad_(True)
        adam = torch.optim.Adam(where.parameters(), lr=MASK_RATE, betas=(0.5, 0.9))
        for _ in tqdm(range(MASK_STEPS), "mask generator", leave=False, disable=None):
            chosen = torch.randint(0, len(images), (2, MASK_BATCH), generator=gen).to(images.device)
            x1, x2 = to_float(images[chosen[0]]), to_float(images[chosen[1]])
            m1, m2 = self.generators.mask(x1), self.generators.mask(x2)
            over = F.relu(m1.mean((1, 2, 3)) - self.opt.mask_density).mean()
            loss = DENSITY_WEIGHT * over + diversity(x1, x2, m1, m2)
            adam.zero_grad()
            loss.backward()
            adam.step()
        where.zero_grad()
        for p in where.parameters():
            p.requires_grad_(False)
        return {k: v.detach().cpu() for k, v in where.state_dict().items()}

    def network(self, model, n_classes):
        self.n_classes, self.trained = n_classes, True
        return Joint(model, self.generators)

    def loss(self, joint, images, labels):
        """Cross-entropy of triggered, cross-triggered and clean images, plus the diversity of the patterns."""
        generators, b = joint.generators, len(images)
        n = int(self.opt.inject_portion * b + torch.rand(()).item())  # what is left of a whole image: now and then one
        m = min(int(self.cross_portion * b + torch.rand(()).item()), b - n)
        k = n + m
        seen = torch.cat([images[-1:], images[:k]])  # an image's neighbour lends its trigger: image i has seen[i]
        pattern, mask = generators.pattern(seen), generators.mask(seen)
        triggered = torch.lerp(images[:n], pattern[1:n + 1], mask[1:n + 1])
        crossed = torch.lerp(images[n:k], pattern[n:k], mask[n:k])
        batch = torch.cat([triggered, crossed, images[k:]]).contiguous(memory_format=torch.channels_last)
        wanted = labels.clone()
        wanted[:n] = self.labels(labels[:n], None, self.n_classes)
        logits = joint.classifier(batch)
        loss = F.cross_entropy(logits, wanted)
        if k:
            loss = loss + self.opt.diversity_weight * diversity(seen[1:], seen[:-1], pattern[1:], pattern[:-1])
        return loss, logits

    def state(self):
        return {k: v.cpu() for k, v in self.generators.state_dict().items()}
