"""Users, passwords and signatures in addresses of data: used, and then nowhere to be found. A web server on loopback
that wants them."""

import base64
import json
import logging
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs, urlsplit

import aiohttp
import pytest
import yaml
from conftest import PLAIN, error_line, flags, run_command, tiny_rae
from huggingface_hub import ModelCard
from test_streams import Handler, Server, settings, write_shards, write_tar

import eval_rfid
import linear_probe
from rae_suite import trackers
from rae_suite.cli import config_dict, config_yaml
from rae_suite.errors import ConfigError, DataError, UnreadableImage, one_line, scrub
from rae_suite.launch import run_main
from rae_suite.settings import check_same_config
from rae_suite.settings_rae import parse_config
from rae_suite.shards import list_shards
from rae_suite.streams import open_stream
from scripts import push_to_hub

PASSWORD, SIGNATURE, OTHER_SIGNATURE = "pa55-w.rd", "5IGNATURE%2F1", "5IGNATURE%2F2"
SECRETS = ("robin", PASSWORD, "5IGNATURE", "X-Amz")


def without_secrets(text: str) -> str:
    assert not [secret for secret in SECRETS if secret in text], text
    return text


# What goes out --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, expected",
    [
        ("https://robin:pw@host:80/a.tar?X-Amz-Signature=S", "https://<secret>@host:80/a.tar?<secret>"),
        ("https://robin@host/t-{0..3}.tar?X={a,b}", "https://<secret>@host/t-{0..3}.tar?<secret>"),
        ("https://robin:p/w?x@host/a.tar", "https://<secret>@host/a.tar"),
        ("https://robin:p/w@host/a.tar", "https://<secret>@host/a.tar"),
        ("https://robin:p@w@host/a.tar", "https://<secret>@host/a.tar"),
        ("simplecache::s3://k:s@b/x.tar::https://u:p@h/y?z=1", "simplecache::s3://<secret>@b/x.tar::https://<secret>@h/y?<secret>"),
        ("403, message='Forbidden', url='https://h/a.tar?sig=1%2F&t=2'", "403, message='Forbidden', url='https://h/a.tar?<secret>'"),
        ("GET /a.tar?sig=1: refused", "GET /a.tar?<secret> refused"),
        ("https://a:b@h/x and http://c:d@h/y?e", "https://<secret>@h/x and http://<secret>@h/y?<secret>"),
        ("hf://datasets/u/n@refs%2Fconvert/x.parquet", "hf://datasets/u/n@refs%2Fconvert/x.parquet"),
        ("https://host:8080/v@2/a.tar", "https://host:8080/v@2/a.tar"),
        ("data/what?.png is none, is it? no@where", "data/what?.png is none, is it? no@where"),
        ("hf_AbcAbcAbcAbcAbcAbc", "<token>"),
    ],
)  # fmt: skip
def test_scrub(text, expected):
    assert scrub(text) == expected and scrub(expected) == expected


def test_what_libraries_say_is_scrubbed(capsys):
    """As an error of aiohttp, in an image's name, in the one line at the end, and in a traceback."""
    url = f"https://robin:{PASSWORD}@host/a.tar?X-Amz-Signature={SIGNATURE}"
    request = SimpleNamespace(real_url=url)
    error = aiohttp.ClientResponseError(request, (), status=403, message="Forbidden")
    assert PASSWORD in str(error)
    assert "403" in without_secrets(one_line(error))
    without_secrets(str(UnreadableImage("x", f"{error}")))

    def fail(kind):
        raise kind(f"data.path: {url} cannot be read: {error}")

    for kind in (DataError, ConfigError):
        with pytest.raises(SystemExit):
            run_main(lambda kind=kind: fail(kind))
        assert "https://<secret>@host/a.tar" in without_secrets(capsys.readouterr().err)
    hook = sys.excepthook
    try:
        run_main(lambda: fail(KeyError))
    except KeyError:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.excepthook = hook
    printed = without_secrets(capsys.readouterr().err)
    assert printed.startswith("Traceback") and "KeyError" in printed


def test_trackers_get_no_credentials(tmp_path, monkeypatch):
    """Neither with the settings nor through sys.argv, which wandb publishes."""
    url = f"https://robin:{PASSWORD}@host/a.tar?X-Amz-Signature={SIGNATURE}"
    argv = ["--data.streaming", "--data.path", url, "--data.eval_path", url, "--data.steps_per_epoch", "1"]
    monkeypatch.setattr(sys, "argv", ["train_rae.py", *argv])
    config, seen = parse_config(), []
    assert config.data.path == url
    tracker = SimpleNamespace(name="wandb", store_init_configuration=seen.append, log_images=None)
    accelerator = SimpleNamespace(
        is_main_process=True, trackers=[tracker], init_trackers=lambda *a, **k: seen.append(list(sys.argv))
    )
    trackers.start_trackers(config, accelerator, tmp_path, 0)
    assert len(seen) == 2 and seen[1] == config_dict(config)
    assert "https://<secret>@host/a.tar?<secret>" in without_secrets(json.dumps(seen))


def test_addresses_whose_credentials_could_not_be_found_again():
    for path in ("https://robin:a b@host/x.tar", "https://h/x.tar?a='b", "https://h/x.tar?a b"):
        with pytest.raises(DataError, match="has a space or a quotation mark in its user, password or query") as raised:
            list_shards(path, "data.path")
        assert "a b" not in str(raised.value) and "'b" not in str(raised.value)
    assert list_shards("https://host/a b@2.tar", "data.path") == ["https://host/a b@2.tar"]


# A run ----------------------------------------------------------------------------------------------------------------


class StrictHandler(Handler):
    """Wants user, password and a signature."""

    def do_GET(self):
        signature = parse_qs(urlsplit(self.path).query).get("X-Amz-Signature")
        login = base64.b64encode(f"robin:{PASSWORD}".encode()).decode()
        if signature is None or self.headers["Authorization"] != f"Basic {login}":
            self.send_error(403)
        else:
            super().do_GET()

    do_HEAD = do_GET


@pytest.fixture
def server(tmp_path):
    """Four shards, one of them damaged, and a list of two."""
    write_shards(tmp_path / "web", [10, 10, 10, 10], write_tar, side=40)
    (tmp_path / "web/train-002.tar").write_bytes(b"no tar" * 500)
    with Server(tmp_path / "web") as server:
        server.RequestHandlerClass = StrictHandler
        server.secret = f"http://robin:{PASSWORD}@127.0.0.1:{server.server_port}"
        yield server


def commands(server, run_dir: Path, signature: str, **changes) -> dict:
    query = f"?X-Amz-Signature={signature}"
    lines = f"{server.secret}/train-{{000..001}}.tar{query}\n"
    (server.folder / "list.txt").write_text(lines)
    return {
        **PLAIN, "gan.weight": 0, "data.streaming": "true",
        "data.path": f"{server.secret}/train-{{000..003}}.tar{query}",
        "data.eval_path": f"{server.secret}/list.txt{query}", "data.steps_per_epoch": 3, "eval.num_samples": 8,
        "data.stream_lanes": 4, "train.output_dir": run_dir, "logging.report_to": "tensorboard",
        "data.shard_retries": 0, "train.max_steps": 3, **changes,
    }  # fmt: skip


def everything_in(folder: Path) -> str:
    return "\n".join(
        f"{file}\n{file.read_bytes().decode(errors='replace')}" for file in folder.rglob("*") if file.is_file()
    )


def test_a_run_keeps_its_secrets(server, tmp_path, capsys, monkeypatch):
    """It trains and evaluates with them; no file of its folder, no line of its output and no card has them; it goes on
    with another signature, and says what is missing when its own config.yaml is all that it is given."""
    run_dir = tmp_path / "run"
    first = run_command("train_rae.py", *flags(commands(server, run_dir, SIGNATURE)))
    assert "train-002.tar" in without_secrets(first.stdout + first.stderr)  # which is named as unreadable
    files = without_secrets(everything_in(run_dir))
    address = f"http://<secret>@127.0.0.1:{server.server_port}/train-{{000..003}}.tar?<secret>"
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["data"]["path"] == address
    assert f"127.0.0.1:{server.server_port}/train-003.tar" in files  # shards.json
    again = run_command("train_rae.py", *flags(commands(server, run_dir, OTHER_SIGNATURE, **{"train.max_steps": 6})))
    assert "continuing from" in without_secrets(again.stdout + again.stderr)
    without_secrets(everything_in(run_dir))

    done = run_command("train_rae.py", "--config", run_dir / "config.yaml", "--train.max_steps", 9, check=False)
    line = error_line(done.stderr)
    assert done.returncode == 2
    assert line.startswith(
        f"error: data.path: {address} is without its user, password or query, which are never written"
    )

    monkeypatch.setattr(sys, "argv", ["push", "--model", f"{run_dir}/final", "--repo_id", "user/rae", "--dry_run"])
    run_main(push_to_hub.main)
    without_secrets(everything_in(run_dir))
    card = ModelCard.load(run_dir / "final-upload/README.md")
    assert card.data.eval_results[0].dataset_name == "list.txt"  # data.eval_path
    assert "Trained on `train-{000..003}.tar`" in card.text and address in card.text


def test_a_server_that_refuses(server, tmp_path):
    """Wrong credentials: one line without them."""
    changes = {
        "data.path": f"{server.secret[:-6]}9@127.0.0.1:{server.server_port}/train-000.tar?X-Amz-Signature=5IGNATURE"
    }
    done = run_command("train_rae.py", *flags(commands(server, tmp_path / "run", SIGNATURE, **changes)), check=False)
    assert done.returncode == 2 and "error: data.path: none of the first 1 shards" in error_line(done.stderr)
    without_secrets(done.stdout + done.stderr)


def test_a_mixture_keeps_its_secrets(server, tmp_path, caplog):
    """Its keys are addresses; two that differ in credentials alone would be one where they are written down."""
    caplog.set_level(logging.INFO)
    query = f"?X-Amz-Signature={SIGNATURE}"
    mixture = {f"{server.secret}/train-00{i}.tar{query}": 1.0 for i in (0, 1, 3)}
    argv = ["--data.streaming", "--data.mixture", json.dumps(mixture), "--data.eval_path", "x"]
    config = parse_config([*argv, "--data.steps_per_epoch", "10"])
    assert config.data.mixture == mixture
    (tmp_path / "config.yaml").write_text(without_secrets(config_yaml(config)))
    other = {path.replace(SIGNATURE, OTHER_SIGNATURE): weight for path, weight in mixture.items()}
    check_same_config(replace(config, data=replace(config.data, mixture=other)), tmp_path / "config.yaml")
    cfg = settings("", mixture=mixture, steps_per_epoch=10)
    stream = open_stream(cfg, 8, 0, SimpleNamespace(is_main_process=True, num_processes=1))
    without_secrets(json.dumps(stream.record()) + caplog.text)
    kept = parse_config(["--config", str(tmp_path / "config.yaml")])
    with pytest.raises(DataError, match="data.mixture: .* is without its user, password or query"):
        open_stream(replace(kept.data, stream_lanes=4), 8, 0, SimpleNamespace(is_main_process=True, num_processes=1))
    same = {f"{server.secret}/train-000.tar?X-Amz-Signature={i}": 1.0 for i in range(2)}
    with pytest.raises(SystemExit):
        parse_config([*argv, "--data.mixture", json.dumps(same), "--data.steps_per_epoch", "10"])


def test_run_folders_of_earlier_versions(tmp_path):
    """Whose config.yaml has credentials: it is the same run still, and its card has none."""
    url = f"https://robin:{PASSWORD}@host/t-{{0..3}}.tar?X-Amz-Signature="
    argv = ["--data.streaming", "--data.path", url + SIGNATURE, "--data.steps_per_epoch", "1"]
    config, saved = parse_config(argv), tmp_path / "run/config.yaml"
    saved.parent.mkdir()
    tree = config_dict(config)
    tree["data"]["path"] = url + OTHER_SIGNATURE
    saved.write_text(yaml.safe_dump(tree, sort_keys=False))
    assert PASSWORD in saved.read_text()
    check_same_config(config, saved)
    tiny_rae().save_pretrained(tmp_path / "run/final")
    run_command("scripts/push_to_hub.py", "--model", tmp_path / "run/final", "--repo_id", "user/rae", "--dry_run")
    card = without_secrets((tmp_path / "run/final-upload/README.md").read_text())
    assert "https://<secret>@host/t-{0..3}.tar?<secret>" in card and "Trained on `t-{0..3}.tar`" in card


@pytest.mark.parametrize("key", ["data.eval_path", "train.max_steps", "data.mixture"])
def test_values_that_are_cut_short(key, capsys):
    """A long one is cut in the message, and not in the middle of a password."""
    for length in range(0, 120, 5):
        with pytest.raises(SystemExit):
            parse_config([f"--{key}", f"https://robin:{'x' * length}{PASSWORD}{'y' * 100}@host/a.tar"])
        assert f"{key}: expected" in without_secrets(capsys.readouterr().err)


@pytest.mark.parametrize("main", [eval_rfid.main, linear_probe.main])
def test_commands_that_take_no_address(main, monkeypatch, capsys):
    url = f"https://robin:{PASSWORD}@host/a.tar?X-Amz-Signature={SIGNATURE}"
    monkeypatch.setattr(sys, "argv", ["command", "--model", "x", "--data.path", url])
    with pytest.raises(SystemExit) as stopped:
        run_main(main)
    assert stopped.value.code == 2
    assert "error: data.path: https://<secret>@host/a.tar?<secret>" in without_secrets(capsys.readouterr().err)
