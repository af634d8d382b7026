"""AlexNet (Krizhevsky et al., NeurIPS 2012) for 32 x 32 images, without BatchNorm.

Five convolutions of its widths, 64 192 384 256 256, all 3 x 3; the first has stride 2 and three are followed by max
pooling, so that 2 x 2 pixels are left of 32 x 32. The two hidden layers behind have 1,024 units in place of 4,096.
"""

import torch.nn.functional as F
from torch import nn


class AlexNet(nn.Module):
    """(N, C, H, W) in [0, 1] -> logits (N, n_classes); H and W at least 7."""

    feature_layers = ("conv1", "conv2", "conv5")

    def __init__(self, n_classes, in_channels=3):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 64, 3, 2, 1)
        self.conv2 = nn.Conv2d(64, 192, 3, 1, 1)
        self.conv3 = nn.Conv2d(192, 384, 3, 1, 1)
        self.conv4 = nn.Conv2d(384, 256, 3, 1, 1)
        self.conv5 = nn.Conv2d(256, 256, 3, 1, 1)
        self.fc1 = nn.Linear(256 * 2 * 2, 1024)
        self.fc2 = nn.Linear(1024, 1024)
        self.fc = nn.Linear(1024, n_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)  # 8 x 8 of 32 x 32
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)  # 4 x 4
        x = F.relu(self.conv5(F.relu(self.conv4(F.relu(self.conv3(x))))))
        x = F.adaptive_max_pool2d(x, 2).flatten(1)
        x = F.dropout(F.relu(self.fc1(x)), 0.5, self.training)
        return self.fc(F.dropout(F.relu(self.fc2(x)), 0.5, self.training))
