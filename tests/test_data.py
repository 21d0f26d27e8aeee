"""Views are torchvision's transforms with keyed randomness; datasets are what is on the disk."""
import errno
import io
import os
import signal
import struct
import sys
import weakref
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as T
from torchvision.transforms.v2 import functional as TF

import data
from conftest import one_line_error, run_script
from data import BRIGHTNESS, CONTRAST, FLIP, GRAY, HUE, ORDERING, SATURATION, SIGMA
from data import CenterView, LocalError, TwoViews, UserError, load_dataset

JITTER = (0.4, 0.4, 0.4, 0.1)


def random_picture(height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)


def save(picture, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(path)


def write_tree(folder, count, parts=("train", "val"), classes="abc"):
    """`count` PNGs of 32 px below every part, in folders a, b and c."""
    for number, part in enumerate(parts):
        for i in range(count):
            name = classes[i % len(classes)]
            save(random_picture(32, 32, 1000 * number + i), folder / part / name / f"{i:03d}.png")
    return folder


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    return write_tree(tmp_path_factory.mktemp("split"), 48)


@pytest.fixture
def tree(tmp_path):
    """12 images in three classes, without splits; a test may change it."""
    return write_tree(tmp_path / "tree", 12, parts=("",))


# ------------------------------------------------- the device's share

def many_params(count, seed, jitter=JITTER, jitter_p=0.8, gray_p=0.2, blur_p=0.5):
    """Drawn parameters of `count` views, (count, 8)."""
    rng = data.generator(data.VIEWS, seed)
    rows = [data.draw_params(rng, jitter, jitter_p, gray_p, blur_p) for _ in range(count)]
    return torch.tensor(rows, dtype=torch.float32)


def by_torchvision(crop, p):
    """One sample by torchvision's own functions on a float image, in the drawn order."""
    x = crop.float() / 255
    steps = [
        lambda x: T.adjust_brightness(x, float(p[BRIGHTNESS])),
        lambda x: T.adjust_contrast(x, float(p[CONTRAST])),
        lambda x: T.adjust_saturation(x, float(p[SATURATION])),
        lambda x: T.adjust_hue(x, float(p[HUE])),
    ]
    for step in data.ORDERINGS[int(p[ORDERING])]:
        x = steps[step](x)
    if p[GRAY]:
        x = T.rgb_to_grayscale(x, 3)
    if p[SIGMA] > 0:
        x = T.gaussian_blur(x, 13, float(p[SIGMA]))
    if p[FLIP]:
        x = T.hflip(x)
    return x


@pytest.mark.parametrize("size", [16, 32, 224])
@pytest.mark.parametrize("jitter", [JITTER, (0.8, 0.8, 0.8, 0.4)])
def test_augment_is_torchvisions_functional_sample_by_sample(size, jitter):
    crops = torch.stack([random_picture(size, size, seed) for seed in range(48)])
    crops[0], crops[1] = 0, 255                # black, white: hue and saturation are undefined
    crops[2, 0] = 255                          # saturated
    crops[3:6] = crops[3:6, :1].clone()        # gray
    params = many_params(48, size, jitter, jitter_p=0.9, gray_p=0.3, blur_p=0.6)
    out = data.augment(crops, params)
    assert out.is_contiguous(memory_format=torch.channels_last)
    std, mean = torch.tensor(data.STD).view(3, 1, 1), torch.tensor(data.MEAN).view(3, 1, 1)
    for i in range(48):
        difference = out[i] * std + mean - by_torchvision(crops[i], params[i])
        assert difference.abs().max() < 1e-3, (i, params[i])


def test_augment_does_not_depend_on_the_company():
    crops = torch.stack([random_picture(24, 24, seed) for seed in range(40)])
    params = many_params(40, 5)
    whole = data.augment(crops, params)
    torch.testing.assert_close(data.augment(crops[7:9], params[7:9]), whole[7:9],
                               atol=1e-5, rtol=0)
    assert torch.equal(data.augment(crops, params), whole)


# ------------------------------------------------- the host's share: what is drawn

def is_uniform(values, low, high):
    histogram = torch.histc(values, 10, low, high) / len(values)
    return low <= values.min() and values.max() <= high and (histogram - 0.1).abs().max() < 0.01


def share(condition):
    return condition.double().mean().item()


def test_parameters_are_distributed_as_the_recipe_says():
    p = many_params(40000, 1, (0.4, 0.3, 1.5, 0.1))
    jittered = p[:, BRIGHTNESS] != 1
    assert share(p[:, FLIP] == 1) == pytest.approx(0.5, abs=0.01)
    assert share(p[:, GRAY] == 1) == pytest.approx(0.2, abs=0.01)
    assert share(p[:, SIGMA] > 0) == pytest.approx(0.5, abs=0.01)
    assert share(jittered) == pytest.approx(0.8, abs=0.01)
    for column, low, high in ((BRIGHTNESS, 0.6, 1.4), (CONTRAST, 0.7, 1.3), (SATURATION, 0, 2.5),
                              (HUE, -0.1, 0.1)):
        neutral = 0 if column == HUE else 1
        assert is_uniform(p[jittered, column], low - 1e-6, high + 1e-6)
        assert (p[~jittered, column] == neutral).all()        # all four or none
    assert is_uniform(p[p[:, SIGMA] > 0, SIGMA], 0.1, 2)
    orderings = torch.bincount(p[:, ORDERING].long(), minlength=24) / len(p)
    assert (orderings - 1 / 24).abs().max() < 0.005
    correlation = np.corrcoef(p[jittered].numpy().T)
    assert np.abs(correlation - np.eye(8)).max() < 0.02       # nothing hangs together


def test_boxes_are_those_of_random_resized_crop():
    rng = data.generator(2)
    ours = np.array([data.draw_box(rng, 120, 160, 0.2) for _ in range(20000)])
    top, left, height, width = ours.T
    assert top.min() >= 0 and (top + height).max() <= 120
    assert left.min() >= 0 and (left + width).max() <= 160
    area, aspect = height * width / (120 * 160), width / height
    assert 0.19 < area.min() and 0.73 < aspect.min() and aspect.max() < 1.36
    torch.manual_seed(0)
    like = torch.zeros(3, 120, 160)
    theirs = np.array([RandomResizedCrop.get_params(like, (0.2, 1.0), (3 / 4, 4 / 3))
                       for _ in range(4000)])
    for mine, reference in zip(ours.T, theirs.T):
        assert abs(mine.mean() - reference.mean()) < 0.05 * max(20, reference.mean())
        assert abs(mine.std() - reference.std()) < 0.1 * reference.std()


def test_box_of_an_extreme_image_is_the_largest_central_one():
    rng = data.generator(3)
    for _ in range(50):
        assert data.draw_box(rng, 10, 1000, 0.9) == (0, (1000 - 13) // 2, 10, 13)


@pytest.mark.parametrize("height, width, size", [(90, 130, 64), (32, 32, 32), (20, 31, 48),
                                                 (1, 5, 8)])
def test_a_crop_is_torchvisions_resized_crop_to_one_level(height, width, size):
    rng = data.generator(4)
    for seed in range(20):
        image = random_picture(height, width, seed)
        box = data.draw_box(rng, height, width, 0.2)
        crop = data.resize_crop(image, box, size)
        expected = TF.resized_crop(image, *box, [size, size], antialias=True)
        assert crop.shape == (1, 3, size, size) and crop.dtype == torch.uint8
        assert (crop[0].int() - expected.int()).abs().max() <= 1


# ------------------------------------------------- keyed randomness

def test_views_are_a_function_of_seed_epoch_and_index_alone(split):
    dataset = load_dataset(str(split), "train")
    views = TwoViews(dataset, 24, seed=3)
    crops, params, index = views[0, 5]
    assert crops.shape == (2, 3, 24, 24) and crops.dtype == torch.uint8
    assert params.shape == (2, 8) and params.dtype == torch.float32 and index == 5
    assert not torch.equal(crops[0], crops[1]) and not torch.equal(params[0], params[1])
    views[1, 7]                                               # what came between does not matter
    for again in (views[0, 5], TwoViews(dataset, 24, seed=3)[0, 5]):
        assert torch.equal(again[0], crops) and torch.equal(again[1], params)
    for other in (views[1, 5], views[0, 6], TwoViews(dataset, 24, seed=4)[0, 5]):
        assert not torch.equal(other[1], params)


def test_workers_change_nothing(split):
    views = TwoViews(load_dataset(str(split), "train"), 24)
    batches = list(data.schedule(48, 16, 1, seed=0))
    alone, helped = [list(data.iterate(views, batches, workers, 16)) for workers in (0, 2)]
    assert len(alone) == len(helped) == 3
    for batch, same in zip(alone, helped):
        assert batch[0].shape == (2, 16, 3, 24, 24) and batch[1].shape == (2, 16, 8)
        for tensor, other in zip(batch, same):
            assert torch.equal(tensor, other)


def test_parts_of_the_schedule_join_to_the_global_batch():
    whole = list(data.schedule(50, 12, 3, seed=7))
    assert len(whole) == 3 * 4
    parts = [data.schedule(50, 12, 3, seed=7, rank=rank, world=3) for rank in range(3)]
    assert [first + second + third for first, second, third in zip(*parts)] == whole
    assert list(data.schedule(50, 12, 3, seed=7, first_step=5)) == whole[5:]     # inside an epoch
    epochs = [sum(whole[start:start + 4], []) for start in (0, 4, 8)]
    for number, epoch in enumerate(epochs):
        assert len(set(epoch)) == 48 and {e for e, _ in epoch} == {number}
    assert [index for _, index in epochs[0]] != [index for _, index in epochs[1]]


def test_keyed_numbers_are_pinned():
    """Another stream would give a continued run other images than it had."""
    assert data.permutation(8, 1, 2).tolist() == [6, 0, 7, 5, 1, 4, 3, 2]
    assert data.generator(1, 2).random() != data.generator(1, 3).random()
    purposes = (data.VIEWS, data.ORDER, data.SHUFFLE, data.DRAWING, data.HOLD_OUT, data.SAMPLE)
    assert len(set(purposes)) == 6


# ------------------------------------------------- the loader: bounded memory, bounded waiting

@pytest.mark.parametrize("view", [TwoViews, CenterView])
def test_never_more_than_two_full_size_pictures_are_alive(split, monkeypatch, view):
    alive, most, read = set(), [], data.read_image

    def counted(path):
        picture = read(path).numpy().copy()                   # lives as long as a tensor uses it
        alive.add(path)
        weakref.finalize(picture, alive.discard, path)
        most.append(len(alive))
        return torch.from_numpy(picture)

    monkeypatch.setattr(data, "read_image", counted)
    views = view(load_dataset(str(split), "train"), 24)
    batch = [(0, i) for i in range(8)]
    loaded = list(data.iterate(views, [batch], 0, 8))
    assert len(loaded) == 1 and len(most) == 8 and max(most) <= 2


def first_batch(views, workers=1, batch_size=2):
    return next(data.iterate(views, [[(0, 0), (0, 1)]], workers, batch_size))


@pytest.mark.parametrize("view, workers, processes, used", (
    (CenterView, 2, 1, 2), (CenterView, 3, 1, 2), (CenterView, 0, 1, 0), (CenterView, 1, 4, 0),
    (TwoViews, 2, 1, 0)))
def test_no_more_workers_than_fit_into_shared_memory(monkeypatch, capsys, view, workers, processes,
                                                     used):
    """Batches of 3072 images of 3 kB, 9 MiB a view: half of 90 MiB has room for five of them, two
    for each worker and one at work."""
    monkeypatch.setattr(data.shutil, "disk_usage", lambda _: SimpleNamespace(total=90 << 20))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))    # they share it
    views = view([(random_picture(32, 32), 0)] * 2, 32)
    counts = []

    class Loader(data.DataLoader):
        def __init__(self, *args, num_workers, **options):
            counts.append(num_workers)
            super().__init__(*args, num_workers=num_workers, **options)
    monkeypatch.setattr(data, "DataLoader", Loader)
    data.say_once.cache_clear()
    first_batch(views, workers, batch_size=3072)
    first_batch(views, workers, batch_size=3072)              # says nothing again
    assert counts == [used, used]
    said = capsys.readouterr().out.count(f"room for {used} of {workers}")
    assert said == (1 if used < workers else 0)


def test_a_picture_that_cannot_be_written_is_named(tmp_path):
    views = TwoViews([(random_picture(32, 32), 0)] * 2, 32)
    with pytest.raises(UserError, match="cannot write .*nowhere/views.png"):
        data.draw_view_pairs(views, tmp_path / "nowhere" / "views.png")


def test_signals_that_ask_to_stop_end_no_worker():
    """They go to all processes of a group; the trainer alone decides."""
    class Signalled(CenterView):
        def __getitem__(self, item):
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
                os.kill(os.getpid(), number)
            return super().__getitem__(item)

    crops, _, _ = first_batch(Signalled([(random_picture(32, 32), 0)] * 2, 32))
    assert crops.shape == (1, 2, 3, 32, 32)


@pytest.mark.parametrize("local_rank, error, shown", (
    ("0", UserError, True), ("1", UserError, False), ("1", LocalError, True)))
def test_one_process_of_each_machine_prints_an_error(monkeypatch, capsys, local_rank, error, shown):
    """Here one of the second machine; what a process alone may have seen, it prints itself."""
    def main():
        raise error("the words")
    monkeypatch.setenv("RANK", "4")
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    with pytest.raises(SystemExit) as exit_code:
        data.run_main(main)
    assert exit_code.value.code == 2
    assert capsys.readouterr().err == "error: the words\n" * shown


@pytest.mark.parametrize("error", (UserError, KeyboardInterrupt))
def test_whatever_ends_a_script_lets_its_loader_go(error, split):
    """Or its workers, which outlive SIGTERM for minutes, would hold up the exit."""
    released = []

    def main():
        loaded = data.iterate(CenterView(load_dataset(str(split), "train"), 24), [[(0, 0)]], 0, 1)
        weakref.finalize(loaded, released.append, True)
        raise error("the words")
    with pytest.raises((SystemExit, error)) as ended:
        data.run_main(main)
    assert released and ended.traceback


def test_a_full_gpu_is_one_line(capsys):
    def main():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried\nto allocate")
    with pytest.raises(SystemExit) as exit_code:
        data.run_main(main)
    line = capsys.readouterr().err
    assert exit_code.value.code == 2 and line.startswith("error: ") and "--batch-size" in line
    assert line.count("\n") == 1


def test_an_unreadable_file_is_named_from_inside_a_worker(tree):
    (tree / "a" / "000.png").write_bytes(b"no image")
    with pytest.raises(LocalError) as error:
        first_batch(CenterView(load_dataset(str(tree), "train"), 32))
    assert data.last_line(error.value).startswith(repr(str(tree / "a" / "000.png")))


# ------------------------------------------------- datasets

def colours(pictures):
    """Shares of 4 x 4 x 4 colours, their roots: (N, 64)."""
    red, green, blue = (pictures // 64).flatten(2).unbind(1)
    bins = 16 * red + 4 * green + blue
    return torch.stack([torch.bincount(row, minlength=64) for row in bins]).float().sqrt()


def test_shapes_are_reproducible_and_colour_does_not_give_the_class():
    train, val = load_dataset("shapes", "train"), load_dataset("shapes", "val")
    assert len(train) >= 4000 and len(train.classes) >= 10
    assert train.fingerprint() == load_dataset("shapes", "train").fingerprint() != val.fingerprint()
    x, val_x = colours(train.pictures), colours(val.pictures)
    centroids = [x[train.labels == label].mean(0) for label in range(len(train.classes))]
    nearest = torch.cdist(val_x, torch.stack(centroids)).argmin(1)
    assert share(nearest == val.labels) < 2 / len(train.classes)


def test_labels_of_the_shapes_can_be_hidden():
    seen, hidden = load_dataset("shapes", "val"), load_dataset("shapes", "val", with_classes=False)
    assert (seen.labels >= 0).all() and (hidden.labels == -1).all()
    assert torch.equal(seen.pictures, hidden.pictures)
    assert seen.class_words().startswith("12 classes (disc, ") and hidden.class_words() == "no classes"


def test_folders_flat_nested_and_split(split, tmp_path):
    train, val = load_dataset(str(split), "train"), load_dataset(str(split), "val")
    assert train.classes == val.classes == ["a", "b", "c"] and len(train) == len(val) == 48
    assert data.has_val(str(split))
    red = torch.tensor([255, 0, 0], dtype=torch.uint8).view(3, 1, 1).expand(3, 7, 9)
    save(red, tmp_path / "x" / "y" / "1.png")
    save(red, tmp_path / "2.jpg")
    nested = load_dataset(str(tmp_path), "train")
    assert nested.classes == ["x"] and nested.labels.tolist() == [-1, 0]
    assert torch.equal(nested[1][0], red) and nested[1][1] == 0
    assert not data.has_val(str(tmp_path))
    with pytest.raises(UserError, match="has no val split"):
        load_dataset(str(tmp_path), "val")


@pytest.mark.parametrize("train, val", [("Training", "Testing"), ("train2017", "val2017"),
                                        ("TRAIN", "valid"), ("train", "Validation")])
def test_splits_are_known_in_usual_spellings(tmp_path, train, val):
    write_tree(tmp_path, 6, (train, val))
    assert data.find_splits(str(tmp_path)) == (str(tmp_path / train), str(tmp_path / val))
    assert load_dataset(str(tmp_path), "val").classes == ["a", "b", "c"]


def test_what_unpackers_leave_and_links_back_change_nothing(tmp_path):
    root = write_tree(tmp_path / "far" / "split", 12)
    before = load_dataset(str(root), "train")
    (root / "train" / "__MACOSX").mkdir()                     # without images: no class
    (root / "train" / "a" / "._001.png").write_bytes(b"a fork")
    save(before[0][0], root / "train" / ".thumbnails" / "x.png")
    (root / "train" / "a" / "back").symlink_to(root)
    (tmp_path / "aside").mkdir()
    (tmp_path / "aside" / "round").symlink_to(root / "train" / "a")
    (root / "train" / "a" / "round").symlink_to(tmp_path / "aside")
    (tmp_path / "near").symlink_to(root)
    for path in (root, tmp_path / "near"):
        now = load_dataset(str(path), "train")
        assert now.classes == before.classes and now.fingerprint() == before.fingerprint()
        assert torch.equal(now.labels, before.labels) and not now.left_out
    (root / "train" / "a" / "aside").symlink_to(root / "train" / "b")     # not back: a folder
    assert len(load_dataset(str(root), "train")) == 12 + 4


def test_what_cannot_be_had_is_named(tree, tmp_path, monkeypatch):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "readme.txt").write_text("x")
    for name, words in (("", "no folder"), (tmp_path / "nowhere", "nowhere.*no folder"),
                        (tmp_path / "text", "no images.*1 .txt"),
                        (tmp_path / "text" / "readme.txt", "no folder")):
        with pytest.raises(UserError, match=words):
            load_dataset(str(name), "train")
    write_tree(tmp_path / "split", 6, ("train",))
    write_tree(tmp_path / "split", 6, ("val",), classes="abz")
    with pytest.raises(UserError, match="class 'z' that .*train' has not"):
        load_dataset(str(tmp_path / "split"), "val")
    write_tree(tmp_path / "capitals", 6, ("train",))
    write_tree(tmp_path / "capitals", 6, ("val",), classes="ABC")
    with pytest.raises(UserError, match="class 'A' that .*train' has not"):
        load_dataset(str(tmp_path / "capitals"), "val")
    write_tree(tmp_path / "vehicles", 6, ("bus", "train"))
    with pytest.raises(UserError, match="images in 'bus' beside .*train'"):
        load_dataset(str(tmp_path / "vehicles"), "train")
    # Images in a single folder that is no class, such as test/unknown/, have no labels.
    write_tree(tmp_path / "unknown", 6, ("train",))
    write_tree(tmp_path / "unknown", 6, ("test",), classes="z")
    assert load_dataset(str(tmp_path / "unknown"), "val").labels.tolist() == [-1] * 6

    def offline(*_, **__):
        raise OSError("no route to host")
    monkeypatch.setattr(data.tv_datasets, "CIFAR10", offline)
    with pytest.raises(UserError, match="cannot download cifar10.*no route.*--data PATH"):
        load_dataset("cifar10", "train")


@pytest.mark.parametrize("forbidden", ["b", "tree"])
def test_a_folder_that_cannot_be_listed_is_named(tree, monkeypatch, forbidden):
    real = os.scandir

    def scandir(folder):
        if os.path.basename(folder) == forbidden:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), folder)
        return real(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match=f"cannot list .*{forbidden}': Permission denied"):
        load_dataset(str(tree), "train")


def test_stl10s_transposed_arrays_are_read(monkeypatch):
    pictures = np.arange(2 * 3 * 96 * 96, dtype=np.uint8).reshape(2, 3, 96, 96)
    source = SimpleNamespace(data=pictures.transpose(0, 1, 3, 2), labels=[4, -1], classes="abcde")
    monkeypatch.setattr(data.tv_datasets, "STL10", lambda *_, **__: source)
    dataset = load_dataset("stl10", "train")
    assert dataset.labels.tolist() == [4, -1]
    assert dataset[0][0][1, 2, 3] == pictures[0, 1, 3, 2]


# ------------------------------------------------- files

def odd_files(folder):
    """13 unusual kinds of image that people have."""
    folder.mkdir()
    rgb = data.draw_shapes(1, 7).pictures[0, :, :40, :40].permute(1, 2, 0).numpy()
    picture = Image.fromarray(rgb)
    for mode, name in (("CMYK", "cmyk.jpg"), ("L", "gray.jpg"), ("P", "palette.png"),
                       ("RGBA", "alpha.png"), ("1", "bits.png"), ("RGB", "upper.JPEG"),
                       ("RGB", "a.bmp"), ("RGB", "a.webp"), ("RGB", "a.tiff"), ("RGB", "a.gif")):
        picture.convert(mode).save(folder / name)
    sixteen = (np.arange(1600, dtype=np.uint16) * 40).reshape(40, 40)
    Image.fromarray(sixteen).save(folder / "16.png")
    (folder / "16.pgm").write_bytes(b"P5 40 40 65535\n" + sixteen.astype(">u2").tobytes())
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(rgb[:30]).save(folder / "turned.jpg", exif=turned)
    return folder


def test_unusual_files_decode_as_pillow_does(tmp_path):
    dataset = load_dataset(str(odd_files(tmp_path / "odd")), "train")
    assert len(dataset) == 13
    for i in range(len(dataset)):
        path = dataset.path(i)
        with Image.open(path) as file:
            if "16." in path:                                 # Pillow would clip at 255
                file = Image.fromarray((np.array(file) / 257).astype(np.uint8))
            expected = torch.from_numpy(np.array(file.convert("RGB"))).permute(2, 0, 1)
        image = dataset[i][0]
        assert image.dtype == torch.uint8 and image.shape == expected.shape, path
        assert (image.int() - expected.int()).abs().float().mean() < 2, path


def png_of(width, height):
    """The first bytes of a PNG that claims to have this size."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    head_sum = struct.pack(">I", zlib.crc32(head))
    return b"\x89PNG\r\n\x1a\n\0\0\0\r" + head + head_sum + b"\0\0\0\0IDAT"


NOISE = random_picture(64, 64).permute(1, 2, 0).numpy()


def encoded(array, kind):
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("content, words", [
    (b"", "cannot identify"),
    (b"no image", "cannot identify"),
    (png_of(40, 40), "truncated"),
    (png_of(20000, 10000), "200000000 pixels. exceeds limit"),
    (encoded(NOISE, "JPEG")[:-400], "truncated"),             # libjpeg would fill it up
    (encoded(np.eye(8, dtype=np.float32), "TIFF"), "mode F: the range"),
])
def test_files_that_cannot_be_decoded_are_named_with_the_reason(tmp_path, content, words):
    (tmp_path / "broken.jpg").write_bytes(content)
    words = f"broken.jpg' cannot be decoded .*{words}.*--skip-unreadable"
    with pytest.raises(UserError, match=words):
        data.read_image(str(tmp_path / "broken.jpg"))


def test_a_jpeg_may_be_larger_than_pillows_limit(tmp_path, monkeypatch):
    """As a photo of 190 Mpx: it is decoded by torchvision, and so readable in data.py as well."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for kind in ("JPEG", "PNG"):
        (tmp_path / kind).write_bytes(encoded(NOISE, kind))
    assert data.read_image(str(tmp_path / "JPEG")).shape == (3, 64, 64)
    with pytest.raises(UserError, match="exceeds limit"):
        data.read_image(str(tmp_path / "PNG"))


def test_no_file_starts_another_program(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: started.append(1))
    (tmp_path / "x.png").write_bytes(encoded(np.zeros((8, 8, 3), np.uint8), "EPS"))
    with pytest.raises(UserError, match="x.png"):
        data.read_image(str(tmp_path / "x.png"))
    assert not started


@pytest.mark.parametrize("call", ["os.stat", "builtins.open"])
@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ESTALE])
def test_a_fault_of_the_machine_is_no_fault_of_the_picture(tree, monkeypatch, call, number):
    path = str(tree / "a" / "000.png")
    real = {"os.stat": os.stat, "builtins.open": open}[call]

    def refuse(name, *rest, **options):
        if name == path:
            raise OSError(number, os.strerror(number))
        return real(name, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(call, refuse)
        with pytest.raises(UserError) as error:
            data.read_image(path)
    assert str(error.value) == f"cannot read {path!r}: {os.strerror(number)}"      # no advice


def test_other_images_of_the_same_names_are_another_dataset(tree):
    before = load_dataset(str(tree), "train").fingerprint()
    assert load_dataset(str(tree), "train").fingerprint() == before
    Image.new("RGB", (9, 9), "red").save(tree / "b" / "004.png")         # of 16 at most all sizes count
    other = load_dataset(str(tree), "train").fingerprint()
    (tree / "b" / "004.png").unlink()
    (tree / "b" / "004.png").symlink_to("gone")
    assert len({before, other, load_dataset(str(tree), "train").fingerprint()}) == 3


def test_a_dataset_without_its_unreadable_files(tree):
    (tree / "b" / "004.png").write_bytes(b"no image")
    dataset = load_dataset(str(tree), "train")
    unreadable = data.find_unreadable(dataset)
    assert len(unreadable) == 1
    [(index, error)] = unreadable.items()
    assert dataset.path(index).endswith("004.png") and "004.png" in str(error)
    good = dataset.without([index])
    assert len(good) == 11 and good.labels.tolist() == [0] * 4 + [1] * 3 + [2] * 4
    assert good.fingerprint() != dataset.fingerprint() and not data.find_unreadable(good)


# ------------------------------------------------- data.py PATH

def test_data_py_tells_what_it_found_and_draws_view_pairs(tmp_path, tree):
    odd_files(tree / "odd")
    (tree / "notes.txt").write_text("x")
    (tree / "a" / "broken.jpg").write_bytes(b"no image")
    os.mkfifo(tree / "a" / "pipe.jpg")                        # would hang whoever opens it
    os.mkfifo(tree / "pipe")
    result = run_script("data.py", tree, cwd=tmp_path, timeout=60)
    assert result.returncode == 0, result.stderr
    for words in ("train: 27 images", "4 classes (a, b, c, odd)", "without a label: 0", "1 .txt",
                  "cannot be read: 2", "broken.jpg' cannot be decoded (cannot identify",
                  "pipe.jpg': no regular file"):
        assert words in result.stdout, result.stdout
    with Image.open(tmp_path / "view_pairs.png") as picture:
        assert min(picture.size) > 64


def test_data_py_blurs_small_views_no_more_than_pretraining_does(monkeypatch, tree):
    shown = []
    monkeypatch.setattr(data, "draw_view_pairs", lambda views, _: shown.append((views.size, views.blur_p)))
    monkeypatch.setattr(sys, "argv", ["data.py", str(tree)])
    data.describe()
    [(size, blur_p)] = shown
    assert size <= data.SMALL and blur_p == 0


def test_names_that_no_terminal_can_print_are_escaped_in_one_line(tmp_path, tree):
    (tree / "a").rename(tree / os.fsdecode(b"caf\xe9"))
    (tree / os.fsdecode(b"x\xff\ny.jpg")).write_bytes(b"no image")
    result = run_script("data.py", tree, cwd=tmp_path, PYTHONIOENCODING="utf-8:strict")
    assert result.returncode == 0, result.stderr
    assert "b, c, caf\\udce9" in result.stdout
    assert "x\\udcff\\ny.jpg' cannot be decoded" in result.stdout


def test_data_py_without_a_dataset_says_what_to_pass(tmp_path):
    one_line_error(run_script("data.py", cwd=tmp_path), "usage: python data.py PATH")


# ------------------------------------------------- the view for evaluation

def test_evaluation_view():
    image = random_picture(300, 400)
    [view], params, index = CenterView([(image, 4)], 224)[0, 0]
    expected = TF.center_crop(TF.resize(image, [256], antialias=True), [224, 224])
    assert torch.equal(view, expected) and index == 0
    expected = T.normalize(view.float() / 255, data.MEAN, data.STD)
    torch.testing.assert_close(data.augment(view[None], params)[0], expected, atol=1e-6, rtol=1e-5)
    pillow = Image.fromarray(image.permute(1, 2, 0).numpy())              # as the papers' code
    pillow = np.array(T.center_crop(T.resize(pillow, 256), 224))
    assert (view.int() - torch.from_numpy(pillow).permute(2, 0, 1).int()).abs().max() <= 1
    [small], _, _ = CenterView([(image, 4)], 32)[0, 0]
    assert torch.equal(small, TF.resize(image, [32, 32], antialias=True))
