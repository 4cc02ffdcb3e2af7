"""Parameters of the full-size model that LARS neither decays nor adapts."""

import torch
from detectron2.config import LazyConfig, instantiate

from region_pretrain.config import CONFIG_ROOT
from region_pretrain.projects.mcl import mcl_param_groups

RECIPE = CONFIG_ROOT.parent / "projects/MCL/configs/mcl_r50-fpn_32xb128-100ep_imagenet.py"


def test_exclusions_of_the_full_size_model():
    with torch.device("meta"):
        model = instantiate(LazyConfig.load(str(RECIPE)).model)
    names = {id(p): n for n, p in model.named_parameters()}

    def groups(**arguments):
        decayed, excluded = mcl_param_groups(model, 1e-5, **arguments)
        assert (decayed["weight_decay"], decayed["adapt"]) == (1e-5, True)
        assert (excluded["weight_decay"], excluded["adapt"]) == (0.0, False)
        found = [{names[id(p)] for p in group["params"]} for group in (decayed, excluded)]
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert found[0] | found[1] == trained and not found[0] & found[1]
        return found

    decayed, excluded = groups()
    assert {model.get_parameter(n).ndim for n in decayed} == {2, 4}
    assert {model.get_parameter(n).ndim for n in excluded} == {1}

    released, _ = groups(released_exclusions=True)
    gap = released - decayed
    assert decayed <= released and gap == {
        *(f"backbone.bottom_up.res{stage}.0.shortcut.norm.weight" for stage in (2, 3, 4, 5)),
        "projector.1.norm.weight",
        *(f"predictors.{i}.1.norm.weight" for i in range(4)),
    }
