"""A script of `test_engine`: one step of tune under a launcher, and its gradients in a file."""

import sys

import torch

from dpt.config import load_config
from dpt.training.settings import TrainConfig
from dpt.training.trainer import Trainer

target, config, *overrides = sys.argv[1:]
torch.set_num_threads(1)
trainer = Trainer(load_config(TrainConfig, config, overrides), "tune")
stepped = trainer.optimizer.step


def keep_gradients():
    if trainer.accelerator.is_main_process:
        torch.save({n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.requires_grad}, target)
    stepped()


trainer.optimizer.step = keep_gradients
trainer.train()
