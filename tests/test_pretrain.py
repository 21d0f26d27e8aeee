"""The loop's parts as mathematics, and pretraining as a user runs it: the run folder, the error messages, resuming."""
import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import data
import lineval
import pretrain
from conftest import TINY, environment, error_of, one_line_error, run_script, torchrun, write_images
from models import Encoder
from pretrain import KeyQueue, ema_update, lr_at, smoothing_at


def test_queue_holds_the_last_keys_for_any_batch_size():
    queue, history = KeyQueue(10, 4), []
    assert (queue.index == -1).all() and torch.allclose(queue.keys.norm(dim=1), torch.ones(10))
    for number, size in enumerate((3, 7, 4, 10, 25, 1)):
        keys, index = torch.randn(size, 4), torch.arange(size) + 100 * number
        queue.enqueue(keys, index)
        history += list(zip(index.tolist(), keys))
        newest = dict(history[-10:])
        held = {int(i): k for i, k in zip(queue.index, queue.keys) if i >= 0}
        assert list(held) == list(newest)                           # the oldest first
        assert held.keys() == newest.keys() and all(torch.equal(held[i], newest[i]) for i in held)


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


def settings(**changes):
    values = dict(lr=0.12, batch_size=512, warmup_epochs=3.0, epochs=13, smoothing=0.2,
                  smoothing_schedule="constant", symmetric=True, queue_size=4096)
    return SimpleNamespace(**values | changes)


def test_learning_rate_is_linear_then_a_cosine():
    rates = [lr_at(step, 100, settings()) for step in range(1300)]
    assert math.isclose(rates[0], 0.24 / 300) and math.isclose(rates[299], 0.24)
    assert math.isclose(rates[300], 0.24) and math.isclose(rates[800], 0.12) and rates[-1] < 1e-5
    assert rates[299:] == sorted(rates[299:], reverse=True)
    assert lr_at(0, 100, settings(warmup_epochs=0.0)) == 0.24


def test_smoothing_waits_for_the_warm_up_and_for_real_keys():
    args = settings(batch_size=100, warmup_epochs=1.0, symmetric=False, queue_size=2500)
    assert [smoothing_at(step, 10, args) for step in (0, 10, 24, 25, 99)] == [0, 0, 0, 0.2, 0.2]
    assert [smoothing_at(step, 50, args) for step in (25, 49, 50)] == [0, 0, 0.2]
    args.symmetric = True
    assert smoothing_at(13, 10, args) == 0.2


def test_smoothing_may_ramp_up_over_the_whole_run():
    args = settings(smoothing_schedule="cosine", warmup_epochs=0.0, epochs=10, queue_size=1)
    assert smoothing_at(50, 10, args) == pytest.approx(0.1)
    assert smoothing_at(99, 10, args) == pytest.approx(0.2, abs=1e-3)


def test_a_short_run_gets_a_fast_key_encoder_and_a_fresh_queue():
    """Memory of the key encoder: a hundredth of the steps; age of the queue: a tenth of that."""
    typed = pretrain.read_args(["--data", "x", "--batch-size", "100", "--epochs", "100"])
    scale = pretrain.scale_to(10_000, typed)                      # 10,000 steps, 200 keys each
    assert scale["key_momentum"] == 0.99 and scale["queue_size"] == 2000
    typed.epochs = 10                                             # 1,000 steps
    scale = pretrain.scale_to(10_000, typed)
    assert scale["key_momentum"] == 0.9 and scale["queue_size"] == 400        # two steps at least
    typed.epochs = 10_000
    scale = pretrain.scale_to(10_000, typed)
    assert scale["key_momentum"] == 0.999 and scale["queue_size"] == 10_000   # half an epoch
    assert pretrain.scale_to(1_281_167, typed) == {}              # ImageNet: the recipe's own


@pytest.mark.parametrize("images, epochs, batch, slices", (
    (300, None, 32, 2), (300, 20_000, 32, 2), (1000, None, 64, 2), (10_000, None, 64, 2),
    (50_000, 8, 64, 2), (50_000, 100, 128, 4), (50_000, None, 256, 8), (50_000, 800, 512, 8),
    (200_000, None, 512, 8)))
def test_the_batch_grows_with_the_steps_of_a_run(images, epochs, batch, slices):
    """The largest that leaves 20,000 steps; 200 epochs, up to 2,000 images 400."""
    typed = pretrain.read_args(["--data", "x"])
    typed.epochs = epochs
    scale = pretrain.scale_to(images, typed)
    assert scale["batch_size"] == batch and scale["bn_splits"] == slices
    assert scale["epochs"] == epochs or scale["epochs"] == (400 if images <= 2_000 else 200)


def test_the_warm_up_of_a_short_run_is_a_tenth_of_it():
    """Three epochs of warm-up would be most of a first look."""
    def warmup(recipe, epochs):
        typed = pretrain.read_args(["--data", "x", "--recipe", recipe, "--epochs", str(epochs)])
        return pretrain.scale_to(10_000, typed)["warmup_epochs"]

    assert warmup("light", 200) == 3 and warmup("light", 4) == 0.4
    assert warmup("moco_v2", 4) == 0


@pytest.mark.parametrize("flags", ("", "--no-symmetric", "--batch-size 30", "--queue-size 8"))
@pytest.mark.parametrize("count", (32, 63, 100, 159, 1000, 30_000))
def test_a_folder_needs_no_flags_and_the_rest_follows_those_given(count, flags):
    pictures = torch.zeros(count, 3, 8, 8, dtype=torch.uint8)
    dataset = data.Images("few", pictures, torch.arange(count) % 2, ["a", "b"])
    args = pretrain.read_args(["--data", "few", *flags.split()])
    pretrain.resolve(args, dataset)
    pretrain.check(args, count, world=1)


def test_keys_are_normalised_in_other_company_than_their_queries():
    """Slices of the queries are neighbours in the batch; of 64 pairs that share a query slice few share a key slice."""
    order = data.permutation(64, data.SHUFFLE, 0, 5)
    query_slice = torch.arange(64) // 8
    key_slice = torch.empty(64, dtype=torch.long)
    key_slice[order] = torch.arange(64) // 8
    same_query = query_slice[:, None] == query_slice
    same_key = key_slice[:, None] == key_slice
    off_diagonal = ~torch.eye(64, dtype=torch.bool)
    assert (same_query & same_key & off_diagonal).sum() < 0.4 * (same_query & off_diagonal).sum()
    assert not torch.equal(order, data.permutation(64, data.SHUFFLE, 0, 6))      # anew every step

    # and encode_keys does it: with view i alone changed, only its own shuffled company sees it
    encoder = Encoder("mobilenetv3_small", 8, 16, True, slice_size=8)
    views = torch.randn(64, 3, 32, 32)
    before = pretrain.encode_keys(encoder, views, order)
    views[3] += 1
    after = pretrain.encode_keys(encoder, views, order)
    moved = (before - after).abs().amax(1) > 1e-6
    assert torch.equal(moved, key_slice == key_slice[3])


def resolved(images, *flags):
    args = pretrain.read_args(["--data", str(images), *flags])
    pretrain.resolve(args, data.load_dataset(str(images), "train"))
    return args


def test_what_is_typed_beats_the_scale_of_the_data_which_beats_the_recipe(images):
    args = resolved(images, "--recipe", "small", "--temperature", "0.3")
    assert args.temperature == 0.3 and args.batch_size == 32 and args.gray_p == 0.5
    assert args.hidden_dim == 2048 and args.blur_p == 0 and args.image_size == 32
    assert args.data == str(images) and args.jitter == [0.8, 0.8, 0.8, 0.4]


def test_mocos_cifar_settings_are_reachable(images):
    """The official CIFAR-10 notebook's settings, all by flags."""
    flags = ("--recipe moco_v2 --arch resnet18 --batch-size 512 --lr 0.03 --weight-decay 5e-4 "
             "--queue-size 4096 --key-momentum 0.99 --temperature 0.1 --hidden-dim 0 "
             "--bn-splits 8 --min-scale 0.08 --blur-p 0 --epochs 200 --image-size 32")
    args = resolved(images, *flags.split())
    wanted = dict(batch_size=512, weight_decay=5e-4, queue_size=4096, key_momentum=0.99,
                  hidden_dim=0, min_scale=0.08, epochs=200, symmetric=False, smoothing=0)
    assert wanted.items() <= vars(args).items() and lr_at(0, 97, args) == 0.06


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
    assert {f.name for f in folder.iterdir()} == {"args.json", "log.csv", "views.png", "curve.png",
                                                   "last.pt", "backbone.pt", "lock.tmp"}
    settings = json.loads((folder / "args.json").read_text())
    assert settings["arch"] == "mobilenetv3_small" and settings["image_size"] == 32
    from torchvision.models import mobilenet_v3_small
    unmatched = mobilenet_v3_small().load_state_dict(torch.load(folder / "backbone.pt", weights_only=True), strict=False)
    assert not unmatched.unexpected_keys
    state = torch.load(folder / "last.pt", weights_only=True)
    assert state["step"] == 12 and (state["queue"]["index"] >= 0).all()
    rows = rows_of(folder)
    assert [int(r["step"]) for r in rows] == [6, 12] and all(0 <= float(r["knn_backbone"]) <= 1 for r in rows)
    assert math.isclose(float(rows[0]["chance"]), math.log(33), rel_tol=1e-6)
    for words in ("96 images, 3 classes (a, b, c)", "recipe light", "instead of", "typed", "kNN of the backbone", "next: python lineval.py"):
        assert words in output


def test_same_command_after_the_end_says_so_and_changes_nothing(run, images):
    folder, _ = run
    before = (folder / "last.pt").read_bytes()
    result = run_script("pretrain.py", "--data", images, "--out", folder, *TINY, cwd=folder.parent)
    assert result.returncode == 0 and "after step 12 of 12" in result.stdout
    assert (folder / "last.pt").read_bytes() == before


@pytest.mark.parametrize("workers", [0, 2])
def test_dry_run_writes_nothing(images, tmp_path, capsys, monkeypatch, workers):
    monkeypatch.chdir(tmp_path)
    flags = ["--data", str(images), "--dry-run", *TINY, "--workers", str(workers)]
    assert pretrain.main(flags) == 0
    output = capsys.readouterr().out
    assert all(words in output for words in ("images/s", "peak memory", "hours"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("seconds, timed", ((0.1, 10), (3, 10), (20, 4), (100, 1)))
def test_a_dry_run_of_slow_steps_ends_within_minutes(monkeypatch, seconds, timed):
    """Five batches lie ready; the clock starts after them or after 30 s, and ends after a minute."""
    clock = [0.0]
    monkeypatch.setattr(pretrain.time, "perf_counter", lambda: clock[0])
    loader = [(torch.zeros(()), None, torch.zeros(()))] * 15
    batches = pretrain.Batches(loader, torch.device("cpu"), ready=5)
    for _ in batches:
        clock[0] += seconds
    assert batches.timed == timed
    assert batches.seconds() / batches.timed == pytest.approx(seconds)
    assert clock[0] <= 30 + 60 + 3 * seconds


def test_a_dry_run_tells_how_long_it_waited(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(pretrain.time, "perf_counter", lambda: clock[0])

    def slow_loader():
        while True:
            clock[0] += 25
            yield torch.zeros(()), None, torch.zeros(())

    batches = pretrain.Batches(slow_loader(), torch.device("cpu"), ready=5)
    for _ in batches:
        clock[0] += 5
    assert batches.seconds() / batches.timed == 30
    assert batches.waited / batches.seconds() == pytest.approx(25 / 30)


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


def signal_at_the_first_step(monkeypatch, *numbers):
    """Have this process get signals while it augments its first batches, one each."""
    left, augment = list(numbers), data.augment

    def interrupted(*views):
        if left:
            os.kill(os.getpid(), left.pop(0))
        return augment(*views)
    monkeypatch.setattr(data, "augment", interrupted)


def test_ctrl_c_ends_a_dry_run_at_once(images, monkeypatch):
    signal_at_the_first_step(monkeypatch, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        pretrain.main(["--data", str(images), "--dry-run", *TINY])


def test_every_signal_asks_first_and_ends_at_once_when_repeated(capfd, monkeypatch):
    """But not when it comes twice at once, as torchrun and the process group each send it."""
    def end(code):
        raise SystemExit(code)
    monkeypatch.setattr(os, "_exit", end)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
        stop = pretrain.StopSignals()
        os.kill(os.getpid(), number)
        assert stop.asked == number and "again, 3 seconds later, to stop at once" in capfd.readouterr().out
        os.kill(os.getpid(), number)
        stop.since -= 4                                                  # seconds later
        with pytest.raises(SystemExit) as stopped:
            os.kill(os.getpid(), number)
        assert stopped.value.code == 128 + number


def test_a_signal_in_the_middle_of_a_print_is_heard():
    """Where nobody reads the output, a print waits, and Python refuses another one inside it."""
    script = ("import os, signal, threading, data, pretrain\n"
              "stop = pretrain.StopSignals()\n"
              "threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM)).start()\n"
              "while not stop.asked: data.say('x' * 1000)\n"
              "data.say('end')")
    # Unbuffered, Python would not refuse.
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               cwd=Path(pretrain.__file__).parent, env=os.environ | {"PYTHONUNBUFFERED": ""})
    process.stdout.read(1)
    time.sleep(2)
    out, err = process.communicate(timeout=60)
    assert out.endswith("end\n") and "stopping" in out and not err, err


def test_nohup_is_obeyed_unless_torchrun_would_kill(monkeypatch):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = pretrain.StopSignals()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    monkeypatch.setenv("LOCAL_RANK", "0")
    stop = pretrain.StopSignals()
    assert signal.getsignal(signal.SIGHUP) == stop.handle


def test_processes_that_are_about_to_do_different_things_are_refused(monkeypatch):
    """Such as two machines, of which one has the run's folder."""
    others = {}

    def gather(theirs, mine):
        theirs[:] = [mine, mine | others, mine]
    monkeypatch.setattr(pretrain.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(pretrain.dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(pretrain.dist, "all_gather_object", gather)
    mine = {"log_every": 20, "steps done": 40}
    pretrain.agree(mine)
    others["steps done"] = 0
    with pytest.raises(data.UserError, match="differ in steps done: 0, 40: .*a disk that they share"):
        pretrain.agree(mine)


def test_short_epochs_are_not_all_saved(images, tmp_path, monkeypatch):
    """A folder of few photos has epochs of one step, and a save may take longer than that."""
    saves = []
    monkeypatch.setattr(pretrain, "save", lambda run, args, done, *rest: saves.append(done))
    for flags, expected in ([], [12]), (["--save-minutes", "0"], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]):
        saves.clear()
        pretrain.main(["--data", str(images), "--out", str(tmp_path / str(len(flags))), *TINY,
                       "--log-every", "1", "--knn-every", "0", *flags])
        assert saves == expected


def test_a_run_without_a_scaler_continues_with_one(run, tmp_path):
    """--amp auto is bf16 on one GPU and fp16 on an older one."""
    checkpoint = pretrain.load_file(run[0] / "last.pt")
    settings = checkpoint["settings"]
    encoder = Encoder(settings["arch"], settings["dim"], settings["hidden_dim"], small_images=True)
    optimizer = torch.optim.SGD(encoder.parameters(), 0.1, 0.9)
    scaler = torch.amp.GradScaler("cpu", enabled=True)
    queue = KeyQueue(settings["queue_size"], settings["dim"])
    assert checkpoint["scaler"] == {}
    step = pretrain.restore(checkpoint, tmp_path, encoder, encoder, optimizer, scaler, queue)
    assert step == checkpoint["step"]


def test_restart_forgets_the_old_checkpoint_and_log(run, images, tmp_path):
    folder = copy_of(run, tmp_path)
    (folder / "notes.txt").write_text("mine")
    assert pretrain.open_run(folder, resolved(images, *TINY, "--restart")) is None
    left = {f.name for f in folder.iterdir()}
    assert {"notes.txt", "args.json"} < left and not {"last.pt", "log.csv"} & left


def test_after_a_crash_a_restarted_run_continues_even_without_its_start_file(run, images, tmp_path, monkeypatch, capsys):
    folder = copy_of(run, tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    flags = ["--init", str(tmp_path / "gone.pt"), "--restart"]
    assert pretrain.main(["--data", str(images), "--out", str(folder), *TINY, *flags]) == 0
    assert "continuing" in capsys.readouterr().out


@pytest.mark.parametrize("names", [["args.json.tmp"], ["args.json", "views.png"]])
def test_a_run_of_no_step_is_not_kept(images, tmp_path, names):
    """Killed while it started: the same command, or one with other settings, takes the folder."""
    for name in names:
        (tmp_path / name).write_text("{")
    args = resolved(images, *TINY)
    assert pretrain.open_run(tmp_path, args) is None
    assert json.loads((tmp_path / "args.json").read_text())["dim"] == 128


@pytest.mark.parametrize("flags", [[], ["--restart"]])
@pytest.mark.parametrize("files", [{"map.png": "a map"}, {"log.csv": "day,rain"}])
def test_a_folder_of_other_files_is_left_alone(images, tmp_path, files, flags, capsys):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    line = error_of(pretrain.main, ["--data", images, "--out", tmp_path, *TINY, *flags], capsys)
    assert str(tmp_path) in line and "--out" in line
    assert {f.name: f.read_text() for f in tmp_path.iterdir()} == files


def test_a_folder_in_use_is_left_alone(run, images, tmp_path, capsys):
    folder = shutil.copytree(run[0], tmp_path / "run")
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    script = f"import pretrain; from pathlib import Path; pretrain.hold(Path({str(folder)!r})); print(); input()"
    other = subprocess.Popen([sys.executable, "-c", script], env=environment(), text=True, stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE)
    other.stdout.readline()
    again = ["--data", images, "--out", folder, *TINY, "--restart"]
    line = error_of(pretrain.main, again, capsys)
    assert str(folder) in line and "in use" in line and "--out" in line
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before
    other.kill()                               # leaves nothing behind that must be cleared away
    other.communicate()
    assert pretrain.main([str(word) for word in again]) == 0


@pytest.mark.parametrize("flags, words", [
    (["--data", "nowhere"], ["nowhere", "no folder"]),
    (["--arch", "resnet19"], ["resnet19", "resnet18"]),
    (["--recipe", "heavy"], ["heavy", "light"]),
    (["--batch-size", "512"], ["96 images", "512"]),
    (["--batch-size", "30"], ["30", "--bn-splits 4"]),
    (["--bn-splits", "16"], ["--batch-size 16", "at least 2"]),
    (["--queue-size", "500"], ["--queue-size 500", "192 keys"]),
    (["--neighbors", "40"], ["--neighbors 40", "32"]),
    (["--lr", "nan"], ["--lr nan"]),
    (["--temperature", "0"], ["--temperature 0.0", "[0.001"]),
    (["--hidden-dim", "wide"], ["wide"]),
    (["--seed", "-1"], ["--seed -1"]),
    (["--out", __file__], [__file__, "cannot write"]),
    (["--init", "nowhere.pt"], ["nowhere.pt", "does not exist"]),
    (["--epochs", "x"], ["epochs"]),
    (["--dim", "1000000000"], ["--dim 1000000000"]),
    (["--hidden-dim", "1e9x"], ["--hidden-dim"]),
    (["--hidden-dim", "1000000"], ["--hidden-dim 1000000"]),
    (["--queue-size", "1000000000000"], ["--queue-size 1000000000000"]),
    (["--workers", "1000000"], ["--workers 1000000"]),
    (["--image-size", "0"], ["--image-size 0"]),
    (["--data", ""], ["''", "no folder"]),
])
def test_bad_settings_are_one_line(images, tmp_path, flags, words, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = error_of(pretrain.main, ["--data", images, *TINY, *flags], capsys)
    assert all(w in line for w in words), line
    assert not (tmp_path / "runs").exists()


def test_errors_reach_the_shell_as_one_line(images, tmp_path):
    one_line_error(run_script("pretrain.py", "--data", tmp_path / "nowhere", cwd=tmp_path), "nowhere", "no folder")


def test_an_unreadable_image_is_named(tmp_path):
    folder = write_images(tmp_path / "images", 48)
    broken = sorted((folder / "train").rglob("*.png"))[20]
    broken.write_bytes(b"no image")
    arguments = ["pretrain.py", "--data", folder, "--out", "run", *TINY[:-1], 1, "--batch-size", 8]
    result = run_script(*arguments, cwd=tmp_path)
    one_line_error(result, broken.name, "--skip-unreadable")


def test_unreadable_images_can_be_left_out_and_are_named(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write_images(tmp_path / "images", 48)
    for split in ("train", "val"):
        sorted((folder / split).rglob("*.png"))[20].write_bytes(b"no image")
    (folder / "train" / "a" / "photo.heic").write_bytes(b"x")
    sixteen = [*TINY[:-4], "--epochs", "1", "--warmup-epochs", "0", "--workers", "0"]
    flags = ["--data", str(folder), "--out", "run", *sixteen, "--skip-unreadable"]
    flags += ["--classes", "none"]
    assert pretrain.main(flags) == 0
    output = capsys.readouterr().out
    assert f"{folder / 'train'}: 1 of 48 files cannot be read" in output and "cannot be decoded" in output
    assert f"{folder / 'val'}: 1 of 48 files cannot be read" in output
    assert "left out, since no image: 1 .heic" in output
    assert "images that find their own view" in output and "kNN of" not in output
    assert json.loads((tmp_path / "run" / "args.json").read_text())["dataset"][:9] == "47 images"
    lineval.main(["run", "--workers", "0"])
    assert "47 training and 47 validation images" in capsys.readouterr().out


def test_what_was_lost_for_ever_is_not_asked_for_again(run, images, tmp_path, capsys):
    """More epochs than a finished run had: the message names the way that works."""
    folder = copy_of(run, tmp_path)
    flags = ["--data", images, "--out", folder, *TINY, "--epochs", "4"]
    line = error_of(pretrain.main, flags, capsys)
    assert "epochs was 2, now 4" in line and f"--init {folder / 'backbone.pt'}" in line


def test_settings_are_stored_as_used_and_the_start_file_is_needed_once(run, images, tmp_path,
                                                                        capsys, monkeypatch):
    monkeypatch.chdir(images.parent)
    assert resolved(images.name, *TINY, "--init", "x.pt").init == str(images.parent / "x.pt")
    folder = copy_of(run, tmp_path)
    flags = ["--data", images.name, "--init", "gone.pt", "--out", str(folder), *TINY]
    assert pretrain.main(flags) == 0
    assert "done: 12 steps" in capsys.readouterr().out


def test_a_run_whose_images_moved_goes_on_and_is_evaluated_there(run, images, tmp_path, capsys):
    folder, moved = copy_of(run, tmp_path), tmp_path / "elsewhere" / images.name
    shutil.copytree(images, moved)
    settings = json.loads((folder / "args.json").read_text())
    (folder / "args.json").write_text(json.dumps(settings | {"data": str(tmp_path / "gone")}))
    assert pretrain.main(["--data", str(moved), "--out", str(folder), *TINY]) == 0
    capsys.readouterr()
    lineval.main([str(folder), "--workers", "0"])
    assert f"on {moved} at" in capsys.readouterr().out


def test_another_start_file_of_the_same_name_is_another_run(run, images, tmp_path, capsys):
    names = set()
    for content in ("first", "second"):
        weights = tmp_path / content / "backbone.pt"
        weights.parent.mkdir()
        weights.write_text(content)
        flags = ["--data", str(images), *TINY, "--init", str(weights)]
        typed = vars(pretrain.read_args(flags))
        dataset = data.load_dataset(str(images), "train")
        names.add(pretrain.default_run(resolved(images, *flags[2:]), typed, dataset))
    assert len(names) == 2
    folder = copy_of(run, tmp_path)            # that run had no start file
    line = error_of(pretrain.main, [*flags, "--out", str(folder)], capsys)
    assert "init_weights was None" in line


def test_a_flipped_bit_in_a_checkpoint_is_noticed(run, images, tmp_path, capsys):
    folder = copy_of(run, tmp_path)
    content = bytearray((folder / "last.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "last.pt").write_bytes(content)
    error_of(pretrain.main, ["--data", images, "--out", folder, *TINY], capsys)


def copy_of(run, tmp_path):
    return shutil.copytree(run[0], tmp_path / "run")


def test_other_settings_against_a_run_are_listed(run, images, tmp_path, capsys):
    folder = copy_of(run, tmp_path)
    line = error_of(pretrain.main, ["--data", images, "--out", folder, *TINY, "--lr", "0.5", "--temperature", "0.3"], capsys)
    assert all(w in line for w in ("lr was 0.03, now 0.5", "temperature was 0.1, now 0.3", "--restart")), line


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
    with pytest.raises(pretrain.UserError, match="--bn-splits 4.*3 processes"):
        pretrain.check(resolved(images, *TINY), 96, 3)


@pytest.mark.slow
def test_processes_print_an_error_that_all_make_once(images, tmp_path):
    result = torchrun(3, "pretrain.py", "--data", images, *TINY, "--batch-size", "24", cwd=tmp_path)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode != 0 and len(errors) == 1 and "--bn-splits 4" in errors[0] and "3 processes" in errors[0]
    assert "Traceback (most recent call last):\n  File \"" + str(pretrain.__file__) not in result.stderr


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(images, tmp_path):
    result = run_script("pretrain.py", "--data", images, "--out", "run", *TINY, "--lr", "1e30", "--log-every", "1", cwd=tmp_path)
    one_line_error(result, "not finite near step", "--lr")
    assert not (tmp_path / "run" / "last.pt").exists()
