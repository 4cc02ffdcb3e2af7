"""Starting one process a GPU, or several on a CPU."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from detectron2.engine import launch as detectron2_launch
from detectron2.utils import comm
from torch import distributed as dist
from torch.multiprocessing import ProcessExitedException

from region_pretrain.errors import STOPPED, Stopped, UserError

_EXIT_CODE = 2


def launch(
    main: Callable[..., Any],
    num_processes: int,
    *,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
    device: str = "cuda",
    args: tuple[Any, ...] = (),
) -> None:
    """Run ``main(*args)`` in every process of a job through Detectron2's ``launch``.

    With ``device="cpu"`` the processes talk through gloo, on a machine with GPUs as well, and share
    the cores. Where ``torchrun`` or SLURM has already started a process a GPU (``RANK``,
    ``WORLD_SIZE``, ``LOCAL_RANK`` and ``LOCAL_WORLD_SIZE`` are set), that process joins the others
    instead of starting more; a process group of the caller's own is used as it is.

    Args:
        main: importable by name.
        num_processes: processes (GPUs) on this machine.
        num_machines: machines of the job.
        machine_rank: number of this one.
        dist_url: where the processes meet; ``auto`` finds a free port of a single machine.
        device: ``cuda`` or ``cpu``.
        args: for ``main``.

    Raises:
        UserError: the machine has fewer GPUs, or the processes have no place to meet.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ:
        if dist.is_initialized():
            main(*args)  # whose group this is will leave it
            return
        _join_from_environment(device)
        ended = _run_to_end(main, args)
        if ended is not None:
            raise ended
        return
    if num_processes < 1 or num_machines < 1:
        raise UserError(f"--num-gpus {num_processes} --num-machines {num_machines}: at least 1")
    if num_processes * num_machines == 1:
        main(*args)
        return
    if num_machines > 1 and dist_url == "auto":
        raise UserError("several machines need a place to meet: --dist-url tcp://HOST:PORT")
    if device != "cpu" and num_processes > torch.cuda.device_count():
        raise UserError(
            f"--num-gpus {num_processes}, but this machine has {torch.cuda.device_count()}; "
            "with train.device=cpu so many processes run on the CPU"
        )
    before = dict(os.environ)
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # else the children would take NCCL
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // num_processes)))
    try:
        detectron2_launch(
            _main_of_process,
            num_processes,
            num_machines=num_machines,
            machine_rank=machine_rank,
            dist_url=dist_url,
            args=(main, args),
        )
    except ProcessExitedException as error:
        if error.exit_code in (_EXIT_CODE, STOPPED):  # the child has printed what there is to say
            sys.exit(error.exit_code)
        raise
    finally:
        os.environ.clear()
        os.environ.update(before)


def _main_of_process(main: Callable[..., Any], args: tuple[Any, ...]) -> None:
    is_main = comm.is_main_process()
    ended = _run_to_end(main, args)
    if isinstance(ended, UserError):
        # All processes tend to find the same fault; the parent ends the others when one exits.
        time.sleep(0 if is_main else 2)
        print(f"error: {ended}", file=sys.stderr, flush=True)
        sys.exit(_EXIT_CODE)
    if ended is not None:
        raise ended


def _run_to_end(main: Callable[..., Any], args: tuple[Any, ...]) -> UserError | Stopped | None:
    """Run ``main(*args)`` and leave the process group. Returns what ended it, if not its end."""
    ended = None
    try:
        main(*args)
    except (UserError, Stopped) as error:
        ended = error.with_traceback(None)  # its frames hold groups
    # After a fault the other processes may be waiting in NCCL for this one, which no call ends.
    if not isinstance(ended, UserError) or dist.get_backend() == "gloo":
        _leave_process_group()
    return ended


def _leave_process_group() -> None:
    """End the threads of gloo in this process.

    They hold the tensors of what they did last, and to drop one while the interpreter is shutting
    down aborts the process: a run that had finished would look like one that had crashed. A thread
    ends with the last reference to its group.
    """
    dist.destroy_process_group()
    comm._LOCAL_PROCESS_GROUP = None
    comm.create_local_process_group.cache_clear()
    comm._get_global_gloo_group.cache_clear()
    gc.collect()


def _join_from_environment(device: str) -> None:
    missing = [name for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE") if name not in os.environ]
    if missing:
        raise UserError(
            f"RANK and WORLD_SIZE are set, but not {' and '.join(missing)}: set them too"
        )
    local_rank = int(os.environ["LOCAL_RANK"])
    if device != "cpu":
        # A scheduler may show each process all GPUs of its machine, or its own alone.
        torch.cuda.set_device(local_rank % max(1, torch.cuda.device_count()))
    dist.init_process_group("gloo" if device == "cpu" else "nccl", init_method="env://")
    comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
    comm.synchronize()
