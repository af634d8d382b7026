"""shapes10: a generated data set of ten shapes, for trying everything out without a download.

Images are 32 x 32 RGB. A shape of random colour, place, size and rotation lies on a textured background with clutter
(short strokes) and pixel noise; one shape in twenty is faint. The classes differ in outline only, never in colour,
place or size. The same seed and size give the same images.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np

CLASSES = ("circle", "ring", "semicircle", "triangle", "square", "pentagon", "star", "cross", "bar", "crescent")
SIZE = 32
BLOCK = 5000  # images drawn from one random stream


def polygon(u, v, radius, corners):
    """Signed distance (approximate, in pixels, negative inside) to a regular polygon with circumradius ``radius``."""
    angle = np.arctan2(v, u)
    sector = 2 * np.pi / corners
    folded = np.mod(angle, sector) - sector / 2
    return np.hypot(u, v) * np.cos(folded) - radius * np.cos(sector / 2)


def star(u, v, radius):
    """Signed distance (approximate) to a five-pointed star."""
    sector = 2 * np.pi / 5
    folded = np.abs(np.mod(np.arctan2(v, u), sector) - sector / 2)  # 0 at an inner corner, sector / 2 at a tip
    r = np.hypot(u, v)
    x, y = r * np.cos(folded), r * np.sin(folded)
    inner = 0.42 * radius
    tip_x, tip_y = radius * np.cos(sector / 2), radius * np.sin(sector / 2)
    dx, dy = tip_x - inner, tip_y  # the edge runs from (inner, 0) to the tip
    return ((x - inner) * dy - y * dx) / np.hypot(dx, dy)


def outline(label, u, v, r):
    """Signed distance, in pixels, of shape ``label`` with size ``r`` at centred, rotated coordinates ``u, v``."""
    rho = np.hypot(u, v)
    if label == 0:
        return rho - 0.85 * r
    if label == 1:
        return np.abs(rho - 0.75 * r) - 0.22 * r
    if label == 2:
        return np.maximum(rho - r, v - 0.1 * r)
    if label == 3:
        return polygon(u, v, 1.15 * r, 3)
    if label == 4:
        return polygon(u, v, 1.1 * r, 4)
    if label == 5:
        return polygon(u, v, r, 5)
    if label == 6:
        return star(u, v, 1.25 * r)
    a, b = np.abs(u), np.abs(v)
    if label == 7:
        return np.minimum(np.maximum(a - r, b - 0.32 * r), np.maximum(a - 0.32 * r, b - r))
    if label == 8:
        return np.maximum(a - 1.1 * r, b - 0.38 * r)
    return np.maximum(rho - r, 0.85 * r - np.hypot(u - 0.5 * r, v))


def paint(labels, rng):
    """Images for ``labels`` (N,), uint8 ``(N, 3, 32, 32)``, drawn from ``rng``."""
    n = len(labels)
    f32 = np.float32
    yy, xx = np.meshgrid(np.arange(SIZE, dtype=f32), np.arange(SIZE, dtype=f32), indexing="ij")
    radius = rng.uniform(5.0, 10.0, n).astype(f32)
    cx, cy = (rng.uniform(radius, SIZE - 1 - radius).astype(f32) for _ in range(2))
    turn = rng.uniform(0, 2 * np.pi, n).astype(f32)

    # background: a colour, and two plane waves in random directions with their own colours
    image = np.empty((n, 3, SIZE, SIZE), f32)
    image[:] = rng.uniform(40, 215, (n, 3, 1, 1)).astype(f32)
    ground = image[:, :, 0, 0].copy()
    for _ in range(2):
        angle, phase = rng.uniform(0, 2 * np.pi, (2, n, 1, 1)).astype(f32)
        pitch = rng.uniform(0.15, 1.0, (n, 1, 1)).astype(f32)
        wave = np.sin(pitch * (np.cos(angle) * xx + np.sin(angle) * yy) + phase)
        image += wave[:, None] * rng.uniform(-28, 28, (n, 3, 1, 1)).astype(f32)

    def stroke(count):
        """Clutter: ``count`` short strokes an image, each with its own colour."""
        for _ in range(count):
            x, y = rng.uniform(0, SIZE, (2, n, 1, 1)).astype(f32)
            angle = rng.uniform(0, np.pi, (n, 1, 1)).astype(f32)
            along = np.cos(angle) * (xx - x) + np.sin(angle) * (yy - y)
            across = np.cos(angle) * (yy - y) - np.sin(angle) * (xx - x)
            length = rng.uniform(2, 5, (n, 1, 1)).astype(f32)
            cover = np.clip(1.5 - np.maximum(np.abs(along) - length, np.abs(across)), 0, 1)[:, None]
            image[:] += cover * (rng.uniform(0, 255, (n, 3, 1, 1)).astype(f32) - image)

    stroke(3)
    colour = rng.uniform(0, 255, (n, 3)).astype(f32)
    gap = np.abs(colour - ground).sum(1, keepdims=True)  # too little contrast: the complement of the background
    colour = np.where(gap < 90, np.mod(ground + 128, 256), colour)
    faint = rng.random((n, 1, 1, 1)) < 0.05  # some shapes are hardly to be seen, so that no network gets them all
    opacity = np.where(faint, rng.uniform(0.0, 0.25, faint.shape), rng.uniform(0.6, 1, faint.shape)).astype(f32)
    for label in range(len(CLASSES)):
        of = np.flatnonzero(labels == label)
        x, y = xx - cx[of, None, None], yy - cy[of, None, None]
        c, s = np.cos(turn[of, None, None]), np.sin(turn[of, None, None])
        cover = np.clip(0.5 - outline(label, c * x + s * y, c * y - s * x, radius[of, None, None]), 0, 1)[:, None]
        image[of] += opacity[of] * cover * (colour[of, :, None, None] - image[of])
    stroke(2)
    image += rng.standard_normal(image.shape, dtype=f32) * rng.uniform(5, 25, (n, 1, 1, 1)).astype(f32)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def generate(size, seed):
    """``size`` images and labels, uint8 ``(size, 3, 32, 32)`` and int64 ``(size,)``, all classes alike up to one."""
    images = np.empty((size, 3, SIZE, SIZE), np.uint8)
    labels = np.empty(size, np.int64)

    def fill(start):
        stop = min(start + BLOCK, size)
        rng = np.random.Generator(np.random.PCG64([seed, start]))
        labels[start:stop] = rng.permutation(np.arange(start, stop) % len(CLASSES))
        images[start:stop] = paint(labels[start:stop], rng)

    with ThreadPoolExecutor() as pool:
        list(pool.map(fill, range(0, size, BLOCK)))
    return images, labels
