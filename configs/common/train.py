"""Training settings with their defaults, for pre-training and fine-tuning."""

train = dict(
    # Output folder: config.yaml, metrics.json, progress.json, log.txt, checkpoints.
    output_dir="./output",
    # Initial weights (a path, a URL, detectron2://...); "" for a random initialisation.
    init_checkpoint="",
    # Accept weights that fill only a part of a stage, an FPN or a head.
    init_partial=False,
    # Fine-tuning: modules that are not trained, by name or pattern, e.g. [backbone.bottom_up] or
    # ["roi_heads.box_head.conv*"]; their norms keep their statistics.
    freeze=[],
    # Length of the run in passes over the images ...
    epochs=None,
    # ... or in iterations, which takes precedence.
    max_iter=None,
    # Batch size that optimizer.lr refers to: the learning rate is scaled linearly with
    # dataloader.train.total_batch_size; null: no scaling.
    base_batch_size=None,
    # Runs with the same seed are identical; null draws a seed and saves it in config.yaml.
    seed=0,
    # "cuda" (the CPU if there is no such GPU), "mps" (the GPU of a Mac) or "cpu".
    device="cuda",
    # Mixed precision: "bfloat16" or "float16" (only CUDA GPUs use float16).
    amp=dict(enabled=False, dtype="bfloat16"),
    # NHWC convolutions: faster with mixed precision on recent GPUs.
    channels_last=False,
    # torch.compile the trunks: compiling takes minutes, and brings nothing on a CPU.
    compile=False,
    # Let cuDNN benchmark its algorithms: faster if all batches have the same shape, as in
    # pre-training, whose recipes switch it on.
    cudnn_benchmark=False,
    # Precision of float32 matrix products on a GPU: "high" uses TF32, with 10 bits of mantissa, as
    # cuDNN's convolutions do by default; "highest" does not.
    float32_matmul_precision="high",
    # Split each batch into this many micro-batches and accumulate their gradients: less memory,
    # same learning rate, but batch norm sees one micro-batch at a time, and so do means over
    # regions, pairs and points (CCOP, point-level region contrast).
    accumulate_steps=1,
    # Clip the total norm of the gradients; if max_value is set, clip each entry to +-it instead.
    clip_grad=dict(enabled=False, max_norm=1.0, max_value=None),
    # Arguments of DistributedDataParallel, used with more than one process.
    ddp=dict(
        broadcast_buffers=False,
        find_unused_parameters=False,
        # Communicate gradients as float16: half the traffic.
        fp16_compression=False,
    ),
    # Save model_NNNNNNN.pth every `period` iterations (0: never) and keep only the newest
    # `max_to_keep` of these files (null: all). A finished run keeps one beside model_final.pth.
    checkpointer=dict(period=5000, max_to_keep=3),
    # Save such a file also every this many minutes, at the next log step (0: never).
    checkpoint_minutes=0,
    # Every this many iterations, save such a file and never delete it (0: never).
    checkpoint_keep_every=0,
    # Allow resuming with another number of processes: the images and their global order stay the
    # same (batches of a fine-tuning that are grouped by aspect ratio become others), but the run
    # does not continue bit for bit.
    allow_world_size_change=False,
    # Allow resuming with more epochs or iterations, also a finished run: all schedules become those
    # of the new length, which raises the learning rate again.
    allow_new_length=False,
    # Allow resuming although images, labels or regions have changed since the checkpoint, which a
    # resumed run otherwise refuses.
    allow_changed_data=False,
    # Pre-training: every this many epochs (0: never), replace the regions by those that `recipe`
    # finds in the momentum network's features, `batch_size` images at a time in each process. An
    # id such as "features-v1+clusters=3-6+stride=16" changes fields of the recipe.
    refresh_regions=dict(epochs=0, recipe="features-v1", batch_size=32),
    # Fine-tuning: evaluate every this many iterations (0: never) and at the end.
    eval_period=5000,
    # Fine-tuning: largest fraction of the images that may be unreadable; each is replaced by the
    # next one, with a warning. One is always tolerated, unless the fraction is 0.
    max_unreadable=0.01,
    # Fine-tuning: if it diverges, write this to results.json instead of failing, as the trials of a
    # sweep's learning rates do.
    diverged_is_result=False,
    # Write metrics and check for NaN every this many iterations.
    log_period=20,
    # Where metrics and pictures are written: console, json (required), tensorboard, csv, wandb,
    # mlflow, or L(MyWriter)(...).
    writers=["console", "json", "tensorboard"],
    # Settings of wandb and mlflow; all others are their environment variables.
    tracking=dict(
        # Project (MLflow: experiment); null: WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME, otherwise
        # region_pretrain.
        project=None,
        # Name of the run; null: that of the output folder.
        name=None,
        group=None,
        tags=[],
        # Upload model_final.pth; otherwise only paths and SHA-256 of checkpoints are recorded.
        upload_model=False,
        # Wait this many seconds at the end for what is still to be sent.
        seconds=60,
    ),
    # Every this many iterations, draw the first images (0: never): views and the method's own
    # picture in pre-training, detections beside the ground truth in fine-tuning.
    pictures=dict(
        _target_="region_pretrain.reporting.training_pictures.PicturesHook",
        period=5000,
        num_images=4,
    ),
    # Fine-tuning: recompute batch-norm statistics over num_iter batches before each evaluation.
    precise_bn=dict(enabled=False, num_iter=200),
    # Code that registers data sets, executed once in every process: a list of .py files and names
    # of modules. A config that registers some is added automatically.
    register=[],
    # Further hooks: a list of L(MyHook)(...), e.g. a kNN probe.
    hooks=[],
)
