"""Cards of weights in a metafile, on the disk and at a URL."""

import functools
import hashlib
import http.server
import threading
from pathlib import Path

import pytest
import yaml

from region_pretrain import zoo
from region_pretrain.errors import UserError

CARD = f"Name: a, Weights: b.pth, Metadata: {{SHA256: '{'0' * 64}'}}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "m.yml cannot be read: ParserError"),
        ("a: 1", "m.yml is not a metafile.yml: it has no list Models"),
        ("Models: [{Name: a}]", "the model a has no Weights"),
        ("Models: [{Name: a, Weights: b.pth}]", "the model a has no Metadata.SHA256"),
        ("Models: [{Name: a, Weights: b.pth, Metadata: {SHA256: ab}}]", "64 hexadecimal digits"),
        ("Models: [3]", r"the model \? has no Name"),
        ("{Models: [{Metadata: x}]}", "m.yml: Metadata must be a map, not 'x'"),
        ("{Models: [], Collections: x}", "m.yml: Collections must be a list, not 'x'"),
        (f"Models: [{{{CARD}, Results: 3}}]", "m.yml: Results must be a list, not 3"),
        (f"Models: [{{{CARD}}}, {{{CARD}}}]", "m.yml has two models called a: rename one"),
    ],
)
def test_mistakes_in_a_metafile_are_named(tmp_path, text, message):
    path = tmp_path / "m.yml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        zoo.read_metafile(str(path))


def test_weights_may_be_urls(tmp_path):
    path, digest = tmp_path / "m.yml", "0" * 64
    path.write_text(
        f"Models: [{{Name: a, Weights: 'https://host/a.pth', Metadata: {{SHA256: '{digest}'}}}}]"
    )
    card = zoo.read_metafile(str(path))["a"]
    assert (card.weights, card.sha256) == ("https://host/a.pth", digest)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves a folder per port; iopath's cache is the test's own."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    running = []

    def serve(folder):
        handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
        running.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=running[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{running[-1].server_port}/zoo/metafile.yml"

    yield serve, running
    for one in running:
        one.shutdown()
        one.server_close()


def test_metafiles_at_urls_are_current_and_those_of_their_hosts(server, tmp_path, monkeypatch):
    def write(folder, *names):
        (tmp_path / folder / "zoo").mkdir(parents=True, exist_ok=True)
        weights = folder.encode()
        (tmp_path / folder / "zoo/w.pth").write_bytes(weights)
        digest = hashlib.sha256(weights).hexdigest()
        models = [{"Name": n, "Weights": "w.pth", "Metadata": {"SHA256": digest}} for n in names]
        (tmp_path / folder / "zoo/metafile.yml").write_text(yaml.safe_dump({"Models": models}))

    serve, running = server
    write("a", "one")
    write("b", "two")
    urls = [serve(tmp_path / folder) for folder in "ab"]
    monkeypatch.setenv("REGION_PRETRAIN_ZOO", " ".join(urls))
    for name, content in (("one", b"a"), ("two", b"b")):
        card = zoo.read_card(name)
        assert Path(card.file()).read_bytes() == content
    write("b", "two", "three")
    assert zoo.read_card("three").name == "three"
    for one in running:
        one.shutdown()
        one.server_close()
    running.clear()
    assert zoo.read_card("three").name == "three"  # as it was
