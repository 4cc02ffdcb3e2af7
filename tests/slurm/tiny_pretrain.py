from detectron2.config import LazyCall as L
from slurm_runs import SlowAttempts
from tiny_run import make_config

cfg = make_config("", max_iter=60, hooks=[L(SlowAttempts)(count=1, seconds=0.0)])
cfg.model.norm = ""
cfg.train.checkpointer.period = 25
model, dataloader, optimizer = cfg.model, cfg.dataloader, cfg.optimizer
lr_multiplier, train = cfg.lr_multiplier, cfg.train
del cfg
