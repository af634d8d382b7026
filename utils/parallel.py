"""Training by several processes, each with a share of every batch: ``torchrun --nproc_per_node N train_badnet.py``.

Gradients are averaged by DistributedDataParallel, and BatchNorm takes the statistics of the whole batch, so that the
losses are those of one process but for rounding (and for dropout and WaNet's noise, of which each has its own).
"""

import contextlib
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from config import UserError
from utils.devices import choose_device

PATIENCE = timedelta(hours=2)  # with a process that downloads and prepares while the others wait


class Team:
    """The processes of this run: ``rank`` of ``world``; one process alone is rank 0 of 1."""

    def __init__(self, config):
        self.rank, self.world = (int(os.environ.get(name, alone)) for name, alone in (("RANK", 0), ("WORLD_SIZE", 1)))
        self.local = int(os.environ.get("LOCAL_RANK", 0))
        if self.world == 1:
            return
        if config.compile:
            raise UserError("--compile does not go with torchrun")
        if config.device not in ("auto", "cpu", "cuda"):
            raise UserError(f"--device {config.device}: under torchrun it is auto, cpu or cuda, a GPU for each process")
        choose_device(config.device)  # which refuses a GPU that is not there
        self.cuda = config.device != "cpu" and torch.cuda.is_available()
        if self.cuda and self.local >= torch.cuda.device_count():
            raise UserError(f"torchrun --nproc_per_node: this machine has {torch.cuda.device_count()} GPUs, each takes "
                            f"one process")
        if self.cuda:
            torch.cuda.set_device(self.local)
        dist.init_process_group("nccl" if self.cuda else "gloo")
        self.patient = dist.new_group(backend="gloo", timeout=PATIENCE)
        if not self.first:
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, for as long as it lives

    @property
    def first(self):
        """Whether this is the process that reports and writes."""
        return self.rank == 0

    def device(self, name):
        """``name``, or under torchrun this process's own GPU, or the CPU."""
        return name if self.world == 1 else f"cuda:{self.local}" if self.cuda else "cpu"

    def share(self, batch_size, count):
        """(rank, world) for batches of ``batch_size`` of ``count`` images; ``UserError`` if they cannot be cut."""
        if min(batch_size, count) % self.world:
            raise UserError(f"--batch_size {min(batch_size, count)}: {self.world} processes share a batch; a multiple "
                            f"of {self.world} is needed")
        return self.rank, self.world

    @contextlib.contextmanager
    def in_turn(self):
        """What is done here each machine's first process does before the others, who find the files that it left."""
        if self.local:
            dist.barrier(self.patient)
        yield
        if self.world > 1 and not self.local:
            dist.barrier(self.patient)

    def from_first(self, value):
        """``value`` of the first process, in all of them."""
        values = [value]
        if self.world > 1:
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def mean(self, tensor):
        """The mean of ``tensor`` over the processes, which is written into it."""
        if self.world > 1:
            dist.all_reduce(tensor)
            tensor /= self.world
        return tensor

    def spread(self, model):
        """``model`` as it is trained: its gradients averaged over the processes."""
        if self.world == 1:
            return model
        return nn.parallel.DistributedDataParallel(model, device_ids=[self.local] if self.cuda else None)

    def joined(self, model):
        """``model`` with BatchNorm layers that look at whole batches, under the same names."""
        if self.world == 1:
            return model
        if self.cuda:
            return nn.SyncBatchNorm.convert_sync_batchnorm(model)
        for module in model.modules():
            for name, child in module.named_children():
                if isinstance(child, nn.BatchNorm2d):
                    child.__class__ = JoinedBatchNorm2d
                assert not isinstance(child, nn.BatchNorm1d | nn.BatchNorm3d), name
        return model

    def close(self):
        """At the end of a run that went well; after an error torchrun ends the processes that still wait."""
        if self.world > 1:
            dist.destroy_process_group()


class JoinedBatchNorm2d(nn.BatchNorm2d):
    """``nn.SyncBatchNorm`` for processes on the CPU, which it does not know."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            wide, count = x.float(), x.numel() // x.shape[1] * dist.get_world_size()
            mean = Sum.apply(wide.sum((0, 2, 3))) / count  # (C,)
            off = wide - mean[:, None, None]
            var = Sum.apply(off.square().sum((0, 2, 3))) / count
            with torch.no_grad():
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(var * count / (count - 1), self.momentum)
            scale = self.weight * (var + self.eps).rsqrt()
            return (off * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


class Sum(torch.autograd.Function):
    """The sum of a tensor over the processes; its gradient flows into all of them."""

    @staticmethod
    def forward(ctx, tensor):
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad):
        return Sum.apply(grad)
