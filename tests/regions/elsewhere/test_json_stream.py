"""Streams of JSON equal ``json.loads``."""

from __future__ import annotations

import io
import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from region_pretrain.regions.elsewhere import json_stream
from region_pretrain.regions.elsewhere.json_stream import JsonStream

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@example([0], None, 7)
@given(st.lists(values, max_size=5), st.sampled_from([None, 2]), st.integers(1, 7))
def test_items_are_those_of_the_array(array, indent, chunk):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "_CHUNK", chunk)
        stream = JsonStream(io.StringIO(" " + json.dumps(array, indent=indent) + "\n"))
        assert list(stream.items()) == array
        stream.end()


@given(st.dictionaries(st.text(), values, max_size=5), st.integers(1, 7))
def test_members_are_those_of_the_object(members, chunk):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "_CHUNK", chunk)
        stream = JsonStream(io.StringIO(json.dumps(members)))
        assert {key: stream.value() for key in stream.members()} == members
        stream.end()


@given(st.text(alphabet='[]{},:"1e.-atrue ', max_size=12), st.integers(1, 3))
def test_what_json_refuses_is_refused(text, chunk):
    def strict(text):
        value = json.loads(text)
        if not isinstance(value, list):
            raise ValueError
        return value

    def streamed(text):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(json_stream, "_CHUNK", chunk)
            stream = JsonStream(io.StringIO(text))
            found = list(stream.items())
            stream.end()
            return found

    try:
        expected = strict(text)
    except ValueError:
        with pytest.raises(ValueError):
            streamed(text)
    else:
        assert streamed(text) == expected
