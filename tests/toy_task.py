"""The smallest task that the training loop accepts: three networks' worth of machinery, a hundred weights."""

import torch
from torch import nn

from sdlearn.training import Task


class Toy(Task):
    """Learn y = the sum of the four numbers in x."""

    def __init__(self, width: int = 8):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, width), nn.SiLU(), nn.Linear(width, 1))

    def examples(self, rngs):
        x = torch.tensor([[rng.gauss(0, 1) for _ in range(4)] for rng in rngs])
        return {"x": x, "y": x.sum(1, keepdim=True)}

    def forward(self, batch):
        return {"loss": (self.net(batch["x"]).float() - batch["y"]).square().mean()}

    def preview(self):
        return torch.zeros(2, 3, 8, 8)
