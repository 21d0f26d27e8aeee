"""The same result on any number of processes, and after any interruption: runs are started for real and compared."""
import csv
import os
import random
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch

import pretrain
from conftest import ROOT, TINY, environment, error_of, one_line_error, run_script, torchrun

TIMING = {"images_per_s", "data_wait", "hours_left"}
RUN = ["--out", "run", "--knn-every", "0", "--log-every", "1"]


def state_of(folder):
    """Every tensor and number of last.pt by name, but for what may differ."""
    out = {}

    def walk(name, value):
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{name}.{key}", inner)
        elif isinstance(value, list):
            for key, inner in enumerate(value):
                walk(f"{name}.{key}", inner)
        else:
            out[name] = value

    state = torch.load(folder / "run" / "last.pt", weights_only=True)
    del state["settings"], state["log_bytes"]                       # the log has timings
    walk("", state)
    return out


def log_of(folder):
    with open(folder / "run" / "log.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k not in TIMING} for row in csv.DictReader(file)]


def assert_identical(a, b):
    a_state, b_state = state_of(a), state_of(b)
    assert a_state.keys() == b_state.keys()
    for name, value in a_state.items():
        same = torch.equal(value, b_state[name]) if torch.is_tensor(value) else value == b_state[name]
        assert same, name
    assert log_of(a) == log_of(b)


# ---------------------------------------------------------------------- processes

def largest_difference(a, b):
    a, b = state_of(a), state_of(b)
    assert a.keys() == b.keys()
    return max((value - b[name]).abs().max().item() for name, value in a.items() if torch.is_tensor(value) and value.numel())


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["--symmetric", "--no-symmetric"])
@pytest.mark.parametrize("arch", ["mobilenetv3_small", "resnet18"])
def test_any_number_of_processes_gives_the_same_run_in_float64(images, tmp_path, arch, direction):
    """Views, losses, weights, momentum buffers, both encoders' running statistics, queue: 18 steps, to 1e-9. Training
    amplifies rounding: the losses of the first steps agree to 1e-14, after 24 steps one momentum differed by 3e-9. (Two
    processes against one are also in `test_torchrun_restarts_after_a_killed_worker`, by default.)"""
    flags = ["--data", images, *RUN, *TINY, "--arch", arch, direction, "--image-size", "16", "--batch-size", "16", "--bn-splits", "8",
             "--epochs", "3", "--smoothing", "0.2", "--neighbors", "5", "--lr", "0.06"]
    folders = {}
    for processes in (1, 2, 4):
        folders[processes] = tmp_path / str(processes)
        folders[processes].mkdir()
        result = torchrun(processes, "tests/float64.py", *flags, cwd=folders[processes])
        assert result.returncode == 0, result.stderr
    for processes in (2, 4):
        assert largest_difference(folders[1], folders[processes]) < 1e-9
        for a, b in zip(log_of(folders[1]), log_of(folders[processes])):
            assert abs(float(a["loss"]) - float(b["loss"])) < 1e-9
    start, end = (float(log_of(folders[1])[i]["lr"]) for i in (6, -1))
    assert start > end > 0 and len(log_of(folders[1])) == 18      # it did train


@pytest.mark.slow
def test_two_nodes_on_one_machine(images, tmp_path):
    """Two agents, as on two machines, over loopback; the same run as one process in float64."""
    flags = ["--data", str(images), *RUN, *TINY, "--image-size", "16", "--epochs", "1", "--warmup-epochs", "0"]
    single, double = tmp_path / "single", tmp_path / "double"
    single.mkdir(), double.mkdir()
    assert torchrun(1, "tests/float64.py", *flags, cwd=single).returncode == 0
    agents = [subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node_rank={rank}", "--nproc_per_node=1",
                                "--master_addr=127.0.0.1", "--master_port=29611", str(ROOT / "tests" / "float64.py"), *flags],
                               cwd=double, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
              for rank in (0, 1)]
    for agent in agents:
        out, err = agent.communicate(timeout=120)
        assert agent.returncode == 0, err
    assert largest_difference(single, double) < 1e-9


# ---------------------------------------------------------------------- interruptions

STEPS = [*RUN, *TINY, "--image-size", "16", "--batch-size", "8", "--epochs", "3", "--workers", "1"]      # 36 steps


@pytest.fixture(scope="module")
def undisturbed(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    result = run_script("pretrain.py", "--data", images, *STEPS, cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder


def start(images, folder, *more):
    folder.mkdir(exist_ok=True)
    return subprocess.Popen([sys.executable, str(ROOT / "pretrain.py"), "--data", str(images), *STEPS, *more], cwd=folder,
                            env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_step(process, step):
    for line in process.stdout:
        if re.match(rf" *\d+/\d+ +{step} ", line):
            return
    raise AssertionError(process.stderr.read())


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_signals_save_and_the_same_command_continues_bit_for_bit(images, undisturbed, tmp_path, number):
    process = start(images, tmp_path / "stopped")
    wait_for_step(process, 17)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "stopping after this step" in out and "stopped: saved" in out and not err, err
    stopped_at = torch.load(tmp_path / "stopped" / "run" / "last.pt", weights_only=True)["step"]
    assert 17 <= stopped_at < 36                                    # inside an epoch of 12 steps, in general
    result = run_script("pretrain.py", "--data", images, *STEPS[:-1], "0", cwd=tmp_path / "stopped")      # another worker count
    assert result.returncode == 0 and f"after step {stopped_at} of 36" in result.stdout, result.stderr
    assert_identical(undisturbed, tmp_path / "stopped")


def kill_until_done(images, undisturbed, folder, kills, seed):
    """SIGKILL at random moments, restart with the same command, compare with the undisturbed run. -> kills that hit."""
    chance, hit = random.Random(seed), 0
    for _ in range(kills):
        process = start(images, folder, "--save-minutes", "0")      # saves after every step: many kills fall inside one
        wait_for = chance.uniform(0.5, 9)
        try:
            process.wait(wait_for)
        except subprocess.TimeoutExpired:
            hit += 1
        process.kill()
        process.communicate()
    process = start(images, folder, "--save-minutes", "0")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert_identical(undisturbed, folder)
    return hit


def test_killed_three_times(images, undisturbed, tmp_path):
    assert kill_until_done(images, undisturbed, tmp_path / "killed", 3, seed=1) >= 1


@pytest.mark.slow
def test_killed_twenty_times(images, undisturbed, tmp_path):
    """Ten runs of two kills each, so that the kills fall all over a run and not only into its end."""
    hits = sum(kill_until_done(images, undisturbed, tmp_path / str(i), 2, seed=10 + i) for i in range(10))
    print(f"{hits} of 20 kills hit a living run")
    assert hits >= 15


def test_torchrun_restarts_after_a_killed_worker(images, tmp_path):
    """--max-restarts: one process is killed with SIGKILL, torchrun starts both again, they continue by themselves, and end
    (float64) where one process ends undisturbed. --restart on the command line means the first start only."""
    flags = ["--data", str(images), *STEPS, "--epochs", "2", "--bn-splits", "2"]
    single, tmp_path = tmp_path / "single", tmp_path / "killed"
    single.mkdir(), tmp_path.mkdir()
    assert run_script("tests/float64.py", *flags, cwd=single).returncode == 0
    agent = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=2",
                              str(ROOT / "tests" / "float64.py"), *flags, "--restart", "--save-minutes", "0"], cwd=tmp_path, env=environment(),
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in agent.stdout:
        if re.match(r" *\d+/\d+ +14 ", line):
            break
    workers = subprocess.run(["pgrep", "-P", str(agent.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    out, err = agent.communicate(timeout=150)
    assert agent.returncode == 0, out[-3000:] + err[-6000:]
    assert "continuing run after step" in out and "done: 24 steps" in out
    assert largest_difference(single, tmp_path) < 1e-8 and len(log_of(tmp_path)) == 24


def test_full_disk_stops_with_one_line_and_the_last_checkpoint_is_whole(images, undisturbed, tmp_path):
    """A size limit on files stands in for the disk: larger writes fail as on a full one."""
    folder = tmp_path / "full"
    shutil.copytree(undisturbed, folder)
    path = folder / "run" / "last.pt"
    state = torch.load(path, weights_only=True)
    state["step"] = 24
    torch.save(state, path)
    before = path.read_bytes()
    code = ("import resource, signal, runpy, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
            "resource.setrlimit(resource.RLIMIT_FSIZE, (100000, 100000)); sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')")
    result = subprocess.run([sys.executable, "-c", code, str(ROOT / "pretrain.py"), "--data", str(images), *STEPS[:-1], "0"], cwd=folder,
                            env=environment(), capture_output=True, text=True, timeout=100)
    one_line_error(result, "cannot write", "backbone.pt", "make room")
    assert path.read_bytes() == before
    assert {file.name for file in (folder / "run").glob("*.tmp")} == {"lock.tmp"}


def test_a_terminal_that_is_gone_never_costs_the_run(images, undisturbed, tmp_path):
    """`pretrain.py | head -1`"""
    process = start(images, tmp_path / "head")
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(100) == 0 and process.stderr.read() == ""
    assert_identical(undisturbed, tmp_path / "head")


def test_weights_and_checkpoint_agree_after_a_kill_between_their_writes(images, tmp_path, monkeypatch):
    """And the order in which things reach the disk: last.pt promises the others."""
    monkeypatch.chdir(tmp_path)
    flags = ["--data", str(images), *RUN, *TINY, "--image-size", "16", "--batch-size", "32"]
    write, flush, rename, done = pretrain.write, os.fsync, os.replace, []

    def killed(path, content):
        if path.name == name and (tmp_path / "run" / "last.pt").exists():
            raise KeyboardInterrupt
        write(path, content)
    monkeypatch.setattr(pretrain, "write", killed)
    name = "last.pt"
    with pytest.raises(KeyboardInterrupt):
        pretrain.main([*flags, "--save-minutes", "0"])
    name = None                                                     # now to the end
    monkeypatch.setattr(os, "fsync", lambda file: (done.append("flushed"), flush(file)))
    monkeypatch.setattr(os, "replace", lambda old, new: (done.append(new.name), rename(old, new)))
    assert pretrain.main(flags) == 0
    encoder = torch.load("run/last.pt", weights_only=True)["encoder"]
    backbone = torch.load("run/backbone.pt", weights_only=True)
    assert all(torch.equal(value, encoder["backbone." + key]) for key, value in backbone.items())
    assert done == ["flushed", "args.json", "flushed", "backbone.pt", "flushed", "last.pt"]


def test_changed_dataset_is_refused(images, undisturbed, tmp_path, capsys, monkeypatch):
    folder, moved = tmp_path / "run_copy", tmp_path / "images"
    shutil.copytree(undisturbed, folder)
    shutil.copytree(images, moved)
    next((moved / "train").rglob("*.png")).unlink()
    monkeypatch.chdir(folder)
    line = error_of(pretrain.main, ["--data", moved, *STEPS], capsys)
    assert "dataset was 96 images" in line and "now 95 images" in line and "--restart" in line
