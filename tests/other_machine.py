"""This machine as one without fork, /proc and some POSIX modules; run as a script by a test.

Spawned processes import it too, so that they run on the same kind of machine.
"""

import builtins
import importlib
import multiprocessing
import os
import pkgutil
import signal
import sys
import types

import torch  # noqa: F401  it has its own ways, which depend on the operating system

for name in ("fork", "sched_getaffinity", "register_at_fork", "sysconf", "O_NONBLOCK"):
    delattr(os, name)
for name in ("SIGUSR1", "SIGUSR2", "SIGPIPE"):
    delattr(signal, name)


class NoPosixModules:
    """Other packages have another way without fcntl, which depends on the operating system."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name in ("resource", "grp", "pwd"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


_import, _open, _isdir = builtins.__import__, builtins.open, os.path.isdir


def import_without_fcntl(name, globals=None, locals=None, fromlist=(), level=0):
    if name == "fcntl" and (globals or {}).get("__name__", "").startswith("region_pretrain"):
        raise ModuleNotFoundError("No module named 'fcntl'", name=name)
    return _import(name, globals, locals, fromlist, level)


def open_without_proc(file, *args, **kwargs):
    if str(file).startswith("/proc/"):
        raise FileNotFoundError(file)
    return _open(file, *args, **kwargs)


for name in ("resource", "grp", "pwd"):
    sys.modules.pop(name, None)
sys.meta_path.insert(0, NoPosixModules())
builtins.__import__, builtins.open = import_without_fcntl, open_without_proc
os.path.isdir = lambda path: not str(path).startswith("/proc/") and _isdir(path)


class Process:
    """What the library uses of ``psutil.Process``."""

    def __init__(self, pid=None):
        try:
            os.kill(pid or os.getpid(), 0)
        except ProcessLookupError:
            raise psutil.NoSuchProcess from None

    def status(self):
        return "running"

    def create_time(self):
        return 1.5

    def memory_info(self):
        return types.SimpleNamespace(rss=3 << 20, peak_wset=5 << 20)


psutil = types.ModuleType("psutil")
psutil.Process, psutil.process_iter = Process, lambda attributes: iter(())
psutil.NoSuchProcess = type("NoSuchProcess", (Exception,), {})
psutil.AccessDenied = type("AccessDenied", (Exception,), {})
psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD = "zombie", "dead"
sys.modules["psutil"] = psutil


def main() -> None:
    multiprocessing.set_start_method("spawn")
    import region_pretrain
    from region_pretrain import projects
    from region_pretrain.commands import cli

    for package in (region_pretrain, projects):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if module.name != "region_pretrain.__main__":
                importlib.import_module(module.name)

    from region_pretrain import lease, system

    assert system.cores() == list(range(os.cpu_count())) and system.USR2 is None
    assert system.process_context().get_start_method() == "spawn"
    assert system.process_start(os.getpid()) == "1.5" and system.process_start(2**22 + 1) is None
    assert (system.resident_mib(), system.peak_resident_mib()) == (3, 5)
    assert lease.Holder.this_process().is_here() and not lease.Holder.this_process().has_ended()

    method = ["--config-file", "projects/SoCo/configs/soco_r18-fpn_b32_shapes.py"]
    small = ["train.device=cpu", "train.max_iter=2", "dataloader.train.dataset.names.size=6"]
    store = "dataloader.train.dataset.regions=r.arrow"
    cli.main(["regions", *method, "--workers", "2", small[2], store])
    two = [*small, "dataloader.train.total_batch_size=2", "dataloader.train.num_workers=1"]
    cli.main(["pretrain", *method, *two, store, "train.output_dir=pre"])
    detector = ["--config-file", "configs/detection/faster_rcnn_r18_fpn_shapes.py"]
    test = ["dataloader.test.dataset.names.size=4", "dataloader.test.num_workers=1"]
    weights = "train.init_checkpoint=pre/model_final.pth"
    cli.main(["finetune", *detector, *two, *test, weights, "train.output_dir=det"])


if __name__ == "__main__":
    main()
