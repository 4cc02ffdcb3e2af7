from region_pretrain.commands import pretrain_net, train_net


def test_only_what_evaluates_offers_an_evaluation():
    assert "--eval-only" in train_net.make_parser().format_help()
    assert "--eval-only" not in pretrain_net.make_parser().format_help()
