"""The README's names, flags, files, tables and snippet stay true."""
import importlib
import re

import pytest
import torch

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
    assert len(README.split()) <= 1600
    prose = re.sub(r"```.*?```", "", README, flags=re.S)      # a command may be one long line
    assert max(map(len, prose.splitlines())) <= 120


def test_names_exist():
    names = re.findall(r"(?<![\w./])(loss|models|data|pretrain|lineval)\.(\w+)", README)
    names = [(module, name) for module, name in names if name not in ("py", "json")]
    assert len(names) > 12
    for module, name in names:
        assert hasattr(importlib.import_module(module), name), (module, name)


def test_links_lead_to_files():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert len(links) > 7
    assert not [link for link in links if not (ROOT / link).is_file()]


def test_lines_of_the_files():
    said = re.findall(r"\[`(\w+\.py)`\]\(\1\), (\d+) lines", README)
    assert len(said) == 5
    for name, lines in said:
        count = len((ROOT / name).read_text().splitlines())
        assert count == pytest.approx(int(lines), rel=0.2), name


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
             "head's width": "hidden_dim", "jitter": "jitter", "gray": "gray_p",
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
    snippet = re.search(r"```python\n(.*?)```", README, re.S)[1]
    folder = tmp_path / re.search(r'"(runs/[^"]*)/backbone.pt"', snippet)[1]
    folder.mkdir(parents=True)
    ours = build_backbone("mobilenetv3_small").eval()
    torch.save(ours.state_dict(), folder / "backbone.pt")
    monkeypatch.chdir(tmp_path)
    there = {}
    exec(snippet, there)
    net, x = there["net"].eval(), torch.randn(2, 3, 64, 64)
    features = net.classifier[:2](torch.flatten(net.avgpool(net.features(x)), 1))
    torch.testing.assert_close(features, ours(x), rtol=1e-4, atol=1e-5)
