"""Wide residual networks for small images.

Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016 (arXiv 1605.07146). Pre-activation blocks; a block that
changes the width takes its shortcut from the activated input, so that one BN-ReLU serves both branches.

The parameter names are those of the published NAD demo (``block1.layer.0.conv1.weight``, ``convShortcut``, ``fc``), so
its checkpoints load here. WRN-16-1 has 175,066 parameters for 10 classes.
"""

import math

import torch.nn.functional as F
from torch import nn


class BasicBlock(nn.Module):
    """BN-ReLU-conv3x3 twice, added to the input: ``(N, c_in, H, W) -> (N, c_out, H / stride, W / stride)``."""

    def __init__(self, c_in, c_out, stride, drop_rate=0.0):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.drop_rate = drop_rate
        self.convShortcut = None if c_in == c_out else nn.Conv2d(c_in, c_out, 1, stride, 0, bias=False)

    def forward(self, x):
        activated = F.relu(self.bn1(x))
        out = F.relu(self.bn2(self.conv1(activated)))
        if self.drop_rate > 0:
            out = F.dropout(out, self.drop_rate, self.training)
        shortcut = x if self.convShortcut is None else self.convShortcut(activated)
        return shortcut + self.conv2(out)


class Stage(nn.Module):
    """``n_blocks`` blocks in a row, the first of which changes width and resolution."""

    def __init__(self, n_blocks, c_in, c_out, stride, drop_rate):
        super().__init__()
        blocks = [BasicBlock(c_in, c_out, stride, drop_rate)]
        blocks += [BasicBlock(c_out, c_out, 1, drop_rate) for _ in range(n_blocks - 1)]
        self.layer = nn.Sequential(*blocks)

    def forward(self, x):
        return self.layer(x)


class WideResNet(nn.Module):
    """WRN-``depth``-``width``: images ``(N, in_channels, H, W)`` in [0, 1] -> logits ``(N, num_classes)``.

    Raises ``ValueError`` if ``depth`` is not 6 n + 4 with n >= 1, or ``width`` < 1.
    """

    feature_layers = ("block1", "block2", "block3")  # 16 w x 32 x 32, 32 w x 16 x 16, 64 w x 8 x 8 for 32 x 32 images

    def __init__(self, depth=16, width=1, num_classes=10, in_channels=3, drop_rate=0.0):
        super().__init__()
        if depth < 10 or (depth - 4) % 6 or width < 1:
            raise ValueError(f"a WRN's depth is 6 n + 4 (10, 16, 22, 28, 40, ...) and its width at least 1, "
                             f"not {depth} and {width}")
        n = (depth - 4) // 6
        c = 64 * width
        self.conv1 = nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False)
        self.block1 = Stage(n, 16, 16 * width, 1, drop_rate)
        self.block2 = Stage(n, 16 * width, 32 * width, 2, drop_rate)
        self.block3 = Stage(n, 32 * width, c, 2, drop_rate)
        self.bn1 = nn.BatchNorm2d(c)
        self.fc = nn.Linear(c, num_classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.normal_(m.weight, 0, math.sqrt(2 / (m.kernel_size[0] * m.kernel_size[1] * m.out_channels)))
        nn.init.zeros_(self.fc.bias)

    def forward(self, x):
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        x = F.relu(self.bn1(x)).mean((2, 3))  # (N, 64 w)
        return self.fc(x)
