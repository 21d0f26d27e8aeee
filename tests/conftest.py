"""What several tests share: small folders of images, and running the scripts as a user would."""
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from torchvision.transforms.v2 import functional as TF

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data     # noqa: E402

TINY = ["--batch-size", "16", "--queue-size", "32", "--image-size", "32", "--bn-splits", "4", "--hidden-dim", "32",
        "--warmup-epochs", "1", "--epochs", "2", "--workers", "0"]


# The tests send signals. A shell has what it starts in the background ignore Ctrl-C, nohup SIGHUP.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def signals_as_before():
    """pretrain.main catches signals; a test that calls it here must not leave that behind."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes each; started with `pytest -m slow`")


def pytest_collection_modifyitems(config, items):
    """Slow tests run only where -m asks for them."""
    if not config.option.markexpr:
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))


def write_images(folder, count, classes=("a", "b", "c"), size=32, splits=("train", "val")):
    """Folder of PNGs in ImageNet's layout: shapes, `count` a split."""
    from PIL import Image
    for number, split in enumerate(splits):
        drawn = data.draw_shapes(count, 100 + number)
        for i, image in enumerate(TF.resize(drawn.pictures, [size, size], antialias=True)):
            where = folder / split / classes[int(drawn.labels[i]) % len(classes)]
            where.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(where / f"{i:04d}.png")
    return folder


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), 96)


def environment(**more):
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS")}
    return clean | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""} | more


def run_script(*arguments, cwd, timeout=170, **env):
    """Run a script of the project in `cwd` -> CompletedProcess with text output."""
    script, *rest = map(str, arguments)
    return subprocess.run([sys.executable, str(ROOT / script), *rest], cwd=cwd, env=environment(**env), capture_output=True,
                          text=True, timeout=timeout)


def torchrun(processes, *arguments, cwd, timeout=170, **env):
    script, *rest = map(str, arguments)
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
                           str(ROOT / script), *rest], cwd=cwd, env=environment(**env), capture_output=True, text=True,
                          timeout=timeout)


def one_line_error(result, *words):
    """The error contract: exit code 2, one line on standard error that names the thing, no traceback."""
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert result.returncode == 2, (result.returncode, result.stdout, result.stderr)
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    for word in words:
        assert str(word) in lines[0], (word, lines[0])


def error_of(main, argv, capsys):
    """Call a script's main as its last lines do, without starting a process -> its one error line (exit code 2)."""
    with pytest.raises(SystemExit) as stopped:
        data.run_main(lambda: main([str(a) for a in argv]))
    line = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and line.startswith("error: ") and "\n" not in line, line
    return line
