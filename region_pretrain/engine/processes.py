"""Starts one process per GPU, or several on a CPU, and lets the main one decide for all."""

from __future__ import annotations

import functools
import gc
import multiprocessing
import os
import pickle
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NoReturn, TypeVar
from urllib.parse import parse_qs, urlsplit

import torch
from detectron2.engine import DEFAULT_TIMEOUT
from detectron2.engine import launch as detectron2_launch
from detectron2.engine.launch import _find_free_port
from detectron2.utils import comm
from torch import distributed as dist
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from region_pretrain.engine.network import choose_gloo_interface
from region_pretrain.engine.preemption import stop_signals_handled
from region_pretrain.engine.roll_call import agree_on_device, meet
from region_pretrain.errors import INTERRUPTED, KILLED, STOPPED, Stopped, UserError, describe
from region_pretrain.system import USR2, cores

_ADDRESS = re.compile(r"tcp://([^\s:/\[\]]+|\[[0-9a-fA-F:]+\]):\d{1,5}|file:///.+")
_PATIENCE = timedelta(hours=6)
_ROLL_CALL = "roll-call"
T = TypeVar("T")


def on_main_process(function: Callable[[], T]) -> T:
    """Call a function on the main process only. All processes call this together.

    Returns:
        The function's result, in every process.

    Raises:
        UserError: the function raised it; in every process.
    """
    outcome, group = None, _patient_group(comm.get_world_size())
    if comm.is_main_process():
        try:
            outcome = function()
        except UserError as error:
            outcome = error
    outcome = comm.all_gather(outcome, group)[0]
    if isinstance(outcome, UserError):
        raise outcome
    return outcome


@functools.cache
def _patient_group(world_size: int) -> dist.ProcessGroup | None:
    """A group that waits for hours for what one process does alone, such as COCO's evaluation."""
    return dist.new_group(backend="gloo", timeout=_PATIENCE) if world_size > 1 else None


class FailedElsewhere(UserError):
    """Another process failed; the message says which, and how."""


@contextmanager
def fail_together() -> Iterator[None]:
    """Let all processes fail if one of them does. All processes enter this together.

    The process that failed re-raises its exception. A process that is waiting inside the block for
    a failed one would wait forever: before a collective operation within it, all processes check
    with ``with fail_together(): pass`` that they have got that far.

    Raises:
        FailedElsewhere: another process failed.
    """
    group = _patient_group(comm.get_world_size())  # now, while none is waiting
    try:
        yield
    except FailedElsewhere:
        raise  # all processes know already
    except Exception as error:
        comm.all_gather(describe(error), group)
        raise
    for rank, message in enumerate(comm.all_gather("", group)):
        if message:
            raise FailedElsewhere(f"rank {rank}: {message}")


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

    With ``device="cpu"`` the processes communicate through gloo, even on a machine with GPUs. The
    processes of a machine share its cores, unless ``OMP_NUM_THREADS`` is set. If ``torchrun`` or
    SLURM has already started one process per GPU (``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK`` and
    ``LOCAL_WORLD_SIZE`` are set), this process joins the others instead of starting more; a process
    group that the caller has initialised is used unchanged.

    Args:
        main: importable by name.
        num_processes: processes (GPUs) per machine.
        num_machines: number of machines.
        machine_rank: rank of this machine, from 0.
        dist_url: rendezvous address; ``auto`` picks a free port, on a single machine only.
        device: ``cuda`` or ``cpu``.
        args: arguments of ``main``.

    Raises:
        UserError: the machine has too few GPUs; processes share one; several machines have no
            rendezvous address; the address or the rank of a machine is invalid; not all
            processes connect; or some have a GPU and others none.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ:
        if dist.is_initialized():
            main(*args)  # whoever initialised the group also destroys it
            return
        _join_from_environment(device)
        ended = _run_to_end(main, args)
        if ended is not None:
            raise ended
        return
    if num_processes < 1 or num_machines < 1:
        raise UserError(
            f"--num-gpus {num_processes} --num-machines {num_machines}: must be at least 1"
        )
    if num_processes * num_machines == 1:
        main(*args)
        return
    if not 0 <= machine_rank < num_machines:
        raise UserError(
            f"--machine-rank {machine_rank} --num-machines {num_machines}: ranks are 0 to "
            f"{num_machines - 1}"
        )
    if num_machines > 1 and dist_url == "auto":
        raise UserError("several machines need an address: --dist-url tcp://HOST:PORT")
    if dist_url != "auto" and not _ADDRESS.fullmatch(dist_url):
        raise UserError(f"--dist-url {dist_url}: write tcp://HOST:PORT, e.g. tcp://node1:29500")
    if device != "cpu" and num_processes > torch.cuda.device_count():
        raise UserError(
            f"--num-gpus {num_processes}, but this machine has {torch.cuda.device_count()}; "
            "train.device=cpu runs that many processes on the CPU"
        )
    before = dict(os.environ)
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # otherwise Detectron2 would choose NCCL
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(cores()) // num_processes)))
    if dist_url == "auto":
        dist_url = f"tcp://127.0.0.1:{_find_free_port()}"
    if num_machines > 1:
        choose_gloo_interface(urlsplit(dist_url).hostname)
    if dist_url.startswith("tcp://"):
        address, parent = dist_url.removeprefix("tcp://"), os.getpid()
        dist_url = f"{_ROLL_CALL}://{address}?local_size={num_processes}&parent={parent}"
    try:
        with _signals_reach_processes() as received:
            detectron2_launch(
                _main_of_process,
                num_processes,
                num_machines=num_machines,
                machine_rank=machine_rank,
                dist_url=dist_url,
                args=(main, args),
            )
    except ProcessExitedException as error:
        if error.exit_code in (UserError.exit_code, KILLED, STOPPED):  # it has printed why
            sys.exit(error.exit_code)
        if error.exit_code >= 0:
            raise
        died = f"process {error.error_index} of {num_processes} died from {error.signal_name}"
        _exit_resumable(_stopped_by(received[-1]) if received else died, 128 - error.exit_code)
    except ProcessRaisedException as error:
        if signal.SIGINT in received and error.msg.rstrip().endswith("KeyboardInterrupt"):
            raise KeyboardInterrupt from None
        _exit_if_asked_twice(received)  # one process has ended, and the others fail without it
        raise
    except (EOFError, pickle.UnpicklingError):  # killed while it wrote why it failed
        _exit_if_asked_twice(received)
        raise
    finally:
        os.environ.clear()
        os.environ.update(before)


def _exit_if_asked_twice(received: list[signal.Signals]) -> None:
    for number in received:
        if number != USR2 and received.count(number) > 1:
            _exit_resumable(_stopped_by(number), 128 + number)


def _stopped_by(number: signal.Signals) -> str:
    return f"stopped by {number.name} before a checkpoint was saved"


def _exit_resumable(reason: str, code: int) -> NoReturn:
    print(f"error: {reason}; --resume continues the run", file=sys.stderr)
    sys.exit(code)


@contextmanager
def _signals_reach_processes() -> Iterator[list[signal.Signals]]:
    """Pass USR2, TERM and Ctrl-C on as USR2, which saves a checkpoint.

    They reach the child processes that are started within the context. A second TERM or Ctrl-C
    kills them. Within the context, the list grows by each signal.
    """
    received: list[signal.Signals] = []
    others = set(multiprocessing.active_children())

    def pass_on(number: int, frame: object) -> None:
        again = number in received and number != USR2
        received.append(signal.Signals(number))
        for child in set(multiprocessing.active_children()) - others:
            if again:
                child.kill()
            elif USR2 is not None:  # on Windows, Ctrl-C reaches every process of the console
                with suppress(ProcessLookupError):
                    os.kill(child.pid, USR2)

    with stop_signals_handled(pass_on):
        yield received


def _main_of_process(main: Callable[..., Any], args: tuple[Any, ...]) -> None:
    is_main = comm.is_main_process()
    ended = _run_to_end(main, args)
    if isinstance(ended, UserError):
        _exit(ended, is_main)
    if ended is not None:
        raise ended


def _exit(error: UserError, first: bool) -> NoReturn:
    """End a process that was launched.

    Usually all processes find the same error. The first one exits first, and the parent then ends
    the others before they print it again.
    """
    time.sleep(0 if first else 5)
    print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(error.exit_code)


def _roll_call(url: str, **settings: object) -> Iterator[tuple[dist.Store, int, int]]:
    """The rendezvous of processes that were launched.

    A process whose launcher has been killed gets SIGINT, to which Python's handler would react only
    after the half hour in which PyTorch tries to connect to the other processes.
    """
    parts = urlsplit(url)
    numbers = {name: int(values[0]) for name, values in parse_qs(parts.query).items()}
    rank, world_size, local_size = (numbers[n] for n in ("rank", "world_size", "local_size"))
    first = rank % local_size == 0
    usual = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        if os.getppid() != numbers["parent"]:
            sys.exit(INTERRUPTED)
        store = meet(
            parts.hostname, parts.port, rank, world_size, speaks=first and world_size > local_size
        )
        # Detectron2 chooses the backend accordingly.
        agree_on_device(store, rank, world_size, "cuda" if torch.cuda.is_available() else "cpu")
        yield store, rank, world_size
    except UserError as error:
        _exit(error, first)
    finally:  # when init_process_group drops this generator, with all processes connected
        signal.signal(signal.SIGINT, usual)


dist.register_rendezvous_handler(_ROLL_CALL, _roll_call)


def _run_to_end(main: Callable[..., Any], args: tuple[Any, ...]) -> UserError | Stopped | None:
    """Run ``main(*args)`` and leave the process group. Returns the exception that ended it."""
    ended = None
    try:
        main(*args)
    except (UserError, Stopped) as error:
        ended = error.with_traceback(None)  # its frames keep process groups alive
    # After an error the other processes may wait in NCCL for this one; destroying the group hangs.
    if not isinstance(ended, UserError) or dist.get_backend() == "gloo":
        leave_process_group()
    return ended


def leave_process_group() -> None:
    """Leave the process group and end its gloo threads.

    Each thread keeps the tensors of its last operation alive, and freeing one of them while the
    interpreter shuts down aborts the process: a finished run would look like a crash. A thread
    ends when the last reference to its group is dropped.
    """
    dist.destroy_process_group()
    comm._LOCAL_PROCESS_GROUP = None
    comm.create_local_process_group.cache_clear()
    comm._get_global_gloo_group.cache_clear()
    _patient_group.cache_clear()
    gc.collect()


def _join_from_environment(device: str) -> None:
    names = ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise UserError(
            f"RANK and WORLD_SIZE are set, but {' and '.join(missing)} are not: set them as well"
        )
    rank, world_size, local_rank, local_size, port = (
        int(os.environ[name])
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
    )
    host = os.environ["MASTER_ADDR"]
    gpu = None
    if device != "cpu":
        index = _gpu_of(local_rank, local_size)
        torch.cuda.set_device(index)
        gpu = str(torch.cuda.get_device_properties(index).uuid)
    if world_size > local_size:
        choose_gloo_interface(host)
    # torchrun has assembled the processes already, and has a store of its own.
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        base, *_ = next(dist.rendezvous("env://", rank, world_size, timeout=DEFAULT_TIMEOUT))
        store = dist.PrefixStore("default_pg", base)  # as in init_process_group
    else:
        store = meet(host, port, rank, world_size, speaks=local_rank == 0)
    agree_on_device(store, rank, world_size, device)
    dist.init_process_group(
        "gloo" if device == "cpu" else "nccl",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=DEFAULT_TIMEOUT,
    )
    sizes = sorted(set(comm.all_gather(local_size)))
    if len(sizes) > 1:
        leave_process_group()
        raise UserError(
            f"machines with {' and '.join(map(str, sizes))} processes: all must have as many"
        )
    comm.create_local_process_group(local_size)
    everyone = comm.all_gather((cores(), gpu))
    _refuse_shared_gpus([gpu for _, gpu in everyone])
    first = comm.get_rank() // local_size * local_size
    if "OMP_NUM_THREADS" not in os.environ:
        # A scheduler may bind each process to its own cores, or let all use those of the job.
        all_cores = set().union(*(mine for mine, _ in everyone[first : first + local_size]))
        torch.set_num_threads(max(1, len(all_cores) // local_size))
    comm.synchronize()


def _gpu_of(local_rank: int, local_size: int) -> int:
    """The index of this process's GPU among those that it sees.

    Raises:
        UserError: there are more processes than GPUs.
    """
    count = torch.cuda.device_count()
    if count == 1:  # a scheduler may show each process its own GPU only
        return 0
    if count < local_size:
        raise UserError(
            f"{local_size} processes on {socket.gethostname()}, where PyTorch finds {count} GPUs: "
            "start one process per GPU; if the machine has more, one is missing (nvidia-smi)"
        )
    return local_rank


def _refuse_shared_gpus(gpus: Sequence[str | None]) -> None:
    """Refuse two ranks on one GPU, on which NCCL would fail; all ranks leave the process group.

    Args:
        gpus: the UUID of each rank's GPU; None on a CPU.

    Raises:
        UserError: a GPU occurs twice.
    """
    for gpu in dict.fromkeys(gpus):
        ranks = [str(rank) for rank, other in enumerate(gpus) if other == gpu]
        if gpu is not None and len(ranks) > 1:
            leave_process_group()
            raise UserError(
                f"ranks {', '.join(ranks)} share one GPU: start one process per GPU, or let the "
                "scheduler give each process its own"
            )
