"""How to train: every key with its default. Both pre-training and fine-tuning read them."""

train = dict(
    # Everything a run leaves behind goes here: config.yaml, metrics.json, log.txt, checkpoints.
    output_dir="./output",
    # Weights to start from (a path, a URL, detectron2://...); "" starts from random weights.
    init_checkpoint="",
    # Length in passes over the images ...
    epochs=None,
    # ... or in iterations: where this is set, it wins.
    max_iter=None,
    # optimizer.lr is for a batch of this many images and is scaled with the real one;
    # null: optimizer.lr is taken as it is.
    base_batch_size=None,
    # Same seed, same run; null draws one and notes it in config.yaml.
    seed=0,
    # "cuda", "cpu", or null: a GPU where there is one.
    device=None,
    # Mixed precision: "bfloat16" or "float16" (a CPU always takes bfloat16).
    amp=dict(enabled=False, dtype="bfloat16"),
    # NHWC convolutions: faster with mixed precision on recent GPUs.
    channels_last=False,
    # torch.compile the trunks: minutes at the start, and no gain on a CPU.
    compile=False,
    # Let cuDNN try its algorithms: worth it where all batches have one size.
    cudnn_benchmark=False,
    # Work through each loaded batch in so many parts, one after the other (less memory, same lr;
    # batch norm sees one part at a time).
    accumulate_steps=1,
    # Clip gradients by total norm; with max_value set, each entry to +-max_value instead.
    clip_grad=dict(enabled=False, max_norm=1.0, max_value=None),
    # Arguments of DistributedDataParallel, where there is more than one process.
    ddp=dict(
        broadcast_buffers=False,
        find_unused_parameters=False,
        # Send gradients as float16: half the traffic.
        fp16_compression=False,
    ),
    # When model_NNNNNNN.pth is written, and which of them stay.
    checkpointer=dict(
        # Save after every so many iterations (0: not by iterations) ...
        period=5000,
        # ... and after so many minutes, looked at when a line is logged (0: not by time).
        minutes=0,
        # Of model_NNNNNNN.pth keep the last so many (0: all) ...
        keep_last=3,
        # ... and for good those of every so many iterations (0: none).
        keep_every=0,
    ),
    # Resume with another number of processes than the checkpoint was written by: the same images
    # in the same global order, but not bit for bit.
    allow_world_size_change=False,
    # Evaluate after every so many iterations, and in any case at the end (fine-tuning).
    eval_period=5000,
    # Write metrics and look for NaN after every so many iterations.
    log_period=20,
    # Before each evaluation recompute batch-norm statistics over num_iter batches (fine-tuning).
    precise_bn=dict(enabled=False, num_iter=200),
    # More hooks: a list of L(MyHook)(...), such as a probe.
    hooks=[],
)
