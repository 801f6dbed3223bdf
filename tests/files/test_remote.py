"""Files by URL and hub id: consent, resumption, hashes, caches; against a server on the loopback address."""

import hashlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from diffdistill.files.remote import FetchError, cache, consent, hub_hint, is_remote, local_path
from diffdistill.files.remote.hub import HubName, chosen_files
from diffdistill.models import load_denoiser
from diffdistill.models.storage import shipped_models
from tests.files.server import Host, serve

CONTENT = bytes(range(256)) * 5000
SHA = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def host(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFDISTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("DIFFDISTILL_FETCH", raising=False)
    host = Host(files={"/a.bin": CONTENT})
    server = serve(host)
    yield host
    server.shutdown()
    server.server_close()


def test_nothing_is_fetched_without_consent(host, tmp_path):
    with pytest.raises(FetchError, match=r"not on this machine: .* from 127.0.0.1, 1.28 MB; agree by fetch=true"):
        local_path(f"{host.url}/a.bin")
    assert not (tmp_path / "cache").exists() and [method for method, *_ in host.asked] == ["HEAD"]


def test_a_file_is_fetched_once_and_its_hash_is_pinned(host):
    with consent():
        path = local_path(f"{host.url}/a.bin")
    assert path.read_bytes() == CONTENT and path.name == "a.bin"
    asked = len(host.asked)
    assert local_path(f"{host.url}/a.bin", sha256=SHA) == path  # without consent, and without the network
    assert len(host.asked) == asked
    with pytest.raises(FetchError, match=f"has the SHA-256 {SHA}, not {'0' * 64}"):
        local_path(f"{host.url}/a.bin", sha256="0" * 64)
    host.files["/a.bin"] = CONTENT[:-1] + b"!"
    path.unlink()
    with consent(), pytest.raises(FetchError, match="is not what was asked for"):
        local_path(f"{host.url}/a.bin")  # what it was at first is pinned
    assert [file.name for file in path.parent.iterdir()] == ["lock"]


def test_a_transfer_that_breaks_goes_on_where_it_broke(host):
    host.break_after = [500_000, 300_000]
    with consent():
        path = local_path(f"{host.url}/a.bin", sha256=SHA)
    assert path.read_bytes() == CONTENT
    ranges = [asked for _, _, asked in host.asked if asked]
    assert ranges == ["bytes=500000-", "bytes=800000-"]


def test_a_killed_transfer_is_taken_up_by_the_next_command(host):
    host.break_after = [640_000] + [0] * 4
    with consent(), pytest.raises(FetchError, match="the transfer broke 5 times"):
        local_path(f"{host.url}/a.bin")
    host.asked.clear()
    with consent():
        assert local_path(f"{host.url}/a.bin").read_bytes() == CONTENT
    assert [asked for _, _, asked in host.asked if asked] == ["bytes=640000-"]


@pytest.mark.parametrize("change", ["ranges", "content"])
def test_a_server_without_ranges_or_with_another_version_begins_anew(host, change):
    host.break_after = [640_000] + [0] * 4
    with consent(), pytest.raises(FetchError):
        local_path(f"{host.url}/a.bin")
    expected = CONTENT
    if change == "ranges":
        host.ranges = False
    else:
        expected = host.files["/a.bin"] = CONTENT[::-1]
    with consent():
        assert local_path(f"{host.url}/a.bin").read_bytes() == expected


def test_processes_fetch_once(host):
    script = (
        "from diffdistill.files.remote import local_path; import sys; print(len(local_path(sys.argv[1]).read_bytes()))"
    )
    env = {**os.environ, "DIFFDISTILL_FETCH": "1"}

    def run(_):
        return subprocess.run(
            [sys.executable, "-c", script, f"{host.url}/a.bin"], env=env, capture_output=True, text=True, check=True
        ).stdout.strip()

    with ThreadPoolExecutor(3) as threads:
        assert set(threads.map(run, range(3))) == {str(len(CONTENT))}
    assert sum(method == "GET" for method, path, _ in host.asked) == 1


def test_what_cannot_be_fetched_is_one_line(host, monkeypatch):
    with consent():
        with pytest.raises(FetchError, match=r"could not fetch .*missing: no such file"):
            local_path(f"{host.url}/missing")
        with pytest.raises(FetchError, match="no connection"):
            local_path("http://127.0.0.1:9/a.bin")
        with pytest.raises(FetchError, match="begins with https://"):
            local_path("http://example.com/a.bin")
        monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
        with pytest.raises(FetchError, match=r"no space for .*: it needs 1.28 MB, and .* has 1 kB left"):
            local_path(f"{host.url}/a.bin")


@pytest.mark.parametrize("name", ["hf:", "hf:owner", "hf:owner/name@", "hf:a/b/c", "hf:a/b:../secret", "hf:a/b:x//y"])
def test_names_that_are_none(name):
    with pytest.raises(FetchError, match="write hf:OWNER/NAME"):
        HubName.parse(name)


def test_names_of_the_hub():
    assert HubName.parse("hf:a/b.c@v1:x/y z.safetensors") == HubName(
        "hf:a/b.c@v1:x/y z.safetensors", "a/b.c", "v1", "x/y z.safetensors"
    )
    assert is_remote("hf:a/b") and is_remote("https://x/y") and not is_remote("runs/a")
    assert hub_hint("stable-diffusion-v1-5/stable-diffusion-v1-5").endswith(
        "hf:stable-diffusion-v1-5/stable-diffusion-v1-5"
    )
    assert hub_hint("runs/a/b") == hub_hint("digits") == ""


PIPELINE = [
    *("model_index.json", "README.md", "v1-5.ckpt", "v1-5.safetensors", "unet/config.json", "scheduler/config.json"),
    *("unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.safetensors"),
    *("unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.non_ema.safetensors"),
    *("text_encoder/config.json", "text_encoder/pytorch_model.bin", "tokenizer/vocab.json", "tokenizer/merges.txt"),
    *("vae/config.json", "vae/diffusion_pytorch_model.fp16.safetensors"),
    *("text_encoder_2/model-00001-of-00002.safetensors", "text_encoder_2/model-00002-of-00002.safetensors"),
    *("text_encoder_2/model.safetensors.index.json", "text_encoder_2/config.json"),
]


def test_of_a_pipeline_what_is_read_is_chosen():
    name = HubName.parse("hf:a/b")
    assert set(chosen_files(name, PIPELINE)) == {
        *("model_index.json", "unet/config.json", "scheduler/config.json", "text_encoder/config.json"),
        *("unet/diffusion_pytorch_model.safetensors", "text_encoder/pytorch_model.bin", "tokenizer/vocab.json"),
        *("tokenizer/merges.txt", "vae/config.json", "vae/diffusion_pytorch_model.fp16.safetensors"),
        *("text_encoder_2/model-00001-of-00002.safetensors", "text_encoder_2/model-00002-of-00002.safetensors"),
        *("text_encoder_2/model.safetensors.index.json", "text_encoder_2/config.json"),
    }
    half = chosen_files(name, PIPELINE, variant="fp16")
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in half
    assert "unet/diffusion_pytorch_model.safetensors" not in half


def test_of_other_repositories_one_file_is_chosen():
    name = HubName.parse("hf:a/b")
    assert chosen_files(name, ["README.md", "edm.pkl"]) == ["edm.pkl"]
    assert chosen_files(name, ["model.safetensors", "old.pt"]) == ["model.safetensors"]
    with pytest.raises(FetchError, match=r"several models: say which, as hf:a/b:x.pkl \(of x.pkl, y.pkl\)"):
        chosen_files(name, ["x.pkl", "y.pkl"])
    with pytest.raises(FetchError, match="holds no model that is read: it has README.md"):
        chosen_files(name, ["README.md"])
    with pytest.raises(FetchError, match="has no file 'z.pkl': it has x.pkl"):
        chosen_files(HubName.parse("hf:a/b:z.pkl"), ["x.pkl"])


HUB = """
import sys
from diffdistill.files.remote import FetchError, consent, local_path
from diffdistill.models import load_denoiser
try:
    with consent("fetch" in sys.argv[2:]):
        path = local_path(sys.argv[1])
        print(path)
        if "load" in sys.argv[2:]:
            print(load_denoiser(sys.argv[1]).num_classes)
except FetchError as error:
    print("refused:", error)
"""


@pytest.fixture
def hub(host, tmp_path):
    """Runs a command in a fresh process whose hub is the server, and returns what it prints."""
    pytest.importorskip("huggingface_hub")
    host.repos["we/digits"] = {
        "model.safetensors": shipped_models()["digits-student-4"].read_bytes(),
        "README.md": b"#" * 2000,
    }

    def run(*arguments, **env):
        env = {**os.environ, "HF_ENDPOINT": host.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1", **env}
        done = subprocess.run([sys.executable, "-c", HUB, *arguments], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


def test_a_model_of_the_hub(hub, host):
    refusal = hub("hf:we/digits")
    assert refusal.startswith("refused: hf:we/digits is not on this machine: it would be fetched, 1 file from http://")
    path, classes = hub("hf:we/digits", "fetch", "load").splitlines()
    assert path.endswith("model.safetensors") and classes == "10"
    assert not any("README" in asked for _, asked, _ in host.asked)
    host.asked.clear()
    host.repos["we/digits"]["model.safetensors"] = b"another" * 500  # what it was at first is pinned
    assert hub("hf:we/digits", "load", HF_HUB_OFFLINE="1").splitlines() == [path, "10"]
    assert host.asked == []


def test_what_the_hub_refuses(hub, host):
    assert "the hub has no repository 'we/nothing'" in hub("hf:we/nothing", "fetch")
    assert "has no file 'x.pt': it has model.safetensors" in hub("hf:we/digits:x.pt", "fetch")
    assert "HF_HUB_OFFLINE forbids" in hub("hf:we/digits", "fetch", HF_HUB_OFFLINE="1")
    host.lie = True
    assert "came damaged" in hub("hf:we/digits", "fetch")
    host.lie, host.gated = False, True
    assert "needs a token" in hub("hf:we/digits", "fetch")


def test_an_unknown_name_that_looks_like_one_of_the_hub():
    with pytest.raises(ValueError, match="a repository of the hub is hf:stable-diffusion-v1-5/stable-diffusion-v1-5"):
        load_denoiser("stable-diffusion-v1-5/stable-diffusion-v1-5")
