"""A site's settings in one place: copy this file, change it, and say --slurm clusters/mine.py."""

cluster = dict(
    kind="slurm",
    partition="gpu",
    account=None,
    qos=None,
    # Features that the nodes must have, e.g. "a100|h100".
    constraint=None,
    # Minutes. A run that needs longer saves, is requeued and goes on.
    time=24 * 60,
    # One task (process) a GPU.
    nodes=1,
    gpus_per_node=8,
    cpus_per_task=12,
    mem_gb=480,
    gres=None,
    exclude=None,
    # Any other parameter of sbatch, without its dashes.
    extra={"comment": "region_pretrain"},
    # Run by the job's shell first.
    setup=["export NCCL_DEBUG=WARN"],
    # Put before the tool's own command line, e.g. "apptainer exec --nv region_pretrain.sif".
    container="",
    # Jobs of one array that run at once.
    array_parallelism=16,
    # Told so long before the time is up; a step and a checkpoint must fit.
    signal_seconds=120,
)
