"""The Shapes benchmark: every method with the same budget, detector and protocol.

``shapes_quick.py``, ``shapes_medium.py``, ``shapes_long.py`` and ``shapes_full.py`` are its sizes,
``emoji_long.py`` is the long one on another data set.
"""

#: Seeds of the scenes of the results, and of the held-out scenes that choose learning rates.
DATA_SEED, HELD_OUT_SEED = 0, 1000

_TEST, _TRAIN = "dataloader.test.dataset.names", "dataloader.train.dataset.names"


def scenes(key: str, data: str, split: str, size: int, side: int, level: str) -> str:
    """The override that sets ``key`` to a generated data set, ``shapes`` or ``emoji``."""
    values = f"split:{split},size:{size},side:{side},level:{level},seed:{DATA_SEED}"
    return f"{key}={{_target_:region_pretrain.data.{data}.{data},{values}}}"


def benchmark(
    *,
    title: str,
    methods: dict,
    detector: str,
    side: int,
    level: str,
    unlabeled: int,
    labelled: int,
    val: int,
    images_seen: int | None,
    iterations: int,
    evaluations: int,
    learning_rates: list,
    label_fractions: list,
    seeds: list,
    pretrain_overrides: list,
    finetune_overrides: list,
    finetune_seeds: list = (),
    learning_rate_seeds: list = (HELD_OUT_SEED,),
    data: str = "shapes",
) -> dict:
    """A sweep over all methods and random weights.

    Args:
        title: heading of the report.
        methods: name -> entry of ``sweep.pretrain``, with an optional ``data``: the config key of
            its data set.
        detector: path of the detection config.
        side: side length of a scene in pixels.
        level: difficulty of the scenes.
        unlabeled: number of scenes to pre-train on.
        labelled: number of scenes to fine-tune on, before ``label_fractions``.
        val: number of scenes of the results, and of the held-out scenes.
        images_seen: length of each pre-training in images; None: as its config says.
        iterations: length of each fine-tuning; the learning rate drops after 3/4 and 11/12 of it.
        evaluations: number of evaluations during a fine-tuning.
        learning_rates: fine-tuning learning rates to choose from; empty: the config's.
        label_fractions: fractions of the labelled scenes to fine-tune on.
        seeds: seeds of pre-training, and of fine-tuning unless ``finetune_seeds`` lists others.
        pretrain_overrides: overrides of every method, applied after its own.
        finetune_overrides: overrides of every fine-tuning.
        finetune_seeds: seeds of the fine-tunings from each pre-training; empty: the pre-training's.
        learning_rate_seeds: seeds of the trials of learning rates.
        data: the generated data set, ``shapes`` or ``emoji``.
    """
    pretrain = {}
    for name, entry in methods.items():
        entry = dict(entry)
        names = scenes(entry.pop("data", _TRAIN), data, "unlabeled", unlabeled, side, level)
        pretrain[name] = {**entry, "overrides": [*entry.get("overrides", []), names]}
    return dict(
        title=title,
        seeds=seeds,
        images_seen=images_seen,
        pretrain=pretrain,
        pretrain_overrides=pretrain_overrides,
        baselines=dict(random=dict(label="random weights")),
        finetune=dict(
            detector=dict(
                config=detector,
                overrides=[
                    scenes(_TRAIN, data, "train", labelled, side, level),
                    scenes(_TEST, data, "val", val, side, level),
                    f"train.max_iter={iterations}",
                    f"train.eval_period={iterations // evaluations}",
                    f"lr_multiplier.max_iter={iterations}",
                    f"lr_multiplier.steps=[{iterations * 3 // 4},{iterations * 11 // 12}]",
                    f"+lr_multiplier.warmup_iters={iterations // 6}",
                ],
                seeds=list(finetune_seeds),
                label_fractions=label_fractions,
                learning_rates=learning_rates,
                held_out=[f"{_TEST}.seed={HELD_OUT_SEED}", "train.eval_period=0"],
                learning_rate_seeds=list(learning_rate_seeds),
            )
        ),
        finetune_overrides=finetune_overrides,
    )
