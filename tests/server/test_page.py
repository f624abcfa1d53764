"""The root of the server: its web page, or how to get it, and the files of a page. tests/browser looks at the page."""

import gzip
import http.client
import re

import pytest

from tests.support.server import OPTIONS, Server, serve

TYPES = {
    "index.html": "text/html",
    "a.js": "text/javascript",
    "a.css": "text/css",
    "a.json": "application/json",
    "a.svg": "image/svg+xml",
    "a.png": "image/png",
    "a.woff2": "font/woff2",
}
OUTSIDE = [
    "/../secret",
    "/a/../../secret",
    "/%2e%2e/secret",
    "/..%2fsecret",
    "/..\\secret",
    "/%5c..%5csecret",
    "//secret",
]


@pytest.fixture(scope="module")
def server(bundled_gguf, tmp_path_factory):
    with serve(bundled_gguf, tmp_path_factory.mktemp("page") / "log.txt", *OPTIONS) as running:
        yield running


def get(server: Server, path: str) -> tuple[int, str, bytes]:
    """Returns status, type and text of an answer. The path is sent as it is, which httpx would not do."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.request("GET", path, headers={"Connection": "close", "Accept-Encoding": "gzip"})
    response = connection.getresponse()
    text = response.read()
    if response.getheader("Content-Encoding") == "gzip":
        text = gzip.decompress(text)
    return response.status, response.getheader("Content-Type", "").partition(";")[0], text


def test_root_is_the_page_or_says_in_a_sentence_how_to_get_it(server):
    status, kind, text = get(server, "/")
    assert status == 200
    if kind == "text/html":
        assert b"<head><script>" in text and b"pop-gguf" in text
    else:
        assert kind == "text/plain" and text.count(b"\n") == 1 and b"run `make page`" in text


def test_files_of_the_page_have_their_types(server):
    _, kind, html = get(server, "/")
    if kind != "text/html":
        pytest.skip("the page is not built: run `make page`")
    found = {path for path in re.findall(r'"(?:\./)?([\w./-]+\.(?:js|css))"', html.decode()) if "bundle" in path}
    assert {path.rpartition(".")[2] for path in found} == {"js", "css"}
    expected = {path: "text/css" if path.endswith("css") else "application/javascript" for path in found}
    expected |= {"sw.js": "application/javascript", "manifest.webmanifest": "application/manifest+json"}
    expected |= {"favicon.svg": "image/svg+xml", "pwa-64x64.png": "image/png", "index.html": "text/html"}
    assert {path: get(server, f"/{path}")[:2] for path in expected} == {
        path: (200, kind) for path, kind in expected.items()
    }


def test_files_of_a_page_of_ones_own_have_their_types(bundled_gguf, tmp_path):
    page = tmp_path / "page"
    page.mkdir()
    for name in TYPES:
        (page / name).write_text("mine")
    (tmp_path / "secret").write_text("secret")
    with serve(bundled_gguf, tmp_path / "log.txt", *OPTIONS, "--path", page) as server:
        assert {name: get(server, f"/{name}") for name in TYPES} == {
            name: (200, kind, b"mine") for name, kind in TYPES.items()
        }
        assert get(server, "/")[2] == b"mine"
        for path in OUTSIDE:
            status, _, text = get(server, path)
            assert status >= 400 and text != b"secret", path


def test_no_path_leaves_the_page(server):
    for path in [*OUTSIDE, "/../../../../../../../../etc/passwd", "/%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd"]:
        assert get(server, path)[0] == 404, path


def test_page_is_there_without_a_key(bundled_gguf, tmp_path):
    (tmp_path / "keys").write_text("secret\n")
    with serve(bundled_gguf, tmp_path / "log.txt", "--api-key-file", tmp_path / "keys", *OPTIONS) as server:
        assert get(server, "/")[0] == 200
        assert get(server, "/props")[0] == 401
