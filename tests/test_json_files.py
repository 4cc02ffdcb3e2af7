import json
import os

import pytest

from region_pretrain.errors import UserError
from region_pretrain.json_files import read_json


def test_a_file_that_cannot_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    """It may be sound, so nothing advises to delete it."""
    path = tmp_path / "a.json"
    path.write_text("{}")
    real = open

    def denied(name, *arguments, **keywords):
        if os.fspath(name) == str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return real(name, *arguments, **keywords)

    monkeypatch.setattr("builtins.open", denied)
    with pytest.raises(UserError, match=r"a.json cannot be read: .*Permission denied") as error:
        read_json(str(path), dict, "delete it")
    assert "delete" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00"])
def test_a_damaged_file_is_named_with_the_mend(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"a.json is damaged or .*: delete it$"):
        read_json(str(path), dict[str, int], "delete it")
    path.write_text(json.dumps({"x": 1}))
    assert read_json(str(path), dict[str, int], "delete it") == {"x": 1}
    with pytest.raises(FileNotFoundError):
        read_json(str(path / "b.json"), dict[str, int], "delete it")
