"""Residual networks for small images: the demo's "ResNet34" and ResNet-18.

He et al., CVPR 2016 (arXiv 1512.03385), projection shortcuts. What the NAD demo calls ResNet34 is the paper's CIFAR
network of depth 32: three stages of five blocks with 16, 32, 64 channels (466,906 parameters for 10 classes), not the
ImageNet network of depth 34. The name stays, since its users have checkpoints under it. ResNet18 is the ImageNet
network with a 3x3 stem and no pooling before the first stage (11,173,962 parameters for 10 classes).
"""

import torch.nn.functional as F
from torch import nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: ``(N, c_in, H, W) -> (N, c_out, H / stride, W / stride)``."""

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.downsample = None
        if stride != 1 or c_in != c_out:
            self.downsample = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """Images ``(N, in_channels, H, W)`` in [0, 1] -> logits ``(N, num_classes)``; ``widths[i]`` channels in stage i."""

    def __init__(self, blocks, widths, num_classes=10, in_channels=3):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.feature_layers = tuple(f"layer{i + 1}" for i in range(len(widths)))
        c_in = widths[0]
        for i, (name, n, width) in enumerate(zip(self.feature_layers, blocks, widths, strict=True)):
            stage = [BasicBlock(c_in, width, 1 if i == 0 else 2)] + [BasicBlock(width, width, 1) for _ in range(n - 1)]
            self.add_module(name, nn.Sequential(*stage))
            c_in = width
        self.fc = nn.Linear(c_in, num_classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        for name in self.feature_layers:
            x = getattr(self, name)(x)
        return self.fc(x.mean((2, 3)))
