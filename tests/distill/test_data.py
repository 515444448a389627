"""Images: what a batch holds, what it depends on, and what is said of files that are none."""

import io
import itertools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from timm.data.mixup import Mixup

from vitkd_fast.distill.config import Augmentation, Config, validate
from vitkd_fast.distill.data import Batch, Loader, Mixer, eval_transform, loaders
from vitkd_fast.distill.losses import CE, KD, StepOutputs
from vitkd_fast.distill.sources import DataError, class_folders, open_data, open_folder
from vitkd_fast.images import EXTENSIONS, open_rgb
from vitkd_fast.taps import TapOutputs

pytestmark = pytest.mark.usefixtures("one_thread")
STRONG = {"color_jitter": 0.4, "auto_augment": "rand-m9-mstd0.5"}


def image(file: Path, mode: str = "RGB") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.randint(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(file)
    return file


def folder(root: Path, classes: str = "cat dog", each: int = 5) -> Path:
    for i, name in enumerate(classes.split() * each):
        image(root / name / f"{i}.{'jpg' if i % 3 else 'PNG'}")
    return root


def config(augmentation: dict[str, Any] = STRONG, **data: Any) -> Config:
    data = {"image_size": 16, "batch_size": 4, "workers": 0, **data}
    data = {name: str(x) if isinstance(x, Path) else x for name, x in data.items()}
    rest = {"student": {"model": "mobilenetv2_050"}, "losses": {"ce": {}}}
    return validate({**rest, "data": data, "augmentation": augmentation})


def opened(seed: int = 0, classes: int | None = None, **data: Any) -> tuple[Loader, Loader]:
    whole = config(**data)
    return loaders(whole, open_data(whole.data, classes), seed)


def drawn(batches: Any) -> dict[int, bytes]:
    """Each image by its index, in their order; fails for one that comes twice."""
    pairs = [pair for x in batches for pair in zip(x.indices.tolist(), x.images, strict=True)]
    assert len(dict(pairs)) == len(pairs)
    return {index: image.numpy().tobytes() for index, image in pairs}


@pytest.mark.parametrize("workers", [0, 2])
def test_batches(tmp_path: Path, workers: int) -> None:
    train, val = folder(tmp_path / "train"), folder(tmp_path / "val", each=3)
    torch_state, before = torch.get_rng_state(), (random.getstate(), repr(np.random.get_state()))
    both = opened(train=train, val=val, workers=workers)
    for loader, sizes, first in zip(both, ([4, 4], [4, 2]), (5, 3), strict=True):
        batches = list(loader.epoch())
        assert loader.batches == 2 and [len(x.labels) for x in batches] == sizes
        for images, labels, indices, skipped in batches:
            assert images.dtype == torch.uint8 and images.shape == (len(labels), 3, 16, 16)
            assert images.is_contiguous(memory_format=torch.channels_last)
            assert images.is_pinned() == torch.cuda.is_available()
            assert labels.dtype == indices.dtype == torch.int64 and not skipped
            assert labels.tolist() == [int(i >= first) for i in indices.tolist()]
    assert list(drawn(batches)) == list(range(6))
    assert before == (random.getstate(), repr(np.random.get_state()))
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_augmentation_depends_on_seed_epoch_and_index_alone(tmp_path: Path) -> None:
    one = image(tmp_path / "val" / "a" / "0.png").read_bytes()
    for file in [tmp_path / "train" / x / f"{i}.png" for x in "ab" for i in range(5)]:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(one)
    data: dict[str, Any] = {"train": tmp_path / "train", "val": tmp_path / "val", "batch_size": 2}
    loader, workers = opened(**data)[0], opened(**data, workers=2)[0]
    first = drawn(loader.epoch(3))
    assert len(set(first.values())) == 10
    next(workers.epoch(1))  # given up
    for part in (loader, workers):
        assert [*drawn(part.epoch(3)).items()] == [*first.items()]
        assert [*drawn(part.epoch(3, 2)).items()] == [*first.items()][4:]
    assert not list(loader.epoch(3, 5))
    for other in (drawn(loader.epoch(4)), drawn(opened(seed=1, **data)[0].epoch(3))):
        assert list(other) != list(first) and set(other) == set(first)
        assert all(other[i] != first[i] for i in first)


def on_ranks(monkeypatch: pytest.MonkeyPatch, **data: Any) -> list[list[list[Batch]]]:
    """[rank][train, val] -> the batches, with torch.distributed's answers on each of two ranks."""
    every = []
    with monkeypatch.context() as patch:
        patch.setattr(torch.distributed, "is_initialized", lambda: True)
        patch.setattr(torch.distributed, "get_world_size", lambda: 2)
        for rank in range(2):
            patch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
            every.append([list(loader.epoch(1)) for loader in opened(**data)])
    return every


def test_ranks_share_an_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # validation's last batch holds one image on rank 0, and none on rank 1
    data = {"train": folder(tmp_path / "train", each=6), "val": folder(tmp_path / "val", "cat", 9)}
    ranks = on_ranks(monkeypatch, **data, batch_size=2)
    for i, loader in enumerate(opened(**data, batch_size=2)):
        whole, parts = drawn(loader.epoch(1)), [drawn(rank[i]) for rank in ranks]
        assert not parts[0].keys() & parts[1].keys() and parts[0] | parts[1] == whole
    assert [len(train) for train, _ in ranks] == [3, 3]
    assert [list(drawn(val)) for _, val in ranks] == [[0, 2, 4, 6, 8], [1, 3, 5, 7]]


def test_holdout(tmp_path: Path) -> None:
    data = config(train=folder(tmp_path, "ant bee cat", 10), holdout=0.3).data
    splits, again = open_data(data), open_data(data)
    assert splits.val.index == again.val.index and splits.train.index == again.train.index
    assert sorted(splits.train.index + splits.val.index) == list(range(30))
    assert [splits.val.read(i)[1] for i in range(9)] == [0] * 3 + [1] * 3 + [2] * 3
    with pytest.raises(DataError, match=r"data.holdout: 0.01 of 30 images"):
        open_data(config(train=tmp_path, holdout=0.01).data)
    # a source without files
    splits = open_data(config(dataset="digits", holdout=0.5).data)
    assert sorted(splits.train.index + splits.val.index) == list(range(1797))
    (image, label), i = splits.val.read(7), splits.val.index[7]
    assert label == splits.val.source.labels[i]
    assert np.array_equal(np.asarray(image)[..., 1], splits.val.source.images[i])


def test_torch_datasets_and_errors(tmp_path: Path) -> None:
    data: dict[str, Any] = {"dataset": "torch/image_folder", "root": tmp_path}
    for split in ("train", "val"):
        folder(tmp_path / split)
    assert open_data(config(**data).data).classes == ["cat", "dog"]
    assert [len(drawn(loader.epoch())) for loader in opened(**data)] == [8, 10]
    (tmp_path / "val" / "dog" / "1.jpg").write_text("no image")
    with pytest.raises(DataError, match=r"val/dog/1.jpg cannot be read"):
        list(opened(**data)[1].epoch())
    folder(tmp_path / "val", "ant")
    with pytest.raises(DataError, match="train and val differ in their classes"):
        open_data(config(**data).data)
    for name in ("torch/none", "torch/cifar10", "wds/x", "imagenet", "foo/bar"):
        with pytest.raises(DataError, match=rf"data.dataset: .*{name}"):
            open_data(config(dataset=name, root="" if "/" in name else tmp_path).data)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 2])
def test_wds(tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    webdataset = pytest.importorskip("webdataset")
    for first in (0, 5):
        with webdataset.TarWriter(str(tmp_path / f"{first}.tar")) as shard:
            for i in range(first, first + 5):
                grey = Image.new("RGB", (20, 20), (i, i, i))
                shard.write({"__key__": str(i), "png": grey, "cls": i % 3})
    split = {"name": "", "num_samples": 10, "filenames": ["0.tar", "5.tar"], "shard_lengths": []}
    splits = {"splits": {"train": split, "validation": split}}
    (tmp_path / "_info.json").write_text(json.dumps(splits))
    data: dict[str, Any] = {"dataset": "wds/x", "root": tmp_path, "workers": workers}
    data |= {"augmentation": {}, "classes": 3}  # nothing changes an image of one colour

    def seen(batches: Any) -> list[int]:
        every = list(batches)
        images = torch.cat([x.images for x in every])[:, 0, 0, 0]
        assert torch.equal(images % 3, torch.cat([x.labels for x in every]))
        return images.tolist()

    train, val = opened(**data)
    assert sorted(seen(val.epoch())) == list(range(10)) == sorted(seen(val.epoch()))
    once = seen(train.epoch(5))
    assert len(once) == len(set(once)) == 8 and seen(train.epoch(6)) != once
    assert seen(train.epoch(5)) == once == seen(opened(**data)[0].epoch(5))
    assert seen(train.epoch(5, 1)) == once[4:]
    ranks = on_ranks(monkeypatch, **data | {"batch_size": 1, "workers": 0})
    assert sorted(x for rank in ranks for x in seen(rank[0])) == list(range(10))
    with pytest.raises(DataError, match=r"data.workers: more than shards; 6 of 10 batches"):
        list(opened(**data | {"batch_size": 1, "workers": 4})[0].epoch())
    with pytest.raises(DataError, match="does not name its classes"):
        opened(**data | {"classes": None})


def test_hfds(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    path = folder(tmp_path / "p" / "train").parent
    data: dict[str, Any] = {"dataset": f"hfds/{path}", "root": tmp_path / "cache"}
    source = open_data(config(**data, train="train", val="train").data, 2).train
    assert sorted(source.read(i)[1] for i in range(10)) == [0] * 5 + [1] * 5


@pytest.mark.parametrize("mode", ["I;16", "RGB"])
def test_every_source_opens_an_image_alike(tmp_path: Path, mode: str) -> None:
    """Turned on its side, and of 16 bits: where a library converts by itself, both go wrong."""
    webdataset = pytest.importorskip("webdataset")
    pytest.importorskip("datasets")
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(np.linspace(0, 65535, 1200).reshape(30, 40).astype(np.uint16))
    if mode == "RGB":
        image = Image.fromarray(np.random.randint(0, 256, (30, 40, 3), dtype=np.uint8))
    for split, name in itertools.product(("train", "validation"), "ab"):
        (tmp_path / "p" / split / name).mkdir(parents=True)
        image.save(tmp_path / "p" / split / name / f"{split}.png", exif=exif)
    one = tmp_path / "p" / "train" / "a" / "train.png"
    with webdataset.TarWriter(str(tmp_path / "0.tar")) as shard:
        shard.write({"__key__": "0", "png": one.read_bytes(), "cls": 0})
    split = {"name": "", "num_samples": 1, "filenames": ["0.tar"], "shard_lengths": []}
    splits = {"splits": {"train": split, "validation": split}}
    (tmp_path / "_info.json").write_text(json.dumps(splits))
    expected = open_rgb(one)
    assert expected.size == (30, 40) and len(np.unique(expected)) == 256
    pixels = torch.as_tensor(eval_transform(16, 0.875, "bicubic")(expected)).permute(2, 0, 1)
    sources: dict[str, dict[str, Any]] = {
        "": {"train": tmp_path / "p" / "train", "val": tmp_path / "p" / "validation"},
        "torch/image_folder": {"root": tmp_path / "p"},
        f"hfds/{tmp_path}/p": {"root": tmp_path / "cache"},
        "wds/x": {"root": tmp_path},
    }
    for name, data in sources.items():
        (_, val) = opened(dataset=name, **data, batch_size=1, classes=2)
        batches = list(val.epoch())
        assert len(batches) == (1 if name == "wds/x" else 2), name
        assert all(torch.equal(x.images[0], pixels) for x in batches), name


def test_images_become_rgb(tmp_path: Path) -> None:
    modes = "RGB", "L", "P", "RGBA", "CMYK", "1", "LA"
    for i, mode in enumerate(modes):
        image(tmp_path / "val" / "a" / f"{i}.{'jpg' if mode == 'CMYK' else 'png'}", mode)
    data = {"train": folder(tmp_path / "train", "a b"), "val": tmp_path / "val"}
    images = torch.cat([x.images for x in opened(**data)[1].epoch()])
    grey = [bool((x[0] == x[1]).all() and (x[1] == x[2]).all()) for x in images]
    assert images.shape[1] == 3 and grey == [mode in ("L", "1", "LA") for mode in modes]


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images(tmp_path: Path, workers: int) -> None:
    data = {"train": folder(tmp_path / "train", each=10), "val": tmp_path / "val"}
    data |= {"workers": workers}
    names = "cat/2.jpg", "dog/1.jpg"
    for root in (tmp_path / "train", tmp_path / "val"):
        folder(root, each=10)
        bad = [root / name for name in names]
        bad[0].write_bytes(bad[0].read_bytes()[:-200])
        bad[1].write_text("no image")
    for loader, root in zip(opened(**data), ("train", "val"), strict=True):
        whole = f"^{tmp_path}/{root}/({'|'.join(names)}) cannot be read: "
        with pytest.raises(DataError, match=whole) as error:
            list(loader.epoch())
        assert "Traceback" not in str(error.value) and "\n" not in str(error.value)
    train, val = opened(**data, skip_bad=True)
    assert [len(x.labels) for x in train.epoch()] == [4] * 5
    name = open_data(config(**data).data).val.name
    assert list(drawn(val.epoch())) == [i for i in range(20) if Path(name(i)) not in bad]
    assert train.skipped == {str(tmp_path / "train" / x) for x in names}
    assert val.skipped == {str(tmp_path / "val" / x) for x in names}
    for file in list(tmp_path.glob("*/*/*")):
        file.write_text("no image")
    for loader in opened(**data, skip_bad=True):
        with pytest.raises(DataError, match="not one of 20 images can be read"):
            list(loader.epoch())
    # batches of which nothing is left do not end the epoch
    image(bad[1])
    assert len(drawn(opened(**data, skip_bad=True)[1].epoch())) == 1


@pytest.mark.parametrize("odd", ["0.png", "ant/.hidden", "ant/notes.txt", "link"])
def test_what_belongs_to_no_class(tmp_path: Path, odd: str) -> None:
    file = folder(tmp_path) / odd
    file.parent.mkdir(exist_ok=True)
    file.write_text("") if odd != "link" else file.symlink_to("nowhere")
    named = str(file if file.parent == tmp_path else file.parent)
    with pytest.raises(DataError, match=rf"^data.train: .*{named}\b.*--skip-bad"):
        open_data(config(train=tmp_path).data)
    splits = open_data(config(train=tmp_path, skip_bad=True, holdout=0.2).data)
    assert splits.classes == ["cat", "dog"] and len(splits.train) + len(splits.val) == 10
    assert len(splits.skipped) == 1 and named in splits.skipped[0]


@pytest.mark.parametrize("place", ["p", "p/", ".hidden/p"])
def test_what_is_no_image_is_ignored(tmp_path: Path, place: str) -> None:
    root = folder(tmp_path / place)
    _ = image(root / "cat/.ipynb_checkpoints/1.jpg"), image(root / ".git/cat/1.jpg")
    _ = image(root / "__MACOSX/cat/1.jpg")
    for name in (".DS_Store", "cat/.DS_Store", "cat/._1.jpg", "notes.txt", "dog/Thumbs.db"):
        (root / name).write_text("no image")
    splits = open_data(config(train=f"{tmp_path}/{place}", holdout=0.2).data)
    assert splits.classes == ["cat", "dog"] and len(splits.train) + len(splits.val) == 10
    assert not splits.skipped
    ignored = "files that are no images, ignored: 5 (3 hidden, 1 .db, 1 .txt)"
    assert splits.notes == [f"data.train: {ignored}"]


def test_the_first_level_is_the_class(tmp_path: Path) -> None:
    root = folder(tmp_path / "p", "cat/batch1 cat/batch2 dog/batch1 dog/batch2/more", 3)
    source = open_folder(str(root), {"cat": 0, "dog": 1}, False).source
    assert len(source) == 12 and source.classes == ["cat", "dog"]
    for i in range(12):
        assert Path(source.name(i)).relative_to(root).parts[0] == source.classes[source.read(i)[1]]
    assert torchvision.datasets.ImageFolder(root).class_to_idx == {"cat": 0, "dog": 1}
    root = folder(tmp_path / "q", "cat Cat 01 1 b10 b9")
    assert open_data(config(train=root, holdout=0.2).data).classes == "01 1 b9 b10 Cat cat".split()


def test_every_ending_trains(tmp_path: Path) -> None:
    for i, ending in enumerate(EXTENSIONS * 2):
        buffer = io.BytesIO()
        image = Image.fromarray(np.random.randint(0, 256, (30, 40, 3), dtype=np.uint8))
        image.save(buffer, Image.registered_extensions()[ending])
        file = tmp_path / "p" / "ab"[i % 2] / f"{i}{ending.upper() if i % 3 else ending}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(buffer.getvalue())
    splits = open_data(config(train=tmp_path / "p", holdout=0.25).data)
    assert len(splits.train) + len(splits.val) == 2 * len(EXTENSIONS) and not splits.notes
    assert sum(len(x.labels) for x in opened(train=tmp_path / "p", holdout=0.5)[1].epoch()) == 12


def test_links_lead_to_each_image_once(tmp_path: Path) -> None:
    root = folder(tmp_path / "p", "ant bee")
    for link, target in {
        "ant/loop": "..",
        "bee/all": root,
        "ant/top": "../../..",
        "me": ".",
    }.items():
        (root / link).symlink_to(target)
    (root / "ant" / "again.jpg").symlink_to(next((root / "ant").glob("*.jpg")))
    (root / "cow").symlink_to(folder(tmp_path / "pool", "x") / "x")
    splits = open_data(config(train=root, holdout=0.4).data)
    assert splits.classes == ["ant", "bee", "cow"]
    parts = [{Path(x.name(i)).resolve() for i in range(len(x))} for x in (splits.train, splits.val)]
    assert not parts[0] & parts[1] and [len(x) for x in parts] == [9, 6]
    (root / "dog").symlink_to("cow")
    with pytest.raises(DataError, match=rf"{root}/cow/.* and {root}/dog/.* are one file in two cl"):
        open_data(config(train=root).data)


def test_folders_that_hold_no_classes(tmp_path: Path) -> None:
    flat, one = image(tmp_path / "flat" / "1.png").parent, folder(tmp_path / "one", "cat")
    folder(tmp_path / "splits" / "train"), folder(tmp_path / "splits" / "Val")
    for root, message in {
        flat: "holds 1 images and no class folder with images; put the images of each",
        one: "expected to hold two or more classes, got one: 'cat'",
        tmp_path / "splits": f"holds train, Val, which are no classes; .* {tmp_path}/splits/train$",
        tmp_path / "none": "is no folder",
    }.items():
        with pytest.raises(DataError, match=f"^data.train: {root} {message}"):
            open_data(config(train=root).data)
    with pytest.raises(DataError, match=f"^DIR: {flat} holds 1 images"):
        open_folder(str(flat), {"cat": 0, "dog": 1}, False)


def test_classes_without_validation_are_named(tmp_path: Path) -> None:
    train, val = folder(tmp_path / "train", "a b c d e"), folder(tmp_path / "val", "c")
    notes = ["data.val: 4 of 5 classes have no image: 'a', 'b', 'd', ..."]
    assert open_data(config(train=train, val=val).data).notes == notes
    _ = [image(train / "c" / f"more{i}.png") for i in range(5)]
    notes = ["data.holdout: 0.1: in validation: 4 of 5 classes have no image: 'a', 'b', 'd', ..."]
    assert open_data(config(train=train, holdout=0.1).data).notes == notes


def test_validation_is_no_training(tmp_path: Path) -> None:
    train, val = folder(tmp_path / "train"), folder(tmp_path / "val")
    open_data(config(train=train, val=val).data)
    shared = next((train / "cat").iterdir())
    (val / "cat" / "shared.png").symlink_to(shared)
    with pytest.raises(DataError, match=f"^data.val: 1 of its 11 images .* such as {shared}; "):
        open_data(config(train=train, val=val).data)
    with pytest.raises(DataError, match=r"^data.val: 10 of its 10 images are in data.train too"):
        open_data(config(train=train, val=train).data)


def test_validation_and_its_errors(tmp_path: Path) -> None:
    train, val = folder(tmp_path / "train", "c1 c2 c10"), folder(tmp_path / "val", "c10")
    _, source, classes, *_ = open_data(config(train=train, val=val).data)
    assert classes == ["c1", "c2", "c10"] and source.read(0)[1] == 2
    with pytest.raises(DataError, match=r"15 training images are fewer .* takes: 16"):
        opened(train=train, val=val, batch_size=16)
    folder(val, "c3"), (tmp_path / "empty").mkdir()
    for name, message in {"val": "class 'c3'", "none": "no folder", "empty": "no class"}.items():
        with pytest.raises(DataError, match=f"data.val: .*{name}.*{message}"):
            open_data(config(train=train, val=tmp_path / name).data)
    with pytest.raises(DataError, match="empty holds no class folder"):
        open_data(config(train=tmp_path / "empty", skip_bad=True).data)


def test_open_folder(tmp_path: Path) -> None:
    known = {"tench": 0, "cock": 1, "hen": 2}
    root = folder(tmp_path / "p", "hen tench")
    assert class_folders(str(root)) == ["hen", "tench"]
    for skip_bad in (False, True):
        source, bad, notes, _ = open_folder(str(root), known, skip_bad)
        assert {source.read(i)[1] for i in range(len(source))} == {0, 2}
        assert not bad and len(notes) == skip_bad
        (root / "notes.txt").write_text("")
    with pytest.raises(DataError, match="class 'a' that the model does not know"):
        open_folder(str(folder(tmp_path / "x", "a hen")), known, False)
    with pytest.raises(DataError, match="no folder"):
        class_folders(str(tmp_path / "none"))


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("mixup, cutmix", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixing_is_timms(mode: Any, mixup: float, cutmix: float) -> None:
    ours = Mixer(Augmentation(mixup=mixup, cutmix=cutmix, mix_mode=mode, mix_prob=0.8))
    theirs = Mixup(mixup, cutmix, prob=0.8, mode=mode, label_smoothing=0.0, num_classes=5)
    shares = set()
    for seed in range(5):
        images, y = torch.rand(8, 3, 12, 12), torch.randint(5, (8,))
        np.random.seed(seed)
        expected, dense = theirs(images.clone(), y)
        np.random.seed(seed)
        mixed, (a, b, lam) = ours(images, y)
        assert torch.equal(mixed, expected) and torch.equal(a, y) and torch.equal(b, y.flip(0))
        assert isinstance(lam, float) if mode == "batch" else lam.shape == (8,)
        share = torch.as_tensor(lam, dtype=torch.float32).reshape(-1, 1)
        assert torch.allclose(share * F.one_hot(a, 5) + (1 - share) * F.one_hot(b, 5), dense)
        shares.update(share.flatten().tolist())
        student, teacher = torch.randn(8, 5), torch.randn(8, 5)
        kl = F.kl_div((student / 2).log_softmax(1), (teacher / 2).softmax(1), reduction="batchmean")
        ce = F.cross_entropy(student, dense, label_smoothing=0.1)
        seen = StepOutputs(TapOutputs(student), TapOutputs(teacher), (a, b, lam))
        assert torch.allclose(CE(label_smoothing=0.1)(seen, 0, None), ce, atol=1e-6)
        options = {"weight": {"start": 3, "end": 1}, "temperature": 2, "label_smoothing": 0.1}
        kd = KD.model_validate(options | {"ce_weight": 0.5})(seen, 0.5, None)
        assert torch.allclose(kd, 2 * 4 * kl + 0.5 * ce, atol=1e-5)
    assert len(shares) > 3
