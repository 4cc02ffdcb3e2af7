"""A site's settings: copy this file, edit the copy, and pass it as --slurm clusters/mine.py."""

cluster = dict(
    kind="slurm",
    partition="gpu",
    account=None,
    qos=None,
    # Features that the nodes must have, e.g. "a100|h100".
    constraint=None,
    # Minutes. A longer run saves a checkpoint, is requeued and resumes.
    time=24 * 60,
    nodes=1,
    # One task (process) per GPU; cpus_per_task is per process, mem_gb per node.
    gpus_per_node=8,
    cpus_per_task=12,
    mem_gb=480,
    gres=None,
    exclude=None,
    # Any other option of sbatch, without its dashes.
    extra={"comment": "region_pretrain"},
    # Shell lines that run before the tool.
    setup=["export NCCL_DEBUG=WARN"],
    # Prefix of the tool's command line, e.g. "apptainer exec --nv region_pretrain.sif".
    container="",
    # Jobs of one array that run at once.
    array_parallelism=16,
    # Seconds of warning before the time limit: long enough for one step and a checkpoint.
    signal_seconds=120,
    # What differs for a sweep's jobs without GPU: generating regions, choosing learning rates.
    cpu=dict(mem_gb=32),  # and e.g. partition="cpu", time=4 * 60
    # What differs for a sweep's fine-tunings, e.g. dict(nodes=1, gpus_per_node=1, time=4 * 60).
    finetune=dict(),
)
