"""A run of many steps needs no more memory, descriptors and threads at its end."""

from long_run import assert_flat, tiny_finetuning, tiny_pretraining, watch
from soak import make_config, make_images


def test_nothing_grows_in_a_pretraining(tmp_path):
    assert_flat(watch(tiny_pretraining(tmp_path, 1000), tmp_path, 1000))


def test_nothing_grows_in_a_finetuning(tmp_path):
    assert_flat(watch(tiny_finetuning(tmp_path, 300), tmp_path, 300))


def test_nothing_grows_with_the_workers_of_a_loader(tmp_path):
    cfg = make_config("BYOL", *make_images(tmp_path))
    cfg.dataloader.train.num_workers = 2
    assert_flat(watch(cfg, tmp_path, 100), prefetched=60)
