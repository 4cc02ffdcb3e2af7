"""The Shapes benchmark: every method under one budget, one detector, one protocol.

Its sizes, ``shapes_quick.py``, ``shapes_medium.py`` and ``shapes_full.py``, give it methods and
numbers.
"""

#: Scenes that choose learning rates are of another seed than those of the results.
DATA_SEED, HELD_OUT_SEED = 0, 1000

_TEST, _TRAIN = "dataloader.test.dataset.names", "dataloader.train.dataset.names"


def scenes(key: str, split: str, size: int, side: int, level: str) -> str:
    """The override that makes ``key`` a Shapes data set."""
    values = f"split:{split},size:{size},side:{side},level:{level},seed:{DATA_SEED}"
    return f"{key}={{_target_:region_pretrain.data.shapes.shapes,{values}}}"


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
    images_seen: int,
    iterations: int,
    evaluations: int,
    rates: list,
    fractions: list,
    seeds: list,
    pretrain_overrides: list,
    finetune_overrides: list,
) -> dict:
    """A sweep of all methods, and of random weights.

    Args:
        title: of the report.
        methods: name -> entry of ``sweep.pretrain``; ``data`` is the key of its data set.
        detector: the detection config.
        side: of a scene in pixels.
        level: how hard scenes are.
        unlabeled: scenes to pre-train on.
        labelled: scenes to fine-tune on, of which ``fractions`` are taken.
        val: scenes of the results, and as many others to choose rates on.
        images_seen: length of each pre-training, the same for all.
        iterations: length of each fine-tuning; the rate drops at 3/4 and at 11/12.
        evaluations: points of the curve of AP.
        rates: fine-tuning learning rates, the same for all.
        fractions: of the labelled scenes.
        seeds: of pre-training, fine-tuning and the choice of labelled scenes.
        pretrain_overrides: of every method, after its own.
        finetune_overrides: of every fine-tuning.
    """
    pretrain = {}
    for name, entry in methods.items():
        entry = dict(entry)
        data = scenes(entry.pop("data", _TRAIN), "unlabeled", unlabeled, side, level)
        pretrain[name] = {**entry, "overrides": [*entry.get("overrides", []), data]}
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
                    scenes(_TRAIN, "train", labelled, side, level),
                    scenes(_TEST, "val", val, side, level),
                    f"train.max_iter={iterations}",
                    f"train.eval_period={iterations // evaluations}",
                    f"lr_multiplier.max_iter={iterations}",
                    f"lr_multiplier.steps=[{iterations * 3 // 4},{iterations * 11 // 12}]",
                    f"+lr_multiplier.warmup_iters={iterations // 6}",
                ],
                fractions=fractions,
                rates=rates,
                held_out=[f"{_TEST}.seed={HELD_OUT_SEED}", "train.eval_period=0"],
            )
        ),
        finetune_overrides=finetune_overrides,
    )
