"""The learning rate as a function of the iteration, and the optimizer with its groups of parameters."""

from __future__ import annotations

import math

import torch
from torch import nn

from rendseg.engine.config import OptimizerConfig, ScheduleConfig


def learning_rate(iteration: int, iterations: float, lr: float, schedule: ScheduleConfig) -> float:
    """The learning rate of optimizer step ``iteration`` (from 0) of ``iterations`` (infinite: not known yet).

    poly: ``min_lr + (lr - min_lr) (1 - t/T)^power``; cosine: ``min_lr + (lr - min_lr) (1 + cos(pi t/T)) / 2``; step:
    ``lr gamma^n`` after n milestones. During the first w warm-up iterations this is multiplied by ``f + (1 - f) t/w``
    with the warm-up factor f.
    """
    value, done = lr, iteration / iterations
    if schedule.name == "poly":
        value = schedule.min_lr + (lr - schedule.min_lr) * (1 - done) ** schedule.power
    elif schedule.name == "cosine":
        value = schedule.min_lr + (lr - schedule.min_lr) * (1 + math.cos(math.pi * done)) / 2
    elif schedule.name == "step":
        value = lr * schedule.gamma ** sum(iteration >= milestone for milestone in schedule.milestones)
    if iteration < schedule.warmup_iterations:
        value *= schedule.warmup_factor + (1 - schedule.warmup_factor) * iteration / schedule.warmup_iterations
    return value


def build_optimizer(model: nn.Module, options: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer over up to four groups: backbone and head (its ``lr_factor``), each with and without weight
    decay."""
    norms = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
    exempt = set()
    for module in model.modules():
        listed = set(getattr(module, "no_weight_decay", set)())  # of timm's networks
        for name, parameter in module.named_parameters(recurse=False):
            if name == "bias" or isinstance(module, norms):
                exempt.add(parameter)
        exempt |= {parameter for name, parameter in module.named_parameters() if name in listed}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            head = "backbone" not in name.split(".")
            groups.setdefault((head, options.no_decay_on_norm and parameter in exempt), []).append(parameter)
    parts = [
        {
            "params": parameters,
            "lr_factor": options.head_lr_factor if head else 1.0,
            "weight_decay": 0.0 if free else options.weight_decay,
        }
        for (head, free), parameters in groups.items()
    ]
    if options.name == "adamw":
        return torch.optim.AdamW(parts, lr=options.lr, betas=options.betas, eps=options.eps)
    return torch.optim.SGD(parts, lr=options.lr, momentum=options.momentum, nesterov=options.nesterov)
