"""hf://... from a small server on the loopback address that stands in for the hub: no network in tests."""

import hashlib
import http.server
import json
import threading
from pathlib import Path

import numpy as np
import pytest
from support import released
from support.published_files import save_as_released, state_dict_of

from ibq_jax import Tokenizer
from ibq_jax.__main__ import main
from ibq_jax.base.errors import UsageError
from ibq_jax.interop.hub import PUBLISHED, download_if_hub
from ibq_jax.pretrained.tensor_files import write_tensors

pytest.importorskip("huggingface_hub")
REPOSITORY = "TencentARC/IBQ-Tokenizer-16384"
REVISION = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """/OWNER/NAME/resolve/REVISION/FILE of what lies in `folder`/OWNER/NAME; `cut` bytes of each file are withheld."""

    folder: Path
    cut = 0

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, body: bool):
        owner, name, _, _, *file = self.path.strip("/").partition("?")[0].split("/")
        path = self.folder / owner / name / "/".join(file)
        if not path.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = path.read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", REVISION)
        self.end_headers()
        if body:
            self.wfile.write(content[: len(content) - self.cut])

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The folder that a server on this machine serves as the hub."""
    handler = type("Handler", (Hub,), {"folder": tmp_path / "hub"})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    import huggingface_hub.constants as constants

    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "hub" / REPOSITORY).mkdir(parents=True)
    yield handler
    server.shutdown()
    server.server_close()


def test_a_published_repository_is_found_by_its_name(hub, tmp_path):
    save_as_released(hub.folder / REPOSITORY / PUBLISHED[REPOSITORY], state_dict_of("tokenizer"))
    golden = released.tokenizer()[2]
    tokenizer = Tokenizer.load(f"hf://{REPOSITORY}")
    codes = tokenizer.encode(released.nhwc(golden["image"]))
    np.testing.assert_array_equal(codes.reshape(-1), golden["ema_indices"])
    assert main(["convert", f"--in=hf://{REPOSITORY}", f"--out={tmp_path / 'run'}"]) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["codebook"]["size"] == 64


def test_emu35s_repository_is_found_by_its_name(hub):
    folder = hub.folder / "BAAI" / "Emu3.5-VisionTokenizer"
    folder.mkdir(parents=True)
    golden = state_dict_of("tokenizer")
    plain = {name: golden[name] for name in golden if not name.startswith(("loss.", "model_ema."))}
    write_tensors(folder / "model.safetensors", plain, {"format": "pt"})
    params = Tokenizer.load("hf://BAAI/Emu3.5-VisionTokenizer").params
    np.testing.assert_array_equal(params["quantize"]["codebook"], golden["quantize.embedding.weight"])


def test_a_named_file_and_our_own_layout(hub):
    for name in ("other.safetensors", "model.safetensors"):
        (hub.folder / "me" / "mine").mkdir(parents=True, exist_ok=True)
        (hub.folder / "me" / "mine" / name).write_bytes(name.encode())
    assert download_if_hub("hf://me/mine/other.safetensors").read_text() == "other.safetensors"
    assert download_if_hub("hf://me/mine@main").read_text() == "model.safetensors"


def test_what_goes_wrong_is_one_line(hub, tmp_path, capsys):
    for place, complaint in (
        ("hf://TencentARC", "write hf://OWNER/NAME"),
        (f"hf://{REPOSITORY}", "not downloaded"),
    ):
        with pytest.raises(UsageError, match=complaint) as raised:
            download_if_hub(place)
        assert "\n" not in str(raised.value)
    assert main(["convert", f"--in=hf://{REPOSITORY}", f"--out={tmp_path / 'run'}"]) == 2
    assert not (tmp_path / "run").exists()


def test_a_download_that_breaks_off_leaves_nothing(hub, tmp_path):
    save_as_released(hub.folder / REPOSITORY / PUBLISHED[REPOSITORY], state_dict_of("tokenizer"))
    hub.cut = 1000
    with pytest.raises(UsageError, match="not downloaded"):
        download_if_hub(f"hf://{REPOSITORY}")
    hub.cut = 0
    assert (
        download_if_hub(f"hf://{REPOSITORY}").stat().st_size
        == (hub.folder / REPOSITORY / PUBLISHED[REPOSITORY]).stat().st_size
    )


def test_the_eleven_published_repositories_have_their_files():
    assert len(PUBLISHED) == 11 and len(set(PUBLISHED.values())) == 11
    assert PUBLISHED["TencentARC/IBQ-AR-XXL"] == "AR_256_XXL.ckpt"
