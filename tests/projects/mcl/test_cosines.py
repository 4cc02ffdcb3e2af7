"""The mean cosines that MCL reports, against loops over tiles and images."""

import pytest
import torch
import torch.nn.functional as F

NAMES = ["p5", "p4", "p3", "p2"]


def test_outputs_include_the_mean_cosines(small_mcl, make_batch):
    model, batch = small_mcl().eval(), make_batch(4)
    with torch.no_grad():
        torch.manual_seed(3)  # of the montages' layout
        outputs = model(batch)
        torch.manual_seed(3)
        pyramids = model.pyramids(batch)
        for side, mine, other in (("query", 0, 1), ("key", 1, 0)):
            predictions = model._predict(pyramids[mine])
            keys = model._keys(pyramids[other], 4)
            for level, name in enumerate(NAMES):
                own, others = [], []
                for target in model.pairs[level]:
                    for vector, image in zip(
                        predictions[level], pyramids[mine].images[level].tolist(), strict=True
                    ):
                        for i, key in enumerate(keys[target]):
                            cosine = F.cosine_similarity(vector, key, dim=0).item()
                            (own if i == image else others).append(cosine)
                positive, negative = (
                    outputs[f"positive_{side}_{name}"],
                    outputs[f"negative_{side}_{name}"],
                )
                assert positive.item() == pytest.approx(sum(own) / len(own), abs=1e-5)
                assert negative.item() == pytest.approx(sum(others) / len(others), abs=1e-5)
                assert abs(positive - negative) > 1e-4  # else a swap would not show
    names = {f"{k}_{s}_{n}" for k in ("positive", "negative") for s in ("query", "key")
             for n in NAMES}  # fmt: skip
    assert outputs.keys() == names | {f"loss_{n}" for n in NAMES} | {"embedding_std"}
