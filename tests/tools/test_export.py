"""The command line of the exporter."""

import pytest
import torch
import torchvision

from region_pretrain.commands.export import main


def test_a_run_s_folder_is_exported(tmp_path, capsys):
    model = torchvision.models.resnet18()
    torch.save(model.state_dict(), tmp_path / "model_final.pth")
    main([str(tmp_path), "--to", "timm"])
    written = torch.load(tmp_path / "model_final_timm.pth")
    assert torch.equal(written["layer4.1.conv2.weight"], model.layer4[1].conv2.weight)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"# {tmp_path}/model_final_timm.pth"
    assert "mean = [0.485, 0.456, 0.406]  # RGB, for pixels in [0, 1]" in lines


def test_output_can_be_named_and_errors_are_one_line(tmp_path, capsys):
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "x.pth")
    main([str(tmp_path / "x.pth"), "--to", "detectron2", "--out", str(tmp_path / "y.pkl")])
    assert (tmp_path / "y.pkl").is_file()
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path / "none.pth"), "--to", "timm"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.endswith("none.pth: no such file\n")
