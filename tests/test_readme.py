"""The README's names, flags, files and snippet stay true."""
import importlib
import re

import pytest
import torch

from conftest import ROOT
from models import build_backbone

README = (ROOT / "README.md").read_text()


def test_names_exist():
    names = re.findall(r"`(loss|models|data|pretrain|lineval)\.(\w+)[(`]", README)
    names = [(module, name) for module, name in names if name != "py"]
    assert len(names) > 12
    for module, name in names:
        assert hasattr(importlib.import_module(module), name), (module, name)


def test_links_lead_to_files():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert len(links) > 5 and not [link for link in links if not (ROOT / link).is_file()]


def test_flags_exist(capsys):
    known = {"--nproc_per_node", "--nnodes", "--node_rank", "--master_addr", "--master_port", "--max-restarts"}      # torchrun's
    for script in ("pretrain", "lineval"):
        module = importlib.import_module(script)
        with pytest.raises(SystemExit):
            (module.read_flags if script == "pretrain" else module.main)(["--help"])
        known |= set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))
    assert not set(re.findall(r"(?<![\w-])--[a-z][a-z_-]+", README)) - known


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
