"""Every measure against its naive formula; the verdict; the report as a user gets it; bad input."""
import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import error_of, one_line_error, run_script, write_images
from PIL import Image
from torchvision.transforms.v2 import functional as TF

import data
import lineval
from models import Encoder, build_backbone


def cloud(n=50, dim=6, classes=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (n,), generator=g)
    shift = labels[:, None] * torch.linspace(0, 0.8, dim)
    return torch.randn(n, dim, generator=g) + shift, labels


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
    # Clipped to the mean size of a class, 60 / 3.
    clipped = lineval.knn_accuracy(x, y, vx, vy, k=10 ** 6)
    assert clipped == lineval.knn_accuracy(x, y, vx, vy, k=20)


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
    accuracy, k = lineval.best_nn(x, y, vx, vy, max_k=31)
    assert accuracy == pytest.approx(best[0]) and k == best[1]


def test_neighbours_do_not_depend_on_the_chunks():
    (x, _), (v, _) = cloud(300), cloud(70, seed=1)
    distances, rows = lineval.nearest_rows(v, x, 9, most=5000)
    expected = (v[:, None] - x).square().sum(2).sqrt().topk(9, largest=False)
    torch.testing.assert_close(distances, expected.values, atol=1e-4, rtol=1e-4)
    assert torch.equal(rows, expected.indices)


def test_linear_probe_reaches_the_optimum_of_the_convex_problem():
    """Newton's method in float64 finds the exact minimum."""
    x, y = cloud(400, dim=4, seed=2)
    x = (x - x.mean(0)) / x.std(0) / 2
    decay = 1e-3
    weight, bias = lineval.fit_softmax(x, y, 3, decay)
    z = x.double()

    def objective(flat):
        w, b = flat[:12].view(4, 3), flat[12:]
        return F.cross_entropy(z @ w + b, y) + 0.5 * decay * w.square().sum()

    flat = torch.zeros(15, dtype=torch.float64)
    for _ in range(30):
        hessian = torch.autograd.functional.hessian(objective, flat) + 1e-9 * torch.eye(15)
        gradient = torch.autograd.functional.jacobian(objective, flat)
        flat = flat - torch.linalg.solve(hessian, gradient)
    ours = objective(torch.cat([weight.flatten(), bias]).double())
    assert objective(flat) - 1e-12 <= ours <= (1 + 1e-5) * objective(flat)


def test_probe_chooses_on_held_out_training_rows_and_never_looks_at_val(monkeypatch, capsys):
    (x, y), (vx, vy) = cloud(300, seed=3), cloud(200, seed=4)
    a = lineval.linear_probe(x, y, vx, vy)
    b = lineval.linear_probe(x, y, vx[:10], (vy[:10] + 1) % 3)
    for name in ("weight_decay", "held_out", "rows"):
        assert a[name] == b[name]
    assert a["top1"] > 0.45 and a["rows"] == 300
    blind = lineval.linear_probe(x, torch.arange(300) % 8, vx, torch.arange(200) % 8)
    assert blind["top1"] < 0.3
    monkeypatch.setattr(lineval, "MOST_NUMBERS", 600)                    # of 6 a row
    assert lineval.linear_probe(x, y, vx, vy)["rows"] == 100
    assert "100 of 300" in capsys.readouterr().out


def test_probe_is_blind_to_scale_and_offset_even_when_features_are_tiny():
    (x, y), (vx, vy) = cloud(300, seed=3), cloud(200, seed=4)
    plain = lineval.linear_probe(x, y, vx, vy, decays=(1e-4,))["top1"]
    tiny = lineval.linear_probe(x * 1e-9, y, vx * 1e-9, vy, decays=(1e-4,))["top1"]
    assert abs(tiny - plain) <= 0.01
    padded = lineval.linear_probe(F.pad(x, (0, 1), value=7.0), y, F.pad(vx, (0, 1), value=7.0), vy,
                                  decays=(1e-4,))["top1"]                # by a constant feature
    assert abs(padded - plain) <= 0.05


class MeanColour(torch.nn.Module):
    """A stand-in network: three features, in colours turned by a matrix that can be trained."""
    feature_dim = 3

    def __init__(self):
        super().__init__()
        self.turn = torch.nn.Parameter(torch.eye(3))

    def forward(self, x):
        return x.mean((2, 3)) @ self.turn


@pytest.fixture
def colours():
    """60 pictures whose class is told by any crop."""
    labels = torch.arange(60) % 3
    pictures = torch.zeros(60, 3, 32, 32, dtype=torch.uint8)
    noise = torch.randint(99, 255, (60, 32, 32), generator=torch.Generator().manual_seed(0))
    pictures[torch.arange(60), labels] = noise.byte()
    return data.Images("colours", pictures, labels, ["r", "g", "b"])


@pytest.mark.parametrize("frozen", (True, False))
def test_training_on_crops(colours, monkeypatch, frozen):
    net, seen, augment = MeanColour(), [], data.augment
    monkeypatch.setattr(data, "augment", lambda *views: seen.append(augment(*views)) or seen[-1])
    before = [value.clone() for value in net.parameters()]
    train, val = (colours.select(torch.arange(first, 60, 2)) for first in (0, 1))
    assert lineval.train_on_crops(net, train, val, 32, frozen=frozen, lr=1, epochs=8) == 1
    assert len(seen) == 8 + 1 and not torch.equal(seen[0], seen[1])   # new crops an epoch
    assert all(torch.equal(*pair) for pair in zip(net.parameters(), before))


def test_fine_tuning_trains_the_network_and_the_probe_does_not(colours, monkeypatch):
    nets = []
    monkeypatch.setattr(lineval.copy, "deepcopy", lambda net: nets.append(MeanColour()) or nets[-1])
    for frozen in (True, False):
        lineval.train_on_crops(None, colours, colours, 32, frozen=frozen, lr=1, epochs=4)
        assert torch.equal(nets[-1].turn.data, torch.eye(3)) == frozen


def test_the_rate_of_fine_tuning_is_chosen_without_val(colours, monkeypatch):
    """A stand-in: the held-out tenth likes 0.01, val would like 0.1."""
    calls = []

    def train(net, train, val, size, *, lr, **options):
        calls.append((len(train), len(val)))
        return {0.1: (0.3, 0.9), 0.01: (0.8, 0.7), 0.001: (0.2, 0.1)}[lr][val is colours]

    monkeypatch.setattr(lineval, "train_on_crops", train)
    some = colours.select(torch.arange(50))
    assert lineval.finetune(None, some, colours, 32) == (0.7, 0.01)
    assert calls == [(45, 5)] * 3 + [(50, 60)]


def test_some_labels_are_of_every_class_and_nested():
    labels = torch.tensor([0] * 90 + [1] * 9 + [2])
    for share, count in ((0.001, 3), (0.02, 3), (0.1, 10), (1, 100)):
        some = lineval.some_labels(labels, share, seed=0)
        assert len(set(some.tolist())) == len(some) == count
        assert set(labels[some].tolist()) == {0, 1, 2}
    few, more = (set(lineval.some_labels(labels, share, 0).tolist()) for share in (0.1, 0.3))
    assert few < more
    assert few != set(lineval.some_labels(labels, 0.1, 1).tolist())


def test_representation_space_is_its_formulas():
    x0, labels = cloud(50, seed=5)
    x1 = x0 + 0.3 * cloud(50, seed=6)[0]
    found = lineval.representation_space(x0, x1, labels)
    a, b = (F.normalize(x.double(), dim=1) for x in (x0, x1))

    def d2(u, v):
        return float((u - v).square().sum())

    n = range(50)
    pairs = [(i, j) for i in n for j in range(i + 1, 50)]
    within = []
    for k in range(3):
        members = [(i, j) for i, j in pairs if labels[i] == labels[j] == k]
        within.append(sum(d2(a[i], a[j]) for i, j in members) / len(members))
    across = [(i, j) for i, j in pairs if labels[i] != labels[j]]
    singular = torch.linalg.svdvals(a - a.mean(0))
    shares = [float(v) for v in singular / singular.sum() if v > 0]
    farther = sum(a[i] @ b[i] > a[i] @ a[j] for i in n for j in n if i != j)
    potential = sum(math.exp(-2 * d2(a[i], a[j])) for i, j in pairs) / len(pairs)
    expected = dict(
        own_view=sum(all(a[i] @ b[i] > a[i] @ a[j] for j in n if j != i) for i in n) / 50,
        others_farther_than_view=float(farther) / (50 * 49),
        alignment=sum(d2(a[i], b[i]) for i in n) / 50,
        uniformity=math.log(potential),
        intra_class=sum(within) / 3,
        inter_class=sum(d2(a[i], a[j]) for i, j in across) / len(across),
        spread=math.sqrt(sum(d2(a[i], a.mean(0)) for i in n) / 50),
        effective_rank=math.exp(-sum(v * math.log(v) for v in shares)),
        view_images=50)
    expected["over_clustering"] = expected["intra_class"] / expected["inter_class"]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-4), name


def test_what_is_undefined_is_left_out():
    x = cloud(20)[0]
    of_classes = {"intra_class", "inter_class", "over_clustering"}
    for labels in (torch.arange(20), torch.full((20,), -1)):             # no class has two images
        assert not of_classes & lineval.representation_space(x, x, labels).keys()
    # One row again and again, of all lengths: a network that has collapsed.
    for row in (torch.zeros(1, 300), cloud(1, dim=300)[0]):
        x = row * torch.linspace(1, 3, 20)[:, None]
        same = lineval.representation_space(x, x, torch.arange(20) % 2)
        assert 0 <= same["intra_class"] < 1e-12 and same["own_view"] == 0
        assert not {"over_clustering", "effective_rank"} & same.keys()
        lineval.print_table({"collapsed": same | {"val_images": 20}}, True)
        assert lineval.verdict(same, same).startswith("collapsed")


def report(rank=30.0, own=0.5, farther=0.9, **more):
    return dict(effective_rank=rank, own_view=own, others_farther_than_view=farther,
                view_images=1000, val_images=1000) | more


def test_verdict_on_made_cases():
    random = report(own=0.2, farther=0.6, linear_top1=0.4)
    flat = [dict(spread=0.9, knn_backbone=min(i, 3) / 10) for i in range(9)]
    rising = [dict(spread=0.9, own_view=i / 10) for i in range(9)]
    for trained, log, word in (
        (report(rank=1.5, own=0.0, farther=0.5), [], "collapsed"),
        (report(rank=1.5, linear_top1=0.9), [], "learnt something: "),        # two classes, far apart
        (report(), [dict(spread=0.01)], "collapsed"),
        (report(own=0.21, farther=0.61), flat, "no better than random"),
        (report(own=0.2, farther=0.7), flat, "done"),
        (report(linear_top1=0.4), flat, "no better than random"),
        (report(linear_top1=0.5), flat, "done"),
        (report(), rising, "learnt something and still rising"),
        (report(), rising[::-1], "learnt something, but was better"),
        (report(), [*flat, dict(hours_left=0.5)], "learnt something: clearly better than random, and"),
        (report(), [dict(knn_backbone=x) for x in (0.3, 0.6, 0.9, 0.9)], "done"),
        (report(), [], "learnt something: "),
    ):
        assert lineval.verdict(trained, random, log).startswith(word), word


def test_features_are_the_networks_in_order(images):
    dataset = data.load_dataset(str(images), "val").select(torch.tensor([7, 0, 33]))
    net = build_backbone("mobilenetv3_small", True).eval()
    [features] = lineval.extract_features(net, data.CenterView(dataset, 32), batch_size=2)
    views = data.TwoViews(dataset, 32)
    of_views = lineval.extract_features(net, views, batch_size=2)
    with torch.no_grad():
        for i in range(3):
            x = dataset[i][0][None].float() / 255
            expected = net(TF.normalize(x, data.MEAN, data.STD))[0]
            torch.testing.assert_close(features[i], expected, atol=1e-6, rtol=1e-4)
            crops, params, _ = views[0, i]
            for v in range(2):
                expected = net(data.augment(crops[v:v + 1], params[v:v + 1]))[0]
                torch.testing.assert_close(of_views[v, i], expected, atol=1e-6, rtol=1e-4)


def test_random_baseline_sees_the_datas_statistics(images):
    dataset = data.load_dataset(str(images), "train")
    net = build_backbone("resnet18", True)
    lineval.estimate_batch_norm(net, dataset, 32)
    batch = torch.stack([dataset[i][0] for i in range(96)]).float() / 255
    x = F.conv2d(TF.normalize(batch, data.MEAN, data.STD), net.conv1.weight, padding=1)
    torch.testing.assert_close(net.bn1.running_mean, x.mean((0, 2, 3)), atol=1e-3, rtol=1e-3)
    assert net.bn1.momentum == 0.1


def test_held_out_fifth_is_keyed_and_disjoint(tmp_path):
    write_images(tmp_path, 60, splits=("pictures",))
    name = str(tmp_path / "pictures")
    for classes in (True, False):
        whole, parts = data.load_dataset(name, "train", classes), []
        for seed in (0, 0, 1):
            train, val, labelled, note = lineval.load_splits(name, whole, seed, classes)
            assert labelled == classes and len(val) == 12 and "12 of 60" in note
            assert sorted([*train.pictures, *val.pictures]) == sorted(whole.pictures)
            parts.append(val.pictures.tolist())
        assert parts[0] == parts[1] != parts[2]


def test_a_val_split_without_labels_is_not_used(tmp_path):
    """As in many competitions: train/CLASS/..., and a flat test/."""
    write_images(tmp_path, 60, splits=("images/train",))
    (tmp_path / "images" / "test").mkdir()
    for path in sorted((tmp_path / "images" / "train").rglob("*.png"))[:5]:
        (tmp_path / "images" / "test" / path.name).write_bytes(path.read_bytes())
    name = str(tmp_path / "images")
    whole = data.load_dataset(name, "train")
    train, val, labelled, note = lineval.load_splits(name, whole)
    assert labelled and (len(train), len(val)) == (48, 12)
    assert (val.labels >= 0).all() and "no val split with labels, so 12 of 60" in note


def test_while_training(images):
    encoder = Encoder("mobilenetv3_small", 16, 32, small_images=True).eval()
    options = dict(device=torch.device("cpu"), workers=0)
    whole = data.load_dataset(str(images), "train")
    splits = lineval.load_splits(str(images), whole)[:3]
    found = lineval.measure_online(encoder, *splits, 32, 0, **options)
    assert found.keys() == {"knn_backbone", "knn_head"} and 0 < found["knn_head"] <= 1
    whole = data.load_dataset(str(images), "train", with_classes=False)
    splits = lineval.load_splits(str(images), whole, with_classes=False)[:3]
    found = lineval.measure_online(encoder, *splits, 32, 0, **options)
    assert found.keys() == {"own_view"} and 0 < found["own_view"] <= 1


FLAGS = ["--workers", "0"]
LOG = "step,loss,chance,spread,knn_backbone,own_view,same_class,same_class_chance\n" + "".join(
    f"{10 * i},{5 - i},6,0.9,{0.5 if i % 2 else ''},,0.4,0.3\n" for i in range(1, 5))


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    """A run folder as pretrain.py leaves it."""
    folder = tmp_path_factory.mktemp("work") / "runs" / "tiny"
    folder.mkdir(parents=True)
    torch.manual_seed(1)
    encoder = Encoder("mobilenetv3_small", 16, 32, small_images=True)
    dataset = data.load_dataset(str(images), "train")
    settings = dict(arch="mobilenetv3_small", data=str(images), dataset=dataset.fingerprint(), dim=16,
                    hidden_dim=32, image_size=32, classes="folders", seed=0)
    (folder / "args.json").write_text(json.dumps(settings))
    (folder / "log.csv").write_text(LOG)
    torch.save(encoder.backbone.state_dict(), folder / "backbone.pt")
    queue = dict(keys=F.normalize(torch.randn(32, 16), dim=1), index=torch.arange(32))
    torch.save(dict(settings=settings, step=40, encoder=encoder.state_dict(),
                    key_encoder=encoder.state_dict(), queue=queue), folder / "last.pt")
    return folder


def test_report_pictures_and_json(run, images, tmp_path):
    folder = shutil.copytree(run, tmp_path / "runs" / "tiny")
    result = run_script("lineval.py", *FLAGS, cwd=tmp_path)     # the newest
    assert result.returncode == 0, result.stderr
    output, found = result.stdout, json.loads((folder / "lineval.json").read_text())
    for words in ("96 training and 96 validation", "3 classes (a, b, c), the largest 33.3%", "linear probe %",
                  "kNN %", "over-clustering", "effective rank", "own view found"):
        assert words in output, output
    assert ["random", "pretrained"] in [line.split() for line in output.splitlines()]
    share = found["pretrained"]["linear_top1"]
    assert f"{100 * share:.1f} ± {100 * math.sqrt(share * (1 - share) / 96):.1f}" in output
    assert output.index("linear probe %") < output.index("written into")
    assert found["verdict"] in output
    assert "best-NN" not in output and "best_nn" in found["random"]
    for name in ("neighbors.png", "map.png", "soft_positives.png"):
        with Image.open(folder / name) as image:
            assert len(image.convert("RGB").resize((64, 64)).getcolors(4096)) > 20     # not blank


def test_near_duplicates_come_last_in_the_picture(run, tmp_path):
    """A validation image that is a training image, saved anew and brighter."""
    where = write_images(tmp_path / "photos", 40, classes=("x", "y"))
    source = sorted((where / "train" / "x").iterdir())[7]
    copied = sorted((where / "val" / "y").iterdir())[4]
    with Image.open(source) as image:
        image.convert("RGB").point(lambda value: value + 4).save(copied, quality=80)
    lineval.main([str(run), "--data", str(where), "--out", str(tmp_path / "out"), *FLAGS])
    picture = TF.pil_to_tensor(Image.open(tmp_path / "out" / "neighbors-photos.png")).float()
    rows = [picture[:, top:top + 64, 6:] for top in range(6, 740, 74)]
    apart = [(row[:, :, :64] - row[:, :, 74:138]).abs().mean().item() for row in rows]
    assert apart.index(min(apart)) == 5 and apart[5] < 10 < apart[4], apart


def test_several_runs_other_data_and_the_key_encoder(run, tmp_path, capsys):
    other = write_images(tmp_path / "other", 40, classes=("x", "y"))
    before = {file.name: file.read_bytes() for file in run.iterdir()}
    lineval.main([str(run), str(run), "--encoder", "key", "--all", "--data", str(other), *FLAGS])
    output = capsys.readouterr().out
    for words in ("2 classes", "key encoder", "random 1", "pretrained 2", "best-NN"):
        assert words in output
    assert before.items() <= {file.name: file.read_bytes() for file in run.iterdir()}.items()
    assert json.loads((run / "lineval-other-key.json").read_text())["data"] == str(other)
    assert (run / "map-other-key.png").exists()


@pytest.mark.parametrize("hidden", (False, True))
def test_without_labels(run, tmp_path, capsys, hidden):
    """A tree without classes, or one whose folders are said to be none."""
    folders = ("a", "b") if hidden else ("",)
    where = write_images(tmp_path / "photos", 40, folders, splits=("",))
    flags = ["--classes", "none"] if hidden else []
    lineval.main([str(run), "--data", str(where), "--out", str(tmp_path / "out"), *flags, *FLAGS])
    output = capsys.readouterr().out
    for words in ("without labels", "8 of 40 images are held out", "effective rank", "uniformity"):
        assert words in output, output
    assert "kNN" not in output
    found = json.loads((tmp_path / "out" / "lineval-photos.json").read_text())
    assert f"{run}: {found['verdict']}" in output
    assert (tmp_path / "out" / "neighbors-photos.png").exists()


def test_bare_weights_of_torchvision(images, tmp_path, capsys):
    from torchvision.models import resnet18
    weights = resnet18().state_dict()
    torch.save(weights, tmp_path / "w.pt")
    lineval.main(["--weights", str(tmp_path / "w.pt"), "--arch", "resnet18", "--data", str(images),
                  "--image-size", "72", "--protocol", "augmented", "--epochs", "1", *FLAGS])
    assert "linear, augmented %" in capsys.readouterr().out
    backbone = build_backbone("resnet18")
    lineval.load_weights(backbone, tmp_path / "w.pt")
    assert torch.equal(backbone.layer4[1].conv2.weight, weights["layer4.1.conv2.weight"])


def test_few_labels_fine_tuning_and_the_features(run, images, tmp_path, capsys):
    lineval.main([str(run), "--shares", "0.01", "1", "--finetune", "--epochs", "1", "--features",
                  str(tmp_path / "x.npz"), "--out", str(tmp_path / "out"), *FLAGS])
    output = capsys.readouterr().out
    for words in ("linear probe % of      3", "fine-tuned % of     96"):
        assert words in output, output
    found = json.loads((tmp_path / "out" / "lineval.json").read_text())
    for network in ("random", "pretrained"):
        assert [row["labels"] for row in found[network]["few_labels"]] == [3, 96]
        assert found[network]["few_labels"][1]["linear"] == found[network]["linear_top1"]
        assert all(row["lr"] in lineval.FINETUNE_RATES for row in found[network]["few_labels"])
    assert (tmp_path / "out" / "few_labels.png").exists()
    there = np.load(tmp_path / "x.npz")
    assert there["features"].shape == (192, 1024) and there["is_val"].tolist() == [False] * 96 + [True] * 96
    train = data.load_dataset(str(images), "train")
    backbone = build_backbone("mobilenetv3_small", True).eval()
    lineval.load_weights(backbone, run / "backbone.pt")
    [expected] = lineval.extract_features(backbone, data.CenterView(train.select(torch.tensor([5])), 32))
    torch.testing.assert_close(torch.from_numpy(there["features"][5:6]), expected, atol=1e-5, rtol=1e-4)
    assert there["paths"][5] == train.path(5) and there["labels"][5] == train.labels[5]


def test_against_torchvisions_network_as_it_is(run, images, tmp_path, capsys, monkeypatch):
    """At 224 px, whatever the run's size: it was made for large images."""
    weights = build_backbone("mobilenetv3_small").state_dict()
    torch.save(weights, tmp_path / "imagenet.pt")
    monkeypatch.setattr(lineval, "MOST_NUMBERS", 60 * 1024)              # of the probes
    lineval.main([str(run), "--against", str(tmp_path / "imagenet.pt"), "--encoder", "key",
                  "--shares", "0.01", "1", "--out", str(tmp_path), *FLAGS])
    assert "against imagenet" in capsys.readouterr().out
    backbone = build_backbone("mobilenetv3_small").eval()
    backbone.load_state_dict(weights)
    val = data.load_dataset(str(images), "val")
    [x] = lineval.extract_features(backbone, data.CenterView(val, 224))
    found = json.loads((tmp_path / "lineval-key.json").read_text())["against imagenet"]
    spread = lineval.unit(x).double().var(0, correction=0).sum().sqrt().item()
    assert found["spread"] == pytest.approx(spread, rel=1e-4)
    assert [row["labels"] for row in found["few_labels"]] == [3, 60]     # those a probe has seen
    assert found["few_labels"][1]["linear"] == found["linear_top1"]


def test_bare_weights_are_read_as_made_for_large_images(images, tmp_path, capsys):
    """With the strides for small images MobileNetV3 would load them and compute something else."""
    weights = build_backbone("mobilenetv3_small").state_dict()
    torch.save(weights, tmp_path / "imagenet.pt")
    val = data.load_dataset(str(images), "val")
    for typed, size, small in (([], 224, False), (["--image-size", "32"], 32, True)):
        backbone = build_backbone("mobilenetv3_small", small).eval()
        backbone.load_state_dict(weights)
        [x] = lineval.extract_features(backbone, data.CenterView(val, size))
        lineval.main(["--weights", str(tmp_path / "imagenet.pt"), "--arch", "mobilenetv3_small",
                      "--data", str(images), "--out", str(tmp_path), *typed, *FLAGS])
        [report] = tmp_path.glob("lineval*.json")
        spread = lineval.unit(x).double().var(0, correction=0).sum().sqrt().item()
        found = json.loads(report.read_text())["pretrained"]
        assert found["spread"] == pytest.approx(spread, rel=1e-4)


def test_own_old_keys_are_no_soft_positives(run, images, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(lineval, "draw_rows", lambda path, queries, others, near:
                        shown.append((queries.pictures, others.pictures[near])))
    state = lineval.load_file(run / "last.pt")
    dataset = data.load_dataset(str(images), "train")
    own = data.permutation(32, data.SAMPLE, 0, 3)[0]                     # the first that is shown
    others = torch.arange(32)[torch.arange(32) != own][:8]
    state["queue"]["index"] = torch.full((32,), own)
    state["queue"]["index"][:8] = others
    lineval.draw_soft_positives("x.png", state, dataset.select(torch.arange(32)), seed=0)
    [(queries, near)] = shown
    assert near.shape == (10, 8) and {*near[0]} == {*dataset.pictures[others]}


def test_curve(tmp_path):
    for log in (LOG, "step,loss\n1,5\n"):                               # and one row alone
        (tmp_path / "log.csv").write_text(log)
        lineval.draw_curve(tmp_path / "log.csv", tmp_path / "curve.png")
        with Image.open(tmp_path / "curve.png") as image:
            assert image.height == 170 * (3 if log == LOG else 1)
            assert lineval.BLUE in [color for _, color in image.getcolors(10_000)]


def test_frames_tell_classes(tmp_path):
    labels = torch.tensor([0, -1, 0, 1])
    pictures = torch.full((4, 3, 32, 32), 90, dtype=torch.uint8)
    dataset = data.Images("gray", pictures, labels, ["x", "y"])
    others = torch.tensor([[2], [3], [1]])
    lineval.draw_rows(tmp_path / "rows.png", dataset.select(torch.tensor([0, 0, 0])), dataset, others)
    with Image.open(tmp_path / "rows.png") as image:
        frames = [image.getpixel((76, 2 + 74 * i)) for i in range(3)]
    assert frames == [lineval.BLUE, lineval.ORANGE, lineval.SILVER]


def test_bad_input_is_one_line(run, images, tmp_path, capsys, monkeypatch):
    write_images(tmp_path / "lonely", 5, splits=("train",))
    write_images(tmp_path / "lonely", 1, classes=("a",), splits=("val",))
    (tmp_path / "empty").mkdir()
    (tmp_path / "young").mkdir()
    (tmp_path / "young" / "args.json").write_text("{}")
    (tmp_path / "bad.pt").write_bytes(b"garbage")
    torch.save([1, 2], tmp_path / "list.pt")
    weights = build_backbone("resnet18").state_dict()
    torch.save(weights, tmp_path / "resnet18.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "resnet18.pt").read_bytes()[:10 ** 6])
    monkeypatch.chdir(tmp_path)
    bare = ["--arch", "resnet18", "--data", str(images), "--image-size", "72", "--weights"]
    for argv, words in (
        ([], ["python pretrain.py"]),
        (["nowhere"], ["nowhere", "args.json"]),
        (["nowhere", "neither"], ["nowhere", "neither"]),
        ([str(run), "young"], ["young", "has saved", "backbone.pt"]),
        ([str(run), "--features", "gone/features.npz"], ["--features gone", "does not exist"]),
        ([str(run), "--data", "empty"], ["no images"]),
        ([str(run), "--data", "lonely"], ["1 validation images", "at least 2"]),
        (["--weights", "bad.pt"], ["--arch"]),
        (["--arch", "vit"], ["vit", "resnet18"]),
        ([str(run), "--shares", "0"], ["--shares", "above 0"]),
        ([str(run), "--workers", "-1"], ["--workers -1", "at least 0"]),
        ([str(run), "--image-size", "4"], ["--image-size 4", "at least 8"]),
        ([str(run), "--shares", "1", "--classes", "none"], ["no labels", "--labels"]),
        ([str(run), *bare, "resnet18.pt"], ["resnet18.pt", "instead of a run", "--against"]),
        ([str(run), "--against", str(run / "backbone.pt")], ["backbone.pt", "RUN1 RUN2"]),
        ([*bare, str(run / "backbone.pt")], ["--weights", "backbone.pt", "the folder"]),
        ([*bare, "resnet18.pt", "--encoder", "key"], ["resnet18.pt", "no key encoder"]),
        ([*bare, "bad.pt"], ["bad.pt", "cannot be loaded"]),
        ([*bare, "cut.pt"], ["cut.pt", "cannot be loaded"]),
        ([*bare, "gone.pt"], ["gone.pt", "does not exist"]),
        ([*bare, "list.pt"], ["list.pt", "state dict"]),
        ([*bare, "resnet18.pt", "--arch", "resnet50"], ["resnet18.pt", "does not fit", "timm"]),
    ):
        line = error_of(lineval.main, argv, capsys)
        assert all(word in line for word in words), (argv, line)
    one_line_error(run_script("lineval.py", "nowhere", cwd=tmp_path), "nowhere")


def test_a_mistyped_run_is_named_before_the_long_work(run, capsys):
    with pytest.raises(data.UserError, match="nowhere"):
        lineval.main([str(run), "nowhere"])
    assert capsys.readouterr().out == ""


def test_the_table_is_printed_whatever_happens_after(run, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(data.UserError, match="cannot write .*file'"):
        lineval.main([str(run), "--out", str(tmp_path / "file"), *FLAGS])
    output = capsys.readouterr().out
    assert "own view found %" in output
    assert output.count(f"{run}: ") == 2                        # head line and verdict


def test_a_pickle_with_code_as_weights_runs_nothing(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))
    torch.save({"fc.weight": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(data.UserError, match="bomb.pt"):
        lineval.load_file(tmp_path / "bomb.pt")
    assert not (tmp_path / "ran").exists()
