"""The README's names, flags, files, tables and snippet stay true."""
import importlib
import re

import numpy as np
import pytest
import torch

import data
import lineval
import pretrain
import test_loss
from conftest import ROOT
from models import build_backbone

README = (ROOT / "README.md").read_text()
TORCHRUN = {"--nproc_per_node", "--nnodes", "--node_rank", "--master_addr", "--master_port"}


def table_rows(text):
    """first cell -> the other cells, of all tables of a text."""
    rows = {}
    for line in text.splitlines():
        if line.startswith("|") and not line.startswith("|---"):
            first, *cells = [cell.strip().strip("`") for cell in line.strip("|").split("|")]
            rows[first] = cells
    return rows


def section(title):
    return re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", README, re.S | re.M)[1]


def test_it_is_one_page():
    prose = re.sub(r"```.*?```", "", README, flags=re.S)      # a command may be one long line
    assert len(prose.split()) <= 1600
    assert max(map(len, prose.splitlines())) <= 120


def test_names_exist():
    text = re.sub(r"```python.*?```", "", README, flags=re.S)
    names = re.findall(r"(?<![\w./])(loss|models|data|pretrain|lineval)\.(\w+)", text)
    names = [(module, name) for module, name in names if name not in ("py", "json")]
    assert len(names) > 9
    for module, name in names:
        assert hasattr(importlib.import_module(module), name), (module, name)


def test_links_lead_to_files():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert len(links) > 7
    headings = re.findall(r"^## (.*)", README, re.M)
    sections = {"#" + heading.lower().replace(" ", "-") for heading in headings}
    assert not [link for link in links if not (ROOT / link).is_file() and link not in sections]


def test_lines_of_the_files():
    said = re.findall(r"\[`(\w+\.py)`\]\(\1\), ([\d,]+) lines", README)
    assert len(said) == 5
    for name, lines in said:
        count = len((ROOT / name).read_text().splitlines())
        assert count == pytest.approx(int(lines.replace(",", "")), rel=0.05), name


def test_flags_exist(capsys):
    known = set(TORCHRUN)
    for parse in (pretrain.read_args, lineval.main):
        with pytest.raises(SystemExit):
            parse(["--help"])
        known |= set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))
    assert not set(re.findall(r"(?<![\w-])--[a-z][a-z_-]+", README)) - known


def test_the_log_line_and_its_words():
    assert pretrain.HEADER.strip() in README
    words = re.findall(r"^- \*\*([\w ]+)\*\*", section("Ten words"), re.M)
    assert len(words) == 10
    columns = set(re.findall(r"\w+", pretrain.HEADER))
    assert {"chance", "acc", "positive", "nearest", "spread", "same", "wait"} <= columns & {*words}


def test_the_recipes_are_those_of_the_code():
    rows = table_rows(section("The recipes"))
    names = {"learning rate per 256 images": "lr", "warm-up epochs": "warmup_epochs",
             "weight decay": "weight_decay", "temperature": "temperature",
             "head's hidden layer": "hidden_dim", "jitter": "jitter", "gray": "gray_p",
             "batch": "batch_size", "epochs": "epochs", "smoothing": "smoothing"}
    for column, recipe in enumerate(pretrain.RECIPES.values()):
        for row, name in names.items():
            cell, value = rows[row][column], recipe[name]
            if name == "hidden_dim":
                assert cell == value
            elif name == "jitter":
                assert [float(number) for number in cell.split()] == value
            else:
                assert float(cell) == value, (row, column)
        assert rows["loss"][column] == ("mean of both" if recipe["symmetric"] else "one direction")


def test_the_duplicates_table_is_what_the_loss_does():
    rows = table_rows(section("The idea"))
    for s in (0.0, 0.25, 0.5):
        positive, duplicate, _ = test_loss.pull_of_a_duplicate(s)
        assert rows[f"{s:g}"] == [f"{positive:+.2f}", f"{duplicate:+.2f}"]


def test_weights_load_as_the_snippet_says(tmp_path, monkeypatch):
    snippet = re.search(r"```python\n(import torch, torchvision.*?)```", README, re.S)[1]
    folder = tmp_path / re.search(r'"(runs/[^"]*)/backbone.pt"', snippet)[1]
    folder.mkdir(parents=True)
    ours = build_backbone("mobilenetv3_small").eval()
    torch.save(ours.state_dict(), folder / "backbone.pt")
    monkeypatch.chdir(tmp_path)
    there = {}
    exec(snippet, there)
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(there["net"](x), ours(x), rtol=1e-4, atol=1e-5)


def test_images_like_the_first(tmp_path, monkeypatch, capsys):
    features = [[1, 0], [0, 9], [9, 1], [1, 1]]
    np.savez(tmp_path / "features.npz", features=features, paths=["a", "b", "c", "d"])
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"```python\n(import numpy.*?)```", README, re.S)[1], {})
    assert capsys.readouterr().out.strip() == "[0 2 3 1] ['a' 'c' 'd' 'b']"


def test_the_whole_algorithm_does_what_pretrain_does(tmp_path, monkeypatch):
    """The first steps of the README's loop, in float64 and of small batches, give equal weights."""
    pictures = data.draw_shapes(64, seed=3)
    monkeypatch.setattr(data, "load_dataset", lambda *_: pictures)
    monkeypatch.setattr(pretrain, "lr_at", lambda *_: 0.03)               # the README's is constant
    monkeypatch.setattr(pretrain, "smoothing_at", lambda *_: 0.1)         # from the first step
    snippet = re.search(r"```python\n(import copy.*?)```", README, re.S)[1]
    numbers = "N, K, D = 128, 256, 128"
    assert numbers in snippet and "epochs=4" in snippet
    snippet = snippet.replace(numbers, "N, K, D = 16, 32, 128").replace("epochs=4", "epochs=1")
    flags = ("--no-symmetric --bn-splits 1 --batch-size 16 --queue-size 32 --key-momentum 0.73 "
             "--temperature 0.2 --smoothing 0.1 --neighbors 5 --weight-decay 1e-4 --dim 128 "
             "--hidden-dim 2048 --jitter-p 0.8 --gray-p 0.2 --blur-p 0.5 --epochs 1 --amp off "
             "--warmup-epochs 0 --knn-every 0 --workers 0")
    torch.set_default_dtype(torch.float64)
    try:
        here = {}
        exec(snippet, here)
        assert pretrain.main([*flags.split(), "--out", str(tmp_path / "run")]) == 0
    finally:
        torch.set_default_dtype(torch.float32)
    saved = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert here["step"] == 3 and saved["step"] == 4
    for name, value in here["encoder"].state_dict().items():
        torch.testing.assert_close(value, saved["encoder"][name], atol=1e-9, rtol=1e-9)
    for name, value in here["key_encoder"].named_parameters():
        torch.testing.assert_close(value.data, saved["key_encoder"][name], atol=1e-9, rtol=1e-9)


# ------------------------------------------------- the laboratory

LABORATORY = (ROOT / "assets" / "LABORATORY.md").read_text()


def solution(start):
    """The laboratory's block of code that begins so -> its names."""
    here = {}
    exec(re.search(rf"```python\n({start}.*?)```", LABORATORY, re.S)[1], here)
    return here


def test_the_laboratorys_commands_are_pretrains():
    commands = re.findall(r"^python pretrain.py (.*)$", LABORATORY, re.M)
    assert len(commands) >= 8
    for command in commands:
        pretrain.read_args(command.split())


def test_the_laboratorys_nt_xent_is_the_formula():
    nt_xent = solution("import torch\n")["nt_xent"]
    z1, z2 = (torch.nn.functional.normalize(torch.randn(5, 3).double(), dim=1) for _ in range(2))
    views = [*z1, *z2]
    total = 0
    for i, view in enumerate(views):
        others = [(view @ other / 0.2).exp() for j, other in enumerate(views) if j != i]
        total -= ((view @ views[(i + 5) % 10] / 0.2).exp() / sum(others)).log()
    torch.testing.assert_close(nt_xent(z1, z2, 0.2), total / 10)


def test_the_laboratorys_new_network_is_torchvisions(monkeypatch):
    import models
    from torchvision.models import resnet101
    monkeypatch.setattr(models, "ARCHS", dict(models.ARCHS))
    solution("from functools")
    theirs = resnet101().eval()
    ours = build_backbone("resnet101").eval()
    ours.load_state_dict(theirs.state_dict(), strict=False)
    theirs.fc = torch.nn.Identity()
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
