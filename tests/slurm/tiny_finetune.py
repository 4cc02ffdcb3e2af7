from detectron2.config import LazyCall as L
from slurm_runs import SlowAttempts
from tiny_run import make_detection_config

cfg = make_detection_config("", hooks=[L(SlowAttempts)(count=1, seconds=0.0)])
cfg.dataloader.train.num_workers = 1
cfg.train.precise_bn.enabled = False
cfg.train.eval_period = 0
model, dataloader, optimizer = cfg.model, cfg.dataloader, cfg.optimizer
lr_multiplier, train = cfg.lr_multiplier, cfg.train
del cfg
