"""The loop's parts as mathematics, and pretraining as a user runs it: the run folder, the error messages, resuming."""
import csv
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import data
import pretrain
from conftest import ROOT, TINY, environment, error_of, one_line_error, run_script, torchrun, write_images
from models import Encoder
from pretrain import KeyQueue, ema_update, lr_at, smoothing_at


def test_queue_is_a_ring_for_any_batch_size():
    queue, history = KeyQueue(4, 10), []
    assert (queue.index == -1).all() and torch.allclose(queue.keys.norm(dim=1), torch.ones(10))
    for number, size in enumerate((3, 7, 4, 10, 25, 1)):
        keys, index = torch.randn(size, 4), torch.arange(size) + 100 * number
        queue.enqueue(keys, index)
        history += list(zip(index.tolist(), keys))
        newest = dict(history[-10:])
        held = {int(i): k for i, k in zip(queue.index, queue.keys) if i >= 0}
        assert held.keys() == newest.keys() and all(torch.equal(held[i], newest[i]) for i in held)
    assert queue.pointer == (3 + 7 + 4 + 10 + 25 + 1) % 10


def test_momentum_update_is_the_formula_and_leaves_buffers_alone():
    torch.manual_seed(0)
    q, k = (Encoder("mobilenetv3_small", 8, 16, True) for _ in range(2))
    q(torch.randn(4, 3, 32, 32))
    expected = [0.9 * b + 0.1 * a for a, b in zip(q.parameters(), k.parameters())]
    buffers = [b.clone() for b in k.buffers()]
    ema_update(q, k, 0.9)
    for a, b in zip(expected, k.parameters()):
        torch.testing.assert_close(a, b)
    assert all(torch.equal(a, b) for a, b in zip(buffers, k.buffers()))


def test_learning_rate_is_linear_then_a_cosine():
    c = dict(lr=0.12, batch_size=512, warmup_epochs=3.0, epochs=13, smoothing=0.1, symmetric=True, queue_size=4096)
    rates = [lr_at(step, c, 100) for step in range(1300)]
    assert math.isclose(rates[0], 0.24 / 300) and math.isclose(rates[299], 0.24) and math.isclose(rates[300], 0.24)
    assert math.isclose(rates[800], 0.12) and rates[-1] < 1e-5 and rates[299:] == sorted(rates[299:], reverse=True)
    assert lr_at(0, c | {"warmup_epochs": 0.0}, 100) == 0.24
    assert lr_at(3, c | {"warmup_epochs": 0.9, "epochs": 1}, 3) == 0.24      # a dry run past a warm-up that is all there is


def test_smoothing_waits_for_the_warm_up_and_for_real_keys():
    c = dict(batch_size=100, warmup_epochs=1.0, smoothing=0.2, symmetric=False, queue_size=2500)
    assert [smoothing_at(s, c, 10) for s in (0, 10, 24, 25, 99)] == [0, 0, 0, 0.2, 0.2]
    assert [smoothing_at(s, c, 50) for s in (25, 49, 50)] == [0, 0, 0.2]
    assert smoothing_at(13, c | {"symmetric": True}, 10) == 0.2


def test_keys_are_normalised_in_other_company_than_their_queries():
    """Slices of the queries are neighbours in the batch; of 64 pairs that share a query slice few share a key slice."""
    order = torch.from_numpy(data.keyed_permutation(64, data.SHUFFLE, 0, 5))
    query_slice = torch.arange(64) // 8
    key_slice = torch.empty(64, dtype=torch.long)
    key_slice[order] = torch.arange(64) // 8
    same_query = query_slice[:, None] == query_slice
    same_key = key_slice[:, None] == key_slice
    off_diagonal = ~torch.eye(64, dtype=torch.bool)
    assert (same_query & same_key & off_diagonal).sum() < 0.4 * (same_query & off_diagonal).sum()
    assert not torch.equal(order, torch.from_numpy(data.keyed_permutation(64, data.SHUFFLE, 0, 6)))      # anew every step

    # and encode_keys does it: with key k of image i alone changed, only its own shuffled company sees it
    p = pretrain.SimpleNamespace(rank=0, world=1)
    encoder = Encoder("mobilenetv3_small", 8, 16, True, slice_size=8)
    views = torch.randn(1, 64, 3, 32, 32)
    before = pretrain.encode_keys(encoder, views, None, None, (0,), order, p)[0]
    views[0, 3] += 1
    after = pretrain.encode_keys(encoder, views, None, None, (0,), order, p)[0]
    moved = (before - after).abs().amax(1) > 1e-6
    assert torch.equal(moved, key_slice == key_slice[3])


def test_every_setting_is_resolved_with_its_origin(images):
    dataset = data.load_dataset(str(images), "train")
    flags = pretrain.read_flags(["--data", str(images), "--recipe", "small", "--temperature", "0.3", "--jitter", "1", "1", "1", ".2"])
    c, origin = pretrain.resolve(flags, dataset, 512)
    assert c["temperature"] == 0.3 and origin["temperature"] == "command line" and c["jitter"] == [1, 1, 1, 0.2]
    assert c["queue_size"] == 64 and origin["queue_size"].startswith("scale of")
    assert c["gray_p"] == 0.5 and origin["gray_p"] == "recipe small"
    assert c["lr"] == 0.03 and origin["lr"].startswith("scale of")
    assert c["hidden_dim"] == 1024 and c["blur_p"] == 0 and c["image_size"] == 32
    assert set(origin) == set(c) and origin["data"] == "command line" and origin["workers"] == "default"


def test_mocos_cifar_settings_are_reachable(images):
    """The official CIFAR-10 notebook's settings, all by flags."""
    argv = ("--recipe moco_v2 --arch resnet18 --batch-size 512 --lr 0.03 --weight-decay 5e-4 --queue-size 4096 --key-momentum 0.99 "
            "--temperature 0.1 --hidden-dim 0 --bn-splits 8 --min-scale 0.08 --jitter 0.4 0.4 0.4 0.1 --jitter-p 0.8 --gray-p 0.2 "
            "--blur-p 0 --epochs 200 --no-symmetric --image-size 32 --warmup-epochs 0 --dim 128")
    c, _ = pretrain.resolve(pretrain.read_flags(argv.split()), data.load_dataset(str(images), "train"), 512)
    wanted = dict(batch_size=512, weight_decay=5e-4, queue_size=4096, key_momentum=0.99, temperature=0.1, hidden_dim=0, bn_splits=8,
                  min_scale=0.08, blur_p=0, epochs=200, symmetric=False, smoothing=0, sgd_momentum=0.9)
    assert {k: c[k] for k in wanted} == wanted and lr_at(0, c, 97) == 0.06


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    """One finished run of two epochs, shared by the tests that look at it or copy it."""
    folder = tmp_path_factory.mktemp("finished")
    result = run_script("pretrain.py", "--data", images, "--out", "run", *TINY, cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder / "run", result.stdout


def rows_of(run):
    with open(run / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_run_folder_has_all_that_others_read(run):
    folder, output = run
    assert {f.name for f in folder.iterdir()} == {"args.json", "log.csv", "views.png", "last.pt", "backbone.pt", "backbone.json"}
    about = json.loads((folder / "backbone.json").read_text())
    assert about["arch"] == "mobilenetv3_small" and about["feature_dim"] == 1024 and about["image_size"] == 32 and about["epoch"] == 2
    from torchvision.models import mobilenet_v3_small
    unmatched = mobilenet_v3_small().load_state_dict(torch.load(folder / "backbone.pt", weights_only=True), strict=False)
    assert not unmatched.unexpected_keys
    state = torch.load(folder / "last.pt", weights_only=True)
    assert state["step"] == 12 and (state["queue"]["index"] >= 0).all()
    rows = rows_of(folder)
    assert [int(r["step"]) for r in rows] == [6, 12] and all(0 <= float(r["knn_backbone"]) <= 1 for r in rows)
    assert math.isclose(float(rows[0]["chance"]), math.log(33), rel_tol=1e-6)
    for words in ("temperature", "recipe light", "command line", "kNN of the backbone", "next: python lineval.py"):
        assert words in output


def test_same_command_after_the_end_says_so_and_changes_nothing(run, images):
    folder, _ = run
    before = (folder / "last.pt").read_bytes()
    result = run_script("pretrain.py", "--data", images, "--out", folder, *TINY, cwd=folder.parent)
    assert result.returncode == 0 and "after step 12 of 12" in result.stdout and (folder / "last.pt").read_bytes() == before


@pytest.mark.parametrize("workers, steps", [(0, 10), (6, 12)])      # two rounds of the workers
def test_dry_run_writes_nothing(images, tmp_path, capsys, monkeypatch, workers, steps):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrain.signal, "signal", lambda *_: None)      # this process is pytest's
    with pytest.raises(SystemExit) as stopped:
        pretrain.main(["--data", str(images), "--dry-run", *TINY, "--workers", str(workers)])
    output = capsys.readouterr().out
    assert stopped.value.code == 0 and all(w in output for w in (f"of {steps} steps", "images/s", "GiB", "hours"))
    assert not list(tmp_path.iterdir())


def test_dry_run_of_a_slow_loader_tells_the_loaders_speed(images, capsys, monkeypatch):
    """Steps that find their batches ready look faster than the run will be."""
    monkeypatch.setattr(pretrain.signal, "signal", lambda *_: None)
    whole = data.TwoViews.__getitems__
    monkeypatch.setattr(data.TwoViews, "__getitems__", lambda views, items: (time.sleep(0.2), whole(views, items))[1])

    def train(s):     # a thousand steps in a second
        s.clock.steps, s.clock.started, s.clock.stopped = 1000, 0, 1
        return 0
    monkeypatch.setattr(pretrain, "train", train)
    with pytest.raises(SystemExit):
        pretrain.main(["--data", str(images), "--dry-run", *TINY, "--epochs", "20000", "--workers", "2"])
    last = capsys.readouterr().out.splitlines()[-1]
    loaded, hours = (float(re.search(p, last)[1]) for p in (r"the loader alone (\d+)", r"would take ([\d.]+) hours"))
    assert 80 < loaded < 165 and hours == pytest.approx(120_000 * 16 / loaded / 3600, rel=0.01), last     # 160: 2 x 16 / 0.2


def test_a_dry_run_stops_at_once(images, tmp_path):
    command = [sys.executable, "-u", ROOT / "pretrain.py", "--data", images, "--dry-run", *TINY, "--workers", "1"]
    with subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while " step 2/" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == -signal.SIGINT and process.stderr.read() == ""


def test_a_new_start_leaves_no_report_of_the_old_weights(run, images, tmp_path, monkeypatch):
    folder = copy_of(run, tmp_path)
    for name in ("lineval.json", "lineval-other.json", "map-other.png", "neighbors.png", "soft_positives.png", "notes.txt"):
        (folder / name).write_text("old")
    (folder / "map.png").mkdir()
    monkeypatch.setattr(pretrain.signal, "signal", lambda *_: None)
    monkeypatch.setattr(pretrain, "train", lambda s: 0)
    with pytest.raises(SystemExit):
        pretrain.main(["--data", str(images), "--out", str(folder), *TINY, "--restart"])
    assert {f.name for f in folder.iterdir()} == {"notes.txt", "map.png", "args.json", "views.png"}


@pytest.mark.parametrize("flags", [[], ["--restart"]])
@pytest.mark.parametrize("files", [{"map.png": "a map"}, {"log.csv": "day,rain"}, {"args.json": '{"recipe": "soup"}'},
                                   {"views.png": "", "args.json": "7"}])
def test_a_folder_of_other_files_is_left_alone(images, tmp_path, files, flags, capsys):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    line = error_of(pretrain.main, ["--data", images, "--out", tmp_path, *TINY, *flags], capsys)
    assert any(name in line for name in files) and "--out" in line
    assert {f.name: f.read_text() for f in tmp_path.iterdir()} == files


def test_a_folder_that_is_forbidden_to_look_at_is_named(images, capsys, monkeypatch):
    def forbidden(path):
        raise PermissionError(13, "Permission denied", str(path))
    monkeypatch.setattr(pretrain.Path, "exists", forbidden)
    line = error_of(pretrain.main, ["--data", images, "--out", "locked/run", *TINY], capsys)
    assert "cannot write locked/run (Permission denied)" in line


def test_a_folder_called_shapes_is_not_the_demo(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(images, tmp_path / "shapes")
    for name, temperature in ("shapes", 0.2), ("./shapes", 0.1):
        settings, _ = pretrain.resolve(pretrain.read_flags(["--data", name]), data.load_dataset(name, "train"), 576)
        assert settings["temperature"] == temperature


@pytest.mark.parametrize("flags, words", [
    (["--data", "nowhere"], ["nowhere", "does not exist"]),
    (["--arch", "resnet19"], ["resnet19", "resnet18"]),
    (["--recipe", "heavy"], ["heavy", "light"]),
    (["--batch-size", "512"], ["96 images", "512"]),
    (["--batch-size", "30"], ["30", "--bn-splits 4"]),
    (["--bn-splits", "16"], ["--batch-size 16", "at least 2"]),
    (["--queue-size", "500"], ["--queue-size 500", "192 keys"]),
    (["--neighbors", "40"], ["--neighbors 40", "32"]),
    (["--lr", "nan"], ["--lr nan"]),
    (["--temperature", "0"], ["--temperature 0.0", "above 0"]),
    (["--hidden-dim", "wide"], ["wide"]),
    (["--hidden-dim", "infx"], ["infx"]),
    (["--seed", "-1"], ["--seed -1"]),
    (["--out", __file__], [__file__, "cannot write"]),
    (["--init", "nowhere.pt"], ["nowhere.pt", "does not exist"]),
    (["--epochs", "x"], ["epochs"]),
])
def test_bad_settings_are_one_line(images, tmp_path, flags, words, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = error_of(pretrain.main, ["--data", images, *TINY, *flags], capsys)
    assert all(w in line for w in words), line
    assert not (tmp_path / "runs").exists()


def test_errors_reach_the_shell_as_one_line(images, tmp_path):
    one_line_error(run_script("pretrain.py", "--data", tmp_path / "nowhere", cwd=tmp_path), "nowhere", "does not exist")


def test_unreadable_image_is_named_and_the_run_saved(tmp_path):
    folder = write_images(tmp_path / "images", 48)
    broken = sorted((folder / "train").rglob("*.png"))[20]
    broken.write_bytes(b"no image")
    arguments = ["pretrain.py", "--data", folder, "--out", "run", *TINY[:-1], 1, "--batch-size", 8]
    result = run_script(*arguments, cwd=tmp_path)
    one_line_error(result, broken.name, "saved")
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["step"] >= 0


def copy_of(run, tmp_path):
    return shutil.copytree(run[0], tmp_path / "run")


def test_other_settings_against_a_run_are_listed(run, images, tmp_path, capsys):
    folder = copy_of(run, tmp_path)
    line = error_of(pretrain.main, ["--data", images, "--out", folder, *TINY, "--lr", "0.5", "--temperature", "0.3"], capsys)
    assert all(w in line for w in ("lr was 0.03, now 0.5", "temperature was 0.1, now 0.3", "--restart")), line


def test_weights_without_their_checkpoint_are_not_written_over(run, images, tmp_path, capsys):
    folder = copy_of(run, tmp_path)
    (folder / "last.pt").unlink()
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    line = error_of(pretrain.main, ["--data", images, "--out", folder, *TINY], capsys)
    assert "no last.pt" in line and "--restart" in line
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before


@pytest.mark.parametrize("content, flag", [(b"garbage", None), (b"", None), ("truncated", None), ("bomb", None), ("bomb", "--init")])
def test_bad_checkpoints_are_named_and_nothing_in_them_runs(run, images, tmp_path, content, flag, capsys):
    folder = copy_of(run, tmp_path)
    whole = (folder / "last.pt").read_bytes()
    path = folder / "last.pt" if flag is None else tmp_path / "weights.pt"
    if content == "bomb":
        class Bomb:
            def __reduce__(self):
                return (open, (str(tmp_path / "ran"), "w"))
        torch.save({"settings": {}, "queue": Bomb()}, path)
    else:
        path.write_bytes(whole[:len(whole) // 2] if content == "truncated" else content)
    before = path.read_bytes()
    more = [flag, path, "--restart"] if flag else []
    line = error_of(pretrain.main, ["--data", images, "--out", folder, *TINY, *more], capsys)
    assert path.name in line and "cannot be loaded" in line
    assert not (tmp_path / "ran").exists() and path.read_bytes() == before


def test_init_starts_from_the_given_weights_and_refuses_another_arch(run, images, tmp_path, capsys, monkeypatch):
    weights = run[0] / "backbone.pt"
    encoder = Encoder("mobilenetv3_small", small_images=True)
    from lineval import load_weights
    load_weights(encoder.backbone, weights)
    saved = torch.load(weights, weights_only=True)
    assert all(torch.equal(v, saved[k]) for k, v in encoder.backbone.state_dict().items())
    monkeypatch.chdir(tmp_path)
    line = error_of(pretrain.main, ["--data", images, "--arch", "resnet18", "--init", weights, *TINY], capsys)
    assert "backbone.pt" in line and "--arch" in line


def test_processes_must_share_the_slices(images):
    c, _ = pretrain.resolve(pretrain.read_flags(["--data", str(images), *TINY]), data.load_dataset(str(images), "train"), 1024)
    with pytest.raises(pretrain.UserError, match="--bn-splits 4.*3 processes"):
        pretrain.check(c, 96, 3)


@pytest.mark.slow
def test_processes_print_an_error_that_all_make_once(images, tmp_path):
    result = torchrun(3, "pretrain.py", "--data", images, *TINY, "--batch-size", "24", cwd=tmp_path)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode != 0 and len(errors) == 1 and "--bn-splits 4" in errors[0] and "3 processes" in errors[0]
    assert "Traceback (most recent call last):\n  File \"" + str(pretrain.__file__) not in result.stderr


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(images, tmp_path):
    result = run_script("pretrain.py", "--data", images, "--out", "run", *TINY, "--lr", "1e30", "--log-every", "1", cwd=tmp_path)
    one_line_error(result, "not finite at step", "--lr")
    assert not (tmp_path / "run" / "last.pt").exists()
