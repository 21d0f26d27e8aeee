"""Every measure against its naive formula; the report as a user gets it; bad input."""
import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import lineval
from conftest import TINY, error_of, one_line_error, run_script, torchrun, write_images
from models import build_backbone


def cloud(n=50, dim=6, classes=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (n,), generator=g)
    return torch.randn(n, dim, generator=g) + labels[:, None] * torch.linspace(0, 0.8, dim), labels


def test_knn_is_the_weighted_vote():
    (x, y), (vx, vy) = cloud(60), cloud(40, seed=1)
    for k in (1, 5, 20):
        right = 0
        for v, label in zip(vx, vy):
            cosines = [float(F.cosine_similarity(v, t, dim=0)) for t in x]
            votes = [0.0] * 3
            for i in sorted(range(60), key=lambda i: -cosines[i])[:k]:
                votes[y[i]] += math.exp(cosines[i] / 0.07)
            right += votes.index(max(votes)) == label
        assert lineval.knn_accuracy(x, y, vx, vy, k=k) == pytest.approx(right / 40)
    assert lineval.knn_accuracy(x, y, vx, vy, k=10 ** 6) == lineval.knn_accuracy(x, y, vx, vy, k=20)      # clipped: 60 / 3 classes


def test_best_nn_is_the_best_odd_k_of_the_plain_vote():
    (x, y), (vx, vy) = cloud(60), cloud(40, seed=1)
    best = (-1, 0)
    for k in range(1, 32, 2):
        right = 0
        for v, label in zip(vx, vy):
            near = sorted(range(60), key=lambda i: float((v - x[i]).square().sum()))[:k]
            counts = [sum(int(y[i]) == c for i in near) for c in range(3)]
            right += counts.index(max(counts)) == label
        best = max(best, (right / 40, k), key=lambda b: b[0])
    found = lineval.best_nn(x, y, vx, vy, max_k=31)
    assert found == (pytest.approx(best[0]), best[1])


def test_neighbours_do_not_depend_on_the_chunks():
    (x, _), (v, _) = cloud(300), cloud(70, seed=1)
    values, rows = lineval.neighbors_of(v, x, 9, "cpu", step=16, block=50)
    expected = (v @ x.T).topk(9)
    torch.testing.assert_close(values, expected.values)
    assert torch.equal(rows, expected.indices)


def test_linear_probe_reaches_the_optimum_of_the_convex_problem():
    """Overlapping classes, weight decay: Newton's method finds the exact minimum; the probe's loss comes within 0.1 %."""
    x, y = cloud(400, dim=4, seed=2)
    x = x * torch.tensor([1.0, 100.0, 1e-4, 5.0]) + 3            # standardising must undo this
    decay = 1e-3
    mean, scale = x.mean(0), 1 / x.std(0, unbiased=False) / 2
    weight, bias = lineval.train_probes(x, y, mean, scale, 3, [(10.0, decay)], seed=0, device="cpu", steps=4000)
    z = ((x - mean) * scale).double()

    def objective(flat):
        w, b = flat[:12].view(4, 3), flat[12:]
        return F.cross_entropy(z @ w + b, y) + 0.5 * decay * w.square().sum()

    flat = torch.zeros(15, dtype=torch.float64)
    for _ in range(30):
        hessian = torch.autograd.functional.hessian(objective, flat) + 1e-9 * torch.eye(15)
        flat = flat - torch.linalg.solve(hessian, torch.autograd.functional.jacobian(objective, flat))
    ours = objective(torch.cat([weight[:, 0].flatten(), bias[0]]).double())
    assert objective(flat) <= ours <= 1.001 * objective(flat)


def test_probe_chooses_on_held_out_training_rows_and_never_looks_at_val():
    (x, y), (vx, vy) = cloud(300, seed=3), cloud(200, seed=4)
    a = lineval.linear_probe(x, y, vx, vy, steps=300)
    b = lineval.linear_probe(x, y, vx[:10], (vy[:10] + 1) % 3, steps=300)
    assert (a["lr"], a["weight_decay"], a["held_out"]) == (b["lr"], b["weight_decay"], b["held_out"])
    assert a["top1"] > 0.45 and "top5" not in a                  # of 3 classes always right
    blind = lineval.linear_probe(x, torch.arange(300) % 8, vx, torch.arange(200) % 8, steps=300)
    assert blind["top1"] < 0.3 and abs(blind["top5"] - 5 / 8) < 0.15


def test_probe_is_blind_to_scale_and_offset_even_when_features_are_tiny():
    (x, y), (vx, vy) = cloud(300, seed=3), cloud(200, seed=4)
    grid = [(3.0, 0.0)]
    plain = lineval.linear_probe(x, y, vx, vy, grid=grid, steps=300)["top1"]
    assert abs(lineval.linear_probe(x * 1e-9, y, vx * 1e-9, vy, grid=grid, steps=300)["top1"] - plain) <= 0.01
    constant = torch.cat([x, torch.full((300, 1), 7.0)], 1), torch.cat([vx, torch.full((200, 1), 7.0)], 1)
    assert abs(lineval.linear_probe(constant[0], y, constant[1], vy, grid=grid, steps=300)["top1"] - plain) <= 0.05


def test_representation_space_is_its_formulas():
    x0, labels = cloud(50, seed=5)
    x1, x2 = x0 + 0.3 * cloud(50, seed=6)[0], x0 + 0.3 * cloud(50, seed=7)[0]
    found = lineval.representation_space(x0, x1, x2, labels)
    a, b, c = (F.normalize(x.double(), dim=1) for x in (x0, x1, x2))
    d2 = lambda u, v: float((u - v).square().sum())
    n = range(50)
    expected = {
        "instance_discrimination": sum(all(a[i] @ b[i] > a[i] @ a[j] for j in n if j != i) for i in n) / 50,
        "instance_discrimination_views": sum(all(b[i] @ c[i] > b[i] @ b[j] for j in n if j != i) for i in n) / 50,
        "alignment": sum(d2(a[i], b[i]) for i in n) / 50, "alignment_views": sum(d2(b[i], c[i]) for i in n) / 50}
    for x, suffix in ((a, ""), (b, "_views")):
        pairs = [(i, j) for i in n for j in range(i + 1, 50)]
        expected["uniformity" + suffix] = math.log(sum(math.exp(-2 * d2(x[i], x[j])) for i, j in pairs) / len(pairs))
        by_class = []
        for k in range(3):
            members = [(i, j) for i, j in pairs if labels[i] == labels[j] == k]
            by_class.append(sum(d2(x[i], x[j]) for i, j in members) / len(members))
        across = [(i, j) for i, j in pairs if labels[i] != labels[j]]
        expected["intra_class" + suffix] = sum(by_class) / 3
        expected["inter_class" + suffix] = sum(d2(x[i], x[j]) for i, j in across) / len(across)
        expected["over_clustering" + suffix] = expected["intra_class" + suffix] / expected["inter_class" + suffix]
    s = torch.linalg.svdvals(a - a.mean(0))
    s = s / s.sum()
    expected["effective_rank"] = math.exp(-sum(float(v) * math.log(float(v)) for v in s if v > 0))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-4), key


def test_what_is_undefined_is_left_out():
    x = cloud(20)[0]
    alone = lineval.representation_space(x, x, x, torch.arange(20))              # no class has two images
    assert {"inter_class", "uniformity"} <= alone.keys() and not {"intra_class", "over_clustering"} & alone.keys()
    # One row again and again, of all lengths: a network that has collapsed, whose distances are rounding.
    for row in (torch.zeros(1, 300), torch.randn(1, 300, generator=torch.Generator().manual_seed(0))):
        x = row * torch.linspace(1, 3, 20)[:, None]
        same = lineval.representation_space(x, x, x, torch.arange(20) % 2)
        assert 0 <= same["intra_class"] < 1e-12 and 0 <= same["inter_class"] < 1e-12
        assert not {"over_clustering", "over_clustering_views", "effective_rank"} & same.keys()
        lineval.print_reports({"collapsed": {"space": {"train": same, "val": same}}})


def test_effective_rank_counts_directions():
    basis = torch.cat([torch.eye(4), -torch.eye(4)]).repeat(8, 1)
    x = torch.cat([basis, torch.zeros(64, 3)], 1)
    space = lineval.representation_space(x, x, x, torch.arange(64) % 2)
    assert space["effective_rank"] == pytest.approx(4, rel=1e-5)


def test_features_are_the_networks_in_order_and_it_stays_as_it_was(images):
    dataset = data.load_dataset(str(images), "val")
    net = build_backbone("mobilenetv3_small", True).eval()
    rows = torch.tensor([7, 0, 33])
    before = {k: v.clone() for k, v in net.state_dict().items()}
    features = lineval.extract_features(net, dataset, 32, rows=rows, batch_size=2)
    with torch.no_grad():
        expected = net(data.normalize(torch.stack([dataset[int(i)][0] for i in rows])))
    torch.testing.assert_close(features, expected, atol=1e-6, rtol=1e-4)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_random_baseline_sees_the_datas_statistics(images):
    dataset = data.load_dataset(str(images), "train")
    net = build_backbone("resnet18", True)
    lineval.estimate_batch_norm(net, dataset, torch.arange(96), 32, batches=1, batch_size=96)
    order = data.keyed_permutation(96, data.SAMPLE, 0, 1)
    x = F.conv2d(data.normalize(torch.stack([dataset[int(i)][0] for i in order])), net.conv1.weight, padding=1)
    torch.testing.assert_close(net.bn1.running_mean, x.mean((0, 2, 3)), atol=1e-3, rtol=1e-3)
    assert not net.training


def test_augmented_protocol_trains_on_fresh_crops_of_the_frozen_network(images):
    """A stand-in backbone, the mean colour: red, green and blue images are told apart from any crop, random labels are not;
    and every epoch brings other crops."""
    names = ["r", "g", "b"]
    labels = torch.arange(60) % 3
    pictures = torch.zeros(60, 3, 32, 32, dtype=torch.uint8)
    pictures[torch.arange(60), labels] = torch.randint(99, 255, (60, 32, 32), generator=torch.Generator().manual_seed(0)).byte()
    seen = []

    class MeanColour(torch.nn.Module):
        feature_dim = 3

        def forward(self, x):
            seen.append(x)
            return x.mean((2, 3))

    job = SimpleNamespace(arch="mobilenetv3_small", image_size=32, seed=0, epochs=8)
    accuracy = []
    for y in (labels, torch.randint(0, 3, (60,), generator=torch.Generator().manual_seed(1))):
        dataset, rows = data.Pictures("colours", pictures, y, names), torch.arange(60)
        splits = SimpleNamespace(train=dataset, train_rows=rows, val=dataset, val_rows=rows, names=names)
        val_x = MeanColour()(data.normalize(pictures))
        torch.manual_seed(0)
        accuracy.append(lineval.augmented_probe(MeanColour(), splits, val_x, job, device="cpu", workers=0, batch_size=20))
    assert accuracy[0] == 1 and accuracy[1] < 0.7
    assert len(seen) == 2 * (1 + 8 * 3) and not torch.equal(seen[1], seen[4])


def test_map_shows_every_class_of_a_sorted_set(tmp_path):
    labels = torch.arange(3).repeat_interleave(100)
    lineval.draw_map(tmp_path / "map.png", [("a", torch.randn(300, 5))], labels, ["x", "y", "z"], most=60, side=200)
    with Image.open(tmp_path / "map.png") as image:
        dots = [color for _, color in image.crop((0, 24, 200, 224)).getcolors()]
    assert len(dots) == 4      # three classes and the ground


def test_images_without_a_label_are_of_no_class(tmp_path):
    """Frames: green only where both labels are known and equal."""
    pictures = data.Pictures("gray", torch.full((3, 3, 32, 32), 90, dtype=torch.uint8), torch.tensor([0, -1, 0]), ["x"])
    lineval.draw_rows(tmp_path / "rows.png", "", pictures, torch.tensor([1, 0]), pictures, torch.tensor([[1], [2]]))
    with Image.open(tmp_path / "rows.png") as image:
        frames = [image.getpixel((168, 24 + 76 * i)) for i in range(2)]
    assert frames == [lineval.RED, lineval.GREEN]


def test_held_out_fifth_is_keyed_and_disjoint(tmp_path):
    write_images(tmp_path, 60, splits=("pictures",))
    a, b, c = (lineval.labelled_splits(str(tmp_path / "pictures"), seed) for seed in (0, 0, 1))
    assert len(a.val_rows) == 12 and not set(a.val_rows.tolist()) & set(a.train_rows.tolist()) and "12 of 60" in a.note
    assert torch.equal(a.val_rows, b.val_rows) and not torch.equal(a.val_rows, c.val_rows)


# ---------------------------------------------------------------------- as a program

@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    result = run_script("pretrain.py", "--data", images, "--knn-every", "0", *TINY, cwd=folder)
    assert result.returncode == 0, result.stderr
    result = run_script("lineval.py", "--workers", "0", cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


def test_report_pictures_and_json(finished):
    folder, output = finished
    run = next((folder / "runs").iterdir())
    assert run.name.endswith("-mobilenetv3_small-light-0")
    report = json.loads((run / "lineval.json").read_text())
    for side in ("pretrained", "random"):
        assert 0 <= report[side]["linear_top1"] <= 1 and set(report[side]["space"]) == {"train", "val"}
    assert report["train_images"] == report["val_images"] == 96
    for words in ("linear probe, top-1 %", "weighted kNN %", "best-NN", "over-clustering", "random weights", "lower"):
        assert words in output
    assert f"{100 * report['pretrained']['linear_top1']:.1f}" in output
    for picture in ("neighbors.png", "map.png", "soft_positives.png"):
        with Image.open(run / picture) as image:
            assert len(image.convert("RGB").resize((64, 64)).getcolors(4096)) > 20      # not blank


@pytest.mark.slow
def test_two_processes_share_the_extraction_and_report_the_same(finished, images, tmp_path):
    folder, _ = finished
    shutil.copytree(next((folder / "runs").iterdir()), tmp_path / "run")
    alone = json.loads((tmp_path / "run" / "lineval.json").read_text())
    result = torchrun(2, "lineval.py", "run", "--workers", "0", cwd=tmp_path)
    assert result.returncode == 0 and result.stdout.count("linear probe, top-1 %") == 1, result.stderr
    together = json.loads((tmp_path / "run" / "lineval.json").read_text())
    assert together.pop("seconds") != alone.pop("seconds") and together.pop("run") == "run" and alone.pop("run")
    assert together == alone


def test_runs_side_by_side_other_data_and_the_key_encoder(finished, tmp_path, capsys):
    folder, _ = finished
    run = next((folder / "runs").iterdir())
    other = write_images(tmp_path / "other", 40, classes=("x", "y"))
    before = {f.name: f.read_bytes() for f in run.iterdir()}
    lineval.main([str(run), str(run), "--encoder", "key", "--per-class", "5", "--data", str(other), "--workers", "0"])
    output = capsys.readouterr().out
    assert "of 2 classes" in output and "key encoder" in output and "random mobilenetv3_small on other, 32 px" in output
    assert "no soft_positives.png: these are not the images of pretraining" in output
    assert before.items() <= {f.name: f.read_bytes() for f in run.iterdir()}.items()      # the run's own report stays
    assert json.loads((run / "lineval-other-key.json").read_text())["pretrained"]["linear_top1"] > 0
    assert (run / "neighbors-other-key.png").exists() and (run / "map-other-key.png").exists()


def test_another_copy_of_the_images_is_other_data(finished, images, tmp_path, capsys, monkeypatch):
    """Fingerprints are of names alone, so a folder of smaller copies, or with another val, has the run's own."""
    run = shutil.copytree(next((finished[0] / "runs").iterdir()), tmp_path / "run")
    copy = shutil.copytree(images, tmp_path / "copy")
    (tmp_path / "link").symlink_to(images, target_is_directory=True)
    before = (run / "lineval.json").read_bytes()
    options = ["--per-class", "5", "--workers", "0"]
    lineval.main([str(run), "--data", str(copy), *options])
    assert (run / "lineval.json").read_bytes() == before and (run / "lineval-copy.json").exists()
    lineval.main([str(run), "--data", str(tmp_path / "link"), *options])
    assert (run / "lineval.json").read_bytes() != before
    namesake = shutil.copytree(images, tmp_path / "elsewhere" / "copy")
    line = error_of(lineval.main, [str(run), "--data", str(namesake), *options], capsys)
    assert "lineval-copy.json" in line and str(copy) in line
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shapes").symlink_to(images, target_is_directory=True)      # the folder, not the demo
    splits = lineval.labelled_splits("./shapes")
    job = SimpleNamespace(run=run, data="./shapes", encoder="query", image_size=32, settings={"image_size": 32},
                          pretrained_on=("shapes", splits.train.fingerprint))
    assert lineval.report_paths(job, splits.train)[0] == run / f"lineval-{images.name}.json"
    job.pretrained_on = (str(images), "fewer images")
    assert lineval.report_paths(job, splits.train)[0] == run / f"lineval-{images.name}.json"


def test_settings_without_a_dataset_are_named(finished, tmp_path, capsys):
    run = shutil.copytree(next((finished[0] / "runs").iterdir()), tmp_path / "run")
    before = (run / "lineval.json").read_bytes()
    settings = json.loads((run / "args.json").read_text())
    del settings["dataset"]
    for content in json.dumps(settings), "[1]":
        (run / "args.json").write_text(content)
        assert "args.json is damaged" in error_of(lineval.main, [str(run)], capsys)
    assert (run / "lineval.json").read_bytes() == before


def test_one_process_downloads_while_the_others_wait(monkeypatch):
    done = []
    monkeypatch.setattr(lineval.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(lineval.dist, "barrier", lambda: done.append("wait"))
    for rank, name in ((0, "cifar10"), (1, "cifar10"), (1, "my photos")):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert lineval.in_turn(name, lambda: done.append("load") or rank) == rank
    assert done == ["load", "wait", "wait", "load", "load"]
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ZeroDivisionError):      # the others go on, and fail alike
        lineval.in_turn("cifar10", lambda: 1 / 0)
    assert done[5:] == ["wait"]


def test_a_process_without_a_gpu_says_how_many_there_are(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for rank, printed in (2, True), (3, False):
        monkeypatch.setenv("LOCAL_RANK", str(rank)), monkeypatch.setenv("RANK", str(rank))
        with pytest.raises(SystemExit):
            try:
                lineval.own_device()
            except data.UserError as error:
                data.exit_with(error)
        assert ("process 2" in (line := capsys.readouterr().err) and "--nproc_per_node=2" in line) == printed, line


def test_bare_weights_of_torchvision(images, tmp_path, capsys):
    from torchvision.models import resnet18
    torch.save(resnet18().state_dict(), tmp_path / "w.pt")
    lineval.main(["--weights", str(tmp_path / "w.pt"), "--arch", "resnet18", "--data", str(images), "--image-size", "72",
                  "--per-class", "5", "--workers", "0"])
    assert "linear probe, top-1 %" in capsys.readouterr().out
    old = {k: v for k, v in resnet18().state_dict().items() if not k.endswith("num_batches_tracked")}      # of torch 0.4
    torch.save(old, tmp_path / "old.pt")
    backbone = build_backbone("resnet18")
    lineval.load_weights(backbone, tmp_path / "old.pt")
    assert torch.equal(backbone.layer4[1].conv2.weight, old["layer4.1.conv2.weight"])


def test_bad_input_is_one_line(finished, images, tmp_path, capsys, monkeypatch):
    folder, _ = finished
    run = next((folder / "runs").iterdir())
    flat = tmp_path / "flat"
    flat.mkdir()
    for i in range(10):
        Image.new("RGB", (32, 32), (i, 0, 0)).save(flat / f"{i}.png")
    one = tmp_path / "one" / "only"
    one.mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(one / "1.png")
    write_images(tmp_path / "lonely", 5, splits=("train",))
    write_images(tmp_path / "lonely", 1, classes=("a",), splits=("val",))
    (tmp_path / "bad.pt").write_bytes(b"garbage")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save(build_backbone("resnet18").state_dict(), tmp_path / "resnet18.pt")
    monkeypatch.chdir(tmp_path)
    for argv, words in [
        ([], ["python pretrain.py"]),
        (["nowhere"], ["nowhere", "args.json"]),
        ([str(run), "--data", str(flat)], ["no labels"]),
        ([str(run), "--data", str(tmp_path / "one")], ["1 class"]),
        ([str(run), "--data", str(tmp_path / "lonely")], ["1 validation images", "2 classes"]),
        ([str(run), "--arch", "resnet18"], ["resnet18", "mobilenetv3_small"]),
        ([str(run), "--image-size", "4"], ["--image-size 4", "at least 8"]),
        ([str(run), "--workers", "-1"], ["--workers -1", "at least 0"]),
        (["--weights", "bad.pt"], ["--arch"]),
        (["--weights", "bad.pt", "--arch", "resnet18", "--data", str(images)], ["bad.pt", "cannot be loaded"]),
        (["--weights", "gone.pt", "--arch", "resnet18", "--data", str(images)], ["gone.pt", "does not exist"]),
        (["--weights", "list.pt", "--arch", "resnet18", "--data", str(images)], ["list.pt", "list"]),
        (["--weights", "resnet18.pt", "--arch", "resnet50", "--data", str(images), "--image-size", "72"], ["resnet18.pt", "does not fit"]),
        (["--arch", "vit"], ["vit", "resnet18"]),
    ]:
        line = error_of(lineval.main, argv, capsys)
        assert all(w in line for w in words), (argv, line)
    one_line_error(run_script("lineval.py", "nowhere", cwd=tmp_path), "nowhere")


def test_pickle_bomb_as_weights_runs_nothing(images, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))
    torch.save({"fc.weight": Bomb()}, tmp_path / "bomb.pt")
    one_line_error(run_script("lineval.py", "--weights", "bomb.pt", "--arch", "resnet18", "--data", images, cwd=tmp_path), "bomb.pt")
    assert not (tmp_path / "ran").exists()
