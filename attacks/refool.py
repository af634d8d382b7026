"""Refool (Liu et al. 2020, arXiv 2007.02343): a reflection is mixed into the image, ``(1 - w) x + w (R * k)``.

Light adds up, so the sum is one of intensities, which are the pixels / 255 to the power of 2.2: the bright parts of a
reflection cover what is behind them, its dark parts hardly show. (Summed as pixels, the same reflections at the same w
attack four times less often.)

Three kinds, drawn per image: in focus (k the identity), out of focus (k a Gaussian) and ghost (k two impulses, shifted
and of different strength, that sum to 1). Candidates for R are photos of a folder (``--reflection_root``) or training
images; of ``--n_candidates`` random ones the ``--n_reflections`` (200 [paper]) brightest are taken. Training and test
draw from the same set, each its own. Meant for ``--target_type cleanLabel``.

The paper selects by the success of repeated trainings. Brightness stands in for that [ours]: of the 200 random
reflections of a network so trained, it was what told the successful ones best (correlation with the success rate 0.63).
The paper's mixing weight varies, here it is fixed (``--reflection_weight``) [ours].
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from attacks.base import MIX, Trigger, checked, draw, in_pieces, positions, register, to_uint8
from config import UserError
from utils.checkpoint import tensor_hash
from utils.data import eight_bits
from utils.files import IMAGE_ENDINGS, images_below

GAMMA = 2.2


def read_photos(folder, shape, count, gen):
    """``count`` random photos below ``folder`` (all if there are fewer), float32 ``(n, C, H, W)``, 0..255."""
    channels, h, w = shape
    if not Path(folder).is_dir():
        raise UserError(f"--reflection_root {folder}: no such folder")
    files = sorted(Path(folder) / path for path in images_below(folder))  # by parts: which are drawn depends on it
    if not files:
        raise UserError(f"--reflection_root {folder}: holds no images ({', '.join(IMAGE_ENDINGS)})")
    photos = []
    for k in torch.randperm(len(files), generator=gen)[:count].tolist():
        try:
            with Image.open(files[k]) as image:
                image = eight_bits(image, channels == 1).resize((w, h), Image.Resampling.BILINEAR)
                photos.append(torch.from_numpy(np.array(image).reshape(h, w, channels).transpose(2, 0, 1).copy()))
        except Exception as e:  # Pillow's decoders raise many kinds on damaged files
            raise UserError(f"--reflection_root {folder}: {files[k]} cannot be read: {e}") from None
    return torch.stack(photos).float()


def out_of_focus(images, sigma):
    """float ``(n, C, H, W)`` blurred by a Gaussian of ``sigma`` (n,) pixels, edges repeated."""
    n, c, h, w = images.shape
    radius = min(int(3 * float(sigma.max()) + 1), h - 1, w - 1)
    at = torch.arange(-radius, radius + 1)
    kernel = torch.exp(-(at**2) / (2 * sigma[:, None] ** 2))
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(c, 0)  # (n C, 2 radius + 1)
    x = F.pad(images, (radius,) * 4, mode="replicate").reshape(1, n * c, h + 2 * radius, w + 2 * radius)
    x = F.conv2d(F.conv2d(x, kernel[:, None, :, None], groups=n * c), kernel[:, None, None, :], groups=n * c)
    return x.reshape(n, c, h, w)


def ghosted(images, shift, strength):
    """float ``(n, C, H, W)``: ``strength x + (1 - strength) x`` moved down and right by ``shift`` (n,) pixels."""
    out = []
    for x, d, a in zip(images, shift.tolist(), strength.tolist(), strict=True):
        moved = F.pad(x[None], (d, 0, d, 0), mode="replicate")[0, :, :x.shape[1], :x.shape[2]]
        out.append(a * x + (1 - a) * moved)
    return torch.stack(out)


def intensity(pixels):
    """Pixels, 0..255, to intensities, 0..1."""
    return (pixels.float() / 255) ** GAMMA


def pixels(intensities):
    """The inverse of ``intensity``, rounded to uint8."""
    return to_uint8(255 * intensities.clamp(min=0) ** (1 / GAMMA))


@register("refoolTrigger")
class RefoolTrigger(Trigger):
    uses = ("reflection_root", "reflection_weight", "n_candidates", "n_reflections")

    def __init__(self, shape, opt, state=None):
        super().__init__(shape, opt)
        self.bank, self.given = None, state
        if opt.n_reflections > opt.n_candidates:
            raise UserError(f"--n_reflections {opt.n_reflections}: they are chosen among --n_candidates "
                            f"{opt.n_candidates}, which are fewer")
        gen = draw(opt, self.name)
        if opt.reflection_root:
            self.build(read_photos(opt.reflection_root, self.shape, opt.n_candidates, gen), gen)

    def see(self, images):
        if self.bank is None:
            gen = draw(self.opt, self.name)
            candidates = torch.randperm(len(images), generator=gen)[:self.opt.n_candidates]
            self.build(images[candidates.to(images.device)].cpu().float(), gen)

    def build(self, photos, gen):
        """Choose among ``photos``, float32 ``(n, C, H, W)``, 0..255, and make ``bank``: every reflection in its three
        kinds, uint8 ``(3 n, C, H, W)``; ``table``, uint8 ``(65536,)``, has at 256 x + r what pixel x looks like behind
        pixel r of a reflection.
        """
        brightness = intensity(photos).mean((1, 2, 3))
        photos = photos[brightness.argsort(descending=True, stable=True)[:self.opt.n_reflections]]
        self.photos_hash = torch.tensor(list(bytes.fromhex(tensor_hash(photos.to(torch.uint8)))))
        if self.given and not torch.equal(checked(self.given, "photos", (32,)), self.photos_hash.to(torch.uint8)):
            raise UserError("--trigger_type refoolTrigger: these are not the reflections that the network was trained "
                            "with; they come from the training images (--dataset, --data_root, --train_size) or from "
                            "--reflection_root")
        n, scale = len(photos), max(self.shape[1:]) / 32
        sigma = scale * (1 + 2 * torch.rand(n, generator=gen))
        shift = (scale * (1 + 2 * torch.rand(n, generator=gen))).round().long().clamp(1, min(self.shape[1:]) - 1)
        strength = 0.6 + 0.25 * torch.rand(n, generator=gen)
        light = intensity(photos)
        kinds = torch.cat([light, out_of_focus(light, sigma), ghosted(light, shift, strength)])
        self.bank = pixels(kinds).to(self.device)
        level = intensity(torch.arange(256))
        self.table = pixels(torch.lerp(level[:, None], level, self.opt.reflection_weight)).flatten().to(self.device)

    def state(self):
        """The hash of the reflections: they are images of the data set, which a checkpoint should not carry."""
        return {"photos": self.photos_hash.to("cpu", torch.uint8)}

    def mixed(self, images, indices, salt):
        if self.bank is None:
            raise UserError("--trigger_type refoolTrigger: needs images to reflect: --reflection_root, or "
                            "trigger.see(training images)")
        self.ready(images)
        k = (positions(images, indices) + salt) * MIX % 2**32 % len(self.bank)
        return in_pieces(self.behind, images, k)

    def behind(self, images, k):
        """``images`` behind the reflections number ``k``, int64 ``(N,)``."""
        pairs = images.int().mul_(256).add_(self.bank[k])
        return self.table.index_select(0, pairs.flatten()).view(images.shape)

    def __call__(self, images, indices=None, part=None):
        return self.mixed(images, indices, 1_000_003)

    def poison(self, images, indices):
        return self.mixed(images, indices, 0)
