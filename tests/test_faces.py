"""Faces: where they are found, what is refused, how they are labelled, split, cropped, cached and paired."""

import errno
import gzip
import os
import struct
import sys
import zlib
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.io
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from admm.data import DatasetError
from experiments.faces import data as faces
from experiments.faces.data import ATTRIBUTES, load_faces, pairs

PEOPLE = {"Ann": 3, "Bob": 1, "Cy": 2, "Di": 2}
NAMES = [f"{person}/{person}_{i:04d}.png" for person, count in PEOPLE.items() for i in range(1, count + 1)]
WIDTH, HEIGHT = 12, 10


def pixels(name):
    """Random content [H, W, 3], the same for the same name."""
    return np.random.RandomState(sum(name.encode())).randint(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def write(folder, names=NAMES):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(name)).save(folder / name)


def answers(rows=8):
    return np.random.RandomState(0).randint(0, 2, (rows, 40))


def table(images=NAMES, values=None):
    frame = pd.DataFrame(answers(len(images)) if values is None else values, columns=ATTRIBUTES)
    frame.insert(0, "image", list(images))
    return frame


@pytest.fixture
def root(tmp_path):
    """A folder with faces and their table."""
    write(tmp_path / "faces")
    table().to_csv(tmp_path / "a.csv", index=False)
    return tmp_path


@pytest.fixture
def decoded(monkeypatch):
    """Names of the files decoded so far."""
    files, face = [], faces._face
    monkeypatch.setattr(faces, "_face", lambda file, *args: (files.append(file.name), face(file, *args))[1])
    return files


def message(root, error=DatasetError, **kwargs):
    with pytest.raises(error) as caught:
        load_faces(root, **({"size": 4, "download": False} | kwargs))
    return str(caught.value)


def test_the_attributes_are_celeba_s():
    assert len(ATTRIBUTES) == 40 and list(ATTRIBUTES) == sorted(ATTRIBUTES)
    assert (ATTRIBUTES[0], ATTRIBUTES[20], ATTRIBUTES[31], ATTRIBUTES[39]) == (
        "5_o_Clock_Shadow",
        "Male",
        "Smiling",
        "Young",
    )


# Folders by person with a table


def test_faces_with_a_table(root):
    found = load_faces(root, attributes="a.csv", size=6)
    assert found.names == tuple(NAMES) and found.persons == ("Ann", "Bob", "Cy", "Di")
    assert found.people.dtype == torch.int64 and found.people.tolist() == [0, 0, 0, 1, 2, 2, 3, 3]
    assert found.images.dtype == torch.uint8 and found.images.shape == (8, 3, 6, 6) and found.images.is_contiguous()
    assert found.attributes.dtype == torch.int8 and np.array_equal(found.attributes, answers())
    assert found.attribute_names == ATTRIBUTES and found.labels == "proxy labels"
    assert load_faces(root, attributes=root / "a.csv", labels="a census", size=6).labels == "a census"


def test_faces_without_labels(root):
    found = load_faces(root, size=6)
    assert found.labels == "none" and found.attributes.shape == (8, 40) and (found.attributes == -1).all()


def test_the_names_may_leave_out_the_person_or_have_backslashes_and_come_in_any_order(root):
    names = [NAMES[5].replace("/", "\\"), NAMES[0].split("/")[1], NAMES[3]]
    frame = table(names).iloc[:, ::-1].assign(remark="what no one asked for")
    (root / "b.csv.gz").write_bytes(gzip.compress(frame.to_csv(index=False).encode()))
    found = load_faces(root, attributes="b.csv.gz", size=6).attributes
    assert np.array_equal(found[[5, 0, 3]], answers(3))
    assert (found[[1, 2, 4, 6, 7]] == -1).all()


APART, TOGETHER = "Jose\u0301", "Jos\u00e9"  # é as a letter and an accent (NFD), and as one character (NFC)


def test_names_are_the_same_with_letters_and_accents_apart_and_together(tmp_path):
    write(tmp_path / "faces", [f"{APART}/{APART}_1.png", f"{TOGETHER}/{TOGETHER}_2.png", "Ann/1.png"])
    expected = ("Ann/1.png", f"{TOGETHER}/{TOGETHER}_1.png", f"{TOGETHER}/{TOGETHER}_2.png")
    table([f"{TOGETHER}/{TOGETHER}_1.png", f"{APART}_2.png"]).to_csv(tmp_path / "a.csv", index=False)
    found = load_faces(tmp_path, attributes="a.csv", size=6)
    assert found.names == expected and found.persons == ("Ann", TOGETHER) and found.people.tolist() == [0, 1, 1]
    assert np.array_equal(found.attributes[1:], answers(2)) and (found.attributes[0] == -1).all()
    assert np.array_equal(
        load_faces(tmp_path, size=10, box=(-5, -5, 5, 5)).images[1].permute(1, 2, 0),
        pixels(f"{APART}/{APART}_1.png")[:, 1:11],
    )
    write(tmp_path / "faces", [f"{TOGETHER}/{TOGETHER}_1.png"])
    assert message(tmp_path).startswith(f"{tmp_path / 'faces'}: two files are called {expected[1]}, one in another")


def test_names_that_differ_in_case_are_two_people_s(tmp_path):
    write(tmp_path / "faces", ["Ann/1.png", "ann/1.png"])
    if len(list((tmp_path / "faces").iterdir())) == 2:  # the file system tells them apart
        table(["ann/1.png"]).to_csv(tmp_path / "a.csv", index=False)
        found = load_faces(tmp_path, attributes="a.csv", size=6)
        assert found.persons == ("Ann", "ann") and (found.attributes >= 0).any(1).tolist() == [False, True]


def test_equal_file_names_need_the_person(tmp_path):
    names = ["Ann/1.png", "Bob/1.png"]
    write(tmp_path / "faces", names)
    table(names).to_csv(tmp_path / "whole.csv", index=False)
    assert np.array_equal(load_faces(tmp_path, attributes="whole.csv", size=6).attributes, answers(2))
    table(["1.png"]).to_csv(tmp_path / "bare.csv", index=False)
    expected = f"{tmp_path / 'bare.csv'}: no face is called 1.png (of 1 such), one is Ann/1.png"
    assert message(tmp_path, attributes="bare.csv") == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 1, 1, np.nan], [0, 1, 1, -1]),
        ([-1, 1, -1, np.nan], [0, 1, 0, -1]),
        ([0.499, 0.5, 0.97, np.nan], [0, 1, 1, -1]),
        ([False, True, False, True], [0, 1, 0, 1]),
        ([np.nan] * 4, [-1] * 4),
    ],
)
def test_answers_and_probabilities(values, expected, root):
    table(NAMES[:4], np.tile(np.array(values)[:, None], 40)).to_csv(root / "b.csv", index=False)
    found = load_faces(root, attributes="b.csv", size=6).attributes[:4]
    assert np.array_equal(found, np.tile(np.array(expected)[:, None], 40))


def test_an_empty_table_tells_nothing(root):
    table([], np.empty((0, 40))).to_csv(root / "b.csv", index=False)
    assert (load_faces(root, attributes="b.csv", size=6).attributes == -1).all()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda t: t.rename(columns={"image": "file"}), "has no column image, only file, 5_o_Clock_Shadow, "),
        (lambda t: t.drop(columns=["Male", "Young"]), "has no attribute Male, Young"),
        (lambda t: t.replace({NAMES[6]: "Eve/Eve_0001.png"}), "no face is called Eve/Eve_0001.png (of 1 such), one is"),
        (lambda t: t.replace({NAMES[6]: NAMES[0]}), f"image {NAMES[0]} is listed twice"),
        (lambda t: t.assign(Male="yes"), "attributes must be numbers, or empty where unknown (could not convert"),
        (lambda t: t.assign(Male=2), "attributes are numbers from 0.0 to 2.0, expected 0/1, -1/1 or probabilities"),
        (lambda t: t.assign(Male=-1), "attributes are numbers from -1.0 to 1.0, expected 0/1, -1/1 or probabilities"),
        (lambda t: t.assign(Male=np.inf), "attributes are numbers from 0.0 to inf"),
    ],
)
def test_a_wrong_table_is_named(change, problem, root):
    change(table()).to_csv(root / "b.csv", index=False)
    assert message(root, attributes="b.csv").startswith(f"{root / 'b.csv'}: {problem}")


@pytest.mark.parametrize(("file", "raw"), [("b.csv", b""), ("b.csv.gz", b"\x1f\x8bno"), ("b.txt", b"# \xff")])
def test_a_damaged_table_is_named(file, raw, root):
    (root / file).write_bytes(raw)
    assert message(root, attributes=file).startswith(f"{root / file}: could not be read as a table of attributes (")


def test_an_absent_table_is_named_with_one_that_anybody_has(root):
    absent = message(root, attributes="b.csv")
    assert absent == f"{root / 'b.csv'}: there is no such table; for LFW, download {faces.SCORES} and give its path"


# Kumar et al.'s scores of 73 attributes

NAMED = (
    "Male,Asian,White,Black,Baby,Child,Youth,Middle Aged,Senior,Black Hair,Blond Hair,Brown Hair,Bald,No Eyewear,"
    "Eyeglasses,Sunglasses,Mustache,Smiling,Frowning,Chubby,Blurry,Harsh Lighting,Flash,Soft Lighting,Outdoor,"
    "Curly Hair,Wavy Hair,Straight Hair,Receding Hairline,Bangs,Sideburns,Fully Visible Forehead,"
    "Partially Visible Forehead,Obstructed Forehead,Bushy Eyebrows,Arched Eyebrows,Narrow Eyes,Eyes Open,Big Nose,"
    "Pointy Nose,Big Lips,Mouth Closed,Mouth Slightly Open,Mouth Wide Open,Teeth Not Visible,No Beard,Goatee,"
    "Round Jaw,Double Chin,Wearing Hat,Oval Face,Square Face,Round Face,Color Photo,Posed Photo,Attractive Man,"
    "Attractive Woman,Indian,Gray Hair,Bags Under Eyes,Heavy Makeup,Rosy Cheeks,Shiny Skin,Pale Skin,"
    "5 o' Clock Shadow,Strong Nose-Mouth Lines,Wearing Lipstick,Flushed Face,High Cheekbones,Brown Eyes,"
    "Wearing Earrings,Wearing Necktie,Wearing Necklace"
)
SCORED = NAMED.split(",")
LINES = [("Abdel Aziz Al-Hakim", 1), ("Abdel Aziz Al-Hakim", 12), ("Mr T", 2)]
FILES = ["Abdel_Aziz_Al-Hakim/Abdel_Aziz_Al-Hakim_0001.jpg", "Abdel_Aziz_Al-Hakim/Abdel_Aziz_Al-Hakim_0012.jpg"]
FILES += ["Mr_T/Mr_T_0001.jpg", "Mr_T/Mr_T_0002.jpg"]  # the third is in no line
FIRST = "# lfw_attributes.txt - made up\n"


def scored(root, first=FIRST, header=("person", "imagenum", *SCORED), lines=LINES, change=lambda row: row):
    """Faces, and a table of random scores [lines, 73] in the form of lfw_attributes.txt. Returns the scores."""
    write(root / "faces", FILES)
    scores = np.random.RandomState(0).randn(len(lines), len(SCORED)).round(12)
    scores[0, :2] = 0.0, -0.0
    rows = [change([name, str(number), *map(str, row)]) for (name, number), row in zip(lines, scores, strict=True)]
    text = "".join("\t".join(row) + "\n" for row in (["#", *header], *rows))
    (root / "lfw_attributes.txt").write_text(first + text, encoding="utf-8")
    return scores


def test_faces_with_scores(tmp_path):
    scores = scored(tmp_path)
    found = load_faces(tmp_path, attributes=str(tmp_path / "lfw_attributes.txt"), size=4)
    assert found.names == tuple(FILES) and found.labels == "proxy labels"
    by_name = {
        name.replace(" ", "_").replace("o'_C", "o_C"): column for name, column in zip(SCORED, scores.T, strict=True)
    }
    for name, answers in zip(ATTRIBUTES, found.attributes.T.tolist(), strict=True):
        if name in ("Attractive", "Young"):
            assert answers == [-1] * 4
        else:
            yes = [int(score > 0) for score in by_name[name]]
            assert answers == [*yes[:2], -1, yes[2]]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"first": "# person\timagenum\n", "header": ["made up"]}, "the last line of comment is '#\\tmade up\\n', exp"),
        (
            {"first": FIRST * 2, "header": ["person", "Male"]},
            "the last line of comment is '#\\tperson\\tMale\\n', expected",
        ),
        ({"header": ("person", "imagenum", *SCORED[1:])}, "rows have 75 values, expected 74 as the header has"),
        ({"header": ("person", "imagenum", "Man", *SCORED[1:])}, "has no attribute Male"),
        (
            {"change": lambda row: [*row[:2], "yes", *row[3:]]},
            "Male of Abdel Aziz Al-Hakim is 'yes', expected a number",
        ),
        (
            {"change": lambda row: [row[0], "one", *row[2:]]},
            "imagenum of Abdel Aziz Al-Hakim is 'one', expected a number",
        ),
        (
            {"change": lambda row: row[: 75 if row[1] == "1" else 9]},
            "Middle Aged of Abdel Aziz Al-Hakim is '', expected a ",
        ),
        ({"lines": [*LINES, ("Eve", 3)]}, "no face is called Eve/Eve_0003.jpg (of 1 such), one is Abdel_Aziz_"),
        ({"lines": [*LINES, LINES[0]]}, f"image {FILES[0]} is listed twice, expected one row each"),
    ],
)
def test_wrong_scores_are_named(change, problem, tmp_path):
    scored(tmp_path, **change)
    path = tmp_path / "lfw_attributes.txt"
    assert message(tmp_path, attributes=path).startswith(f"{path}: {problem}")


# The split by identity


@given(st.lists(st.integers(1, 30), min_size=2, max_size=30), st.floats(0.05, 0.95), st.integers(0, 2**32 - 1))
def test_nobody_is_in_both_sets(counts, fraction, seed):
    people = np.repeat(np.arange(len(counts)), counts)
    train, test = faces.split_people(people, fraction, seed)
    assert sorted([*train, *test]) == list(range(len(people))) and len(train) and len(test)
    assert not set(people[train]) & set(people[test])
    assert (np.diff(train) > 0).all() and (np.diff(test) > 0).all()
    assert abs(len(train) - fraction * len(people)) <= max(counts)


def test_the_split_is_seeded_and_is_lfwa_s_share(root):
    people = np.random.RandomState(0).randint(0, 5749, 13233)
    people = np.unique(people, return_inverse=True)[1]
    train, _ = faces.split_people(people, 6263 / 13143, 0)
    assert abs(len(train) - 6306) <= 2
    assert not np.array_equal(train, faces.split_people(people, 6263 / 13143, 1)[0])
    one, same = (load_faces(root, size=6, split_seed=3) for _ in range(2))
    assert torch.equal(one.train, same.train) and torch.equal(one.test, same.test)
    assert one.train.dtype == one.test.dtype == torch.int64 and len(one.train) + len(one.test) == 8
    assert len(load_faces(root, size=6, train_fraction=0.99).train) > len(load_faces(root, train_fraction=0.01).train)


def test_the_split_is_the_same_in_every_version():
    train, test = faces.split_people(np.array([0, 0, 0, 1, 2, 2, 3, 3]), 0.5, 0)
    assert (train.tolist(), test.tolist()) == ([4, 5, 6, 7], [0, 1, 2, 3])


def test_the_order_of_the_file_system_does_not_matter(root, tmp_path_factory, monkeypatch):
    other = tmp_path_factory.mktemp("other")
    write(other / "faces", NAMES[::-1])
    iterdir = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda path: reversed(list(iterdir(path))))
    one, two = load_faces(root, size=6), load_faces(other, size=6)
    assert one.names == two.names == tuple(NAMES) and one.sha256 == two.sha256
    assert torch.equal(one.train, two.train)


def test_a_folder_that_may_not_be_read_is_named(root, monkeypatch):
    iterdir = Path.iterdir

    def denied(path):
        if path.name == "Cy":
            raise PermissionError(13, "Permission denied", str(path))
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", denied)
    expected = f"{root / 'faces'}: could not be searched ([Errno 13] Permission denied: '{root / 'faces' / 'Cy'}')"
    assert message(root) == expected


def test_one_person_cannot_be_split(tmp_path):
    write(tmp_path / "faces", NAMES[:3])
    assert "all faces are of one person" in message(tmp_path)


def test_sha256_is_of_all_content(root):
    sums = {load_faces(root, **({"size": 6} | kwargs)).sha256 for kwargs in ({}, {"size": 7}, {"train_fraction": 0.9})}
    sums |= {load_faces(root, size=6, attributes="a.csv").sha256}
    Image.fromarray(pixels("another")).save(root / "faces" / NAMES[4])
    sums |= {load_faces(root, size=6).sha256}
    assert len(sums) == 5


# LFWA as its authors give it

LISTED = [NAMES[i] for i in (6, 0, 1, 4, 3)]  # neither all nor in order
TRAIN, TEST = [[1.0], [4.0]], [[5.0], [2.0]]  # 1-based columns; the third image is in neither


def cell(strings):
    return np.array([*strings, None], dtype=object)[:-1, None]


def write_v5(path, **variables):
    scipy.io.savemat(path, {key: cell(x) if isinstance(x[0], str) else x for key, x in variables.items()})


def write_v73(path, **variables):
    """As MATLAB's save(…, '-v7.3'), which LFWA's authors have used: a header of 128 bytes in a block of 512, the class
    as an attribute, axes reversed, and cells of strings as references to columns of uint16 in the group #refs#."""
    h5py = pytest.importorskip("h5py")

    def put(file, key, data, kind, **more):
        made = file.create_dataset(key, data=data, **more)
        made.attrs["MATLAB_class"] = np.bytes_(kind)
        return made

    def string(file, text):
        units = np.frombuffer(text.encode("utf-16-le"), np.uint16)[:, None]
        made = put(file, f"#refs#/a{len(file['#refs#'])}", units, "char")
        made.attrs["MATLAB_int_decode"] = np.int32(2)
        return made.ref

    with h5py.File(path, "w", userblock_size=512) as file:
        put(file, "#refs#/a", np.zeros(2, np.uint64), "canonical empty").attrs["MATLAB_empty"] = np.uint8(1)
        for key, x in variables.items():
            if isinstance(x[0], str):
                put(file, key, np.array([[string(file, text) for text in x]], h5py.ref_dtype), "cell")
            else:
                put(file, key, np.asarray(x).T, "double", chunks=True, compression="gzip")
    with path.open("r+b") as file:
        header = b"MATLAB 7.3 MAT-file, Platform: PCWIN64, Created on: Tue Dec 01 2015 HDF5 schema 1.00 ."
        file.write(header.ljust(124) + b"\x00\x02IM")


def lfwa(root, write_mat=write_v5, folder="lfw", **changes):
    """LFWA's layout; its columns are in another order and have spaces."""
    order = np.random.RandomState(1).permutation(40)
    labels = {
        "AttrName": [ATTRIBUTES[i].replace("5_o_", "5_o'").replace("_", " ") for i in order],
        "label": answers(len(LISTED))[:, order].astype(float),
        "name": [name.replace("/", "\\") for name in LISTED],
    }
    split = {"indices_img_train": TRAIN, "indices_img_test": TEST}
    split |= {"indices_identity_train": [[1.0]], "indices_identity_test": [[2.0]]}
    for file, variables in (("lfw_att_40.mat", labels), ("indices_train_test.mat", split)):
        variables |= {key: changes[key] for key in variables.keys() & changes}
        write_mat(root / file, **{key: x for key, x in variables.items() if x is not None})
    write(root / folder)


@pytest.mark.parametrize("write_mat", [write_v5, write_v73])
@pytest.mark.parametrize("slash", ["/", "\\"])
def test_lfwa_is_taken_as_it_is(write_mat, slash, tmp_path):
    lfwa(tmp_path, write_mat, name=[name.replace("/", slash) for name in LISTED])
    found = load_faces(tmp_path, size=10, box=(-6, -5, 4, 5))
    assert found.labels == "LFWA" and found.names == tuple(LISTED)
    assert found.persons == ("Ann", "Bob", "Cy", "Di") and found.people.tolist() == [3, 0, 0, 2, 1]
    assert np.array_equal(found.attributes, answers(len(LISTED)))
    assert found.train.tolist() == [0, 3] and found.test.tolist() == [1, 4]
    for image, name in zip(found.images, LISTED, strict=True):
        assert np.array_equal(image.permute(1, 2, 0), pixels(name)[:, :10])
    other = load_faces(tmp_path, size=10, split_seed=1, train_fraction=0.9)
    assert torch.equal(other.train, found.train) and torch.equal(other.test, found.test)


@pytest.mark.parametrize("write_mat", [write_v5, write_v73])
def test_lfwa_s_names_may_be_a_row_and_have_accents(write_mat, tmp_path):
    names = [f"{TOGETHER}\\1.png", "Ann\\Ann_0001.png"]
    lfwa(tmp_path, write_mat, name=names, label=np.ones((2, 40)), indices_img_train=[[1.0, 2.0]], indices_img_test=[[]])
    write(tmp_path / "lfw", [f"{APART}/1.png"])
    if write_mat is write_v5:
        labels = scipy.io.loadmat(tmp_path / "lfw_att_40.mat")
        rows = {"name": labels["name"].T, "AttrName": labels["AttrName"].T, "label": labels["label"]}
        scipy.io.savemat(tmp_path / "lfw_att_40.mat", rows)
    else:
        with pytest.importorskip("h5py").File(tmp_path / "lfw_att_40.mat", "r+") as file:
            for key in ("name", "AttrName"):
                column = file[key][()].T
                del file[key]
                file.create_dataset(key, data=column, dtype=column.dtype)
    found = load_faces(tmp_path, size=6)
    assert found.names == (f"{TOGETHER}/1.png", "Ann/Ann_0001.png") and found.train.tolist() == [0, 1]
    assert (found.attributes == 1).all()


def test_lfwa_with_other_images_or_another_table(tmp_path):
    lfwa(tmp_path, folder="aligned/pictures")
    assert load_faces(tmp_path, folder="aligned/pictures", size=4).labels == "LFWA"
    table().to_csv(tmp_path / "a.csv", index=False)
    found = load_faces(tmp_path, folder="aligned/pictures", attributes="a.csv", size=4)
    assert found.labels == "proxy labels" and len(found.images) == len(NAMES)


@pytest.mark.parametrize("write_mat", [write_v5, write_v73])
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"AttrName": None}, "lfw_att_40.mat: has no AttrName, only "),
        ({"AttrName": ["Male"] * 40}, "lfw_att_40.mat: AttrName and label: has no attribute 5_o_Clock_Shadow, "),
        ({"AttrName": np.ones((40, 1))}, "lfw_att_40.mat: AttrName holds "),
        (
            {"label": np.ones((4, 40))},
            "lfw_att_40.mat: label is [4, 40], expected [5, 40] as there are so many in name ",
        ),
        (
            {"label": np.full((5, 40), 3.0)},
            "lfw_att_40.mat: AttrName and label: attributes are numbers from 3.0 to 3.0, ",
        ),
        ({"name": np.ones((5, 1))}, f"lfw_att_40.mat: name holds {np.float64(1.0)!r}, expected a cell of strings"),
        ({"name": [*LISTED[:4], LISTED[0]]}, f"lfw_att_40.mat: name lists {LISTED[0]} twice, expected each image once"),
        ({"name": [*LISTED[:4], "Eve\\Eve_0001.png"]}, "lfw: has no Eve/Eve_0001.png; "),
        ({"indices_img_test": None}, "indices_train_test.mat: has no indices_img_test, only "),
        (
            {"indices_img_train": [[0.0]]},
            "indices_train_test.mat: indices_img_train holds 0.0, expected whole numbers ",
        ),
        (
            {"indices_img_test": [[6.0]]},
            "indices_train_test.mat: indices_img_test holds 6.0, expected whole numbers from",
        ),
        (
            {"indices_img_test": [[1.5]]},
            "indices_train_test.mat: indices_img_test holds 1.5, expected whole numbers from",
        ),
        ({"indices_img_train": [[1.0], [1.0]]}, "indices_train_test.mat: indices_img_train holds 1.0 twice, expect"),
        ({"indices_img_test": [[4.0], [1.0]]}, "indices_train_test.mat: 2 images are in both"),
    ],
)
def test_a_wrong_lfwa_is_named(write_mat, change, problem, tmp_path):
    lfwa(tmp_path, write_mat, **change)
    assert message(tmp_path).startswith(f"{tmp_path}{os.sep}{problem}")


@pytest.mark.parametrize("damage", [b"", b"<html>404</html>" * 99, b"\x89HDF\r\n\x1a\n" + bytes(99), None])
def test_a_damaged_mat_is_named(damage, tmp_path):
    if damage and damage.startswith(b"\x89HDF"):
        pytest.importorskip("h5py")
    lfwa(tmp_path)
    path = tmp_path / "indices_train_test.mat"
    path.unlink() if damage is None else path.write_bytes(damage)
    assert message(tmp_path).startswith(f"{path}: could not be read as a MATLAB file (")


def test_hdf5_without_h5py(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)  # importing it raises ImportError
    lfwa(tmp_path)
    (tmp_path / "lfw_att_40.mat").write_bytes(b"MATLAB 7.3 MAT-file".ljust(512) + b"\x89HDF\r\n\x1a\n")
    assert message(tmp_path).endswith("is of MATLAB 7.3 (HDF5), which needs h5py: pip install h5py")


# Images


def test_the_crop_comes_before_the_size(root):
    found = load_faces(root, box=(-3, -3, 5, 5), size=8).images
    for image, name in zip(found, NAMES, strict=True):
        assert np.array_equal(image.permute(1, 2, 0), pixels(name)[2:10, 3:11])  # the side stays
    whole = torch.from_numpy(pixels(NAMES[5])).permute(2, 0, 1)[None].double()
    for box, crop, size in ((None, whole, 5), ([-3, -3, 5, 5], whole[..., 2:10, 3:11], 20)):
        expected = torch.nn.functional.interpolate(crop, (size, size), mode="bilinear", antialias=True)
        assert (load_faces(root, box=box, size=size).images[5] - expected[0]).abs().max() < 1.01


def test_the_crop_is_the_same_of_an_image_and_of_its_middle(tmp_path):
    whole = np.random.RandomState(0).randint(0, 256, (25, 25, 3), dtype=np.uint8)
    for folder, image in (("large", whole), ("middle", whole[4:20, 4:20])):  # as 250x250 and 160x160, in tenths
        for person in ("Ann", "Bob"):
            (tmp_path / folder / "lfw" / person).mkdir(parents=True)
            Image.fromarray(image).save(tmp_path / folder / "lfw" / person / "1.png")
    large, middle = (load_faces(tmp_path / name, box=(-5, -4, 6, 7), size=11).images for name in ("large", "middle"))
    assert torch.equal(large, middle) and np.array_equal(large[0].permute(1, 2, 0), whole[8:19, 7:18])


def test_other_kinds_of_files(tmp_path):
    grey, alpha = Image.new("L", (9, 9), 40), Image.new("RGBA", (9, 9), (10, 20, 30, 255))
    for person in ("Ann", "Bob", ".hidden"):
        (tmp_path / "lfw" / person).mkdir(parents=True)
    grey.save(tmp_path / "lfw/Ann/1.JPG", quality=95)
    alpha.save(tmp_path / "lfw/Bob/1.png")
    for file in ("Ann/._1.jpg", "Ann/notes.txt", ".hidden/1.jpg", "pairs.txt"):
        (tmp_path / "lfw" / file).write_text("not an image")
    found = load_faces(tmp_path, size=2)
    assert found.names == ("Ann/1.JPG", "Bob/1.png")
    assert (found.images[0] == 40).all() and found.images[1, :, 0, 0].tolist() == [10, 20, 30]


def test_images_are_turned_as_their_exif_says_before_the_crop(tmp_path):
    stored = pixels("a face")
    turned = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.swapaxes(0, 1),
        6: np.rot90(stored, -1),  # clockwise, as of a camera on its side
        7: stored[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(stored),
        9: stored,  # there is no such orientation
    }
    for orientation in turned:
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f"faces/{'Ann' if orientation < 5 else 'Bob'}/{orientation}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(stored).save(path, exif=exif)
    for image, upright in zip(load_faces(tmp_path, box=(-4, -5, 3, 2), size=7).images, turned.values(), strict=True):
        down, across = upright.shape[0] // 2, upright.shape[1] // 2
        assert np.array_equal(image.permute(1, 2, 0), upright[down - 5 : down + 2, across - 4 : across + 3])


def png16(path, colour, values):
    """A PNG of 16 bits, which Pillow writes of grey alone; values: [H, W, channels]."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in np.array(values))
    header = struct.pack(">2I5B", len(values[0]), len(values), 16, colour, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    sealed = (struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(sealed))


def palette(path, **options):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 0])
    image.putdata([1, 0])
    image.save(path, **options)


def from_pixels(mode, *values):
    image = Image.new(mode, (len(values), 1))
    image.putdata(values)
    return image.save


KINDS = {  # how two pixels are written, and what they are: grey, or red, green and blue
    "grey16.png": (lambda path: png16(path, 0, [[[32768], [65535]]]), [128, 255]),
    "dark16.png": (lambda path: png16(path, 0, [[[128], [1000]]]), [0, 4]),
    "colour16.png": (lambda path: png16(path, 2, [[[257 * 9, 0, 65535], [257 * 77] * 3]]), [[9, 0, 255], 77]),
    "greyalpha16.png": (lambda path: png16(path, 4, [[[257 * 50, 65535], [257 * 50, 0]]]), [50, 255]),
    "colouralpha16.png": (lambda path: png16(path, 6, [[[257, 514, 771, 65535], [0] * 4]]), [[1, 2, 3], 255]),
    "grey.png": (from_pixels("L", 0, 201), [0, 201]),
    "exif.png": (lambda path: from_pixels("L", 3, 4)(path, exif=b"Exif\0\0damaged"), [3, 4]),
    "bit.png": (from_pixels("1", 0, 1), [0, 255]),
    "alpha.png": (from_pixels("RGBA", (10, 20, 30, 255), (0, 0, 0, 0)), [[10, 20, 30], 255]),
    "half.png": (from_pixels("RGBA", (0, 0, 0, 51), (100, 200, 50, 204)), [204, [131, 211, 91]]),
    "greyalpha.png": (from_pixels("LA", (7, 255), (7, 0)), [7, 255]),
    "palette.png": (palette, [[200, 100, 0], [10, 20, 30]]),
    "transparent.png": (lambda path: palette(path, transparency=1), [255, [10, 20, 30]]),
    "colourkey.png": (lambda path: from_pixels("L", 9, 8)(path, transparency=9), [255, 8]),
    "cmyk.jpg": (lambda path: Image.new("CMYK", (2, 1), (0, 255, 255, 0)).save(path, quality=95), [[255, 0, 0]] * 2),
    "ycbcr.JPEG": (lambda path: Image.new("YCbCr", (2, 1), (90, 128, 128)).save(path), [90, 90]),
}


def test_the_pixels_of_all_kinds_of_files(tmp_path):
    for person in ("Ann", "Bob"):
        (tmp_path / "faces" / person).mkdir(parents=True)
        for name, (write_to, _) in KINDS.items():
            write_to(tmp_path / "faces" / person / name)
    found = load_faces(tmp_path, size=2)
    assert len(found.names) == 2 * len(KINDS)
    for name, image in zip(found.names, found.images, strict=True):  # of 2x1 pixels, enlarged to 2x2
        expected = [torch.tensor(pixel).expand(3) for pixel in KINDS[name.split("/")[1]][1]]
        far = 2 if name.endswith((".jpg", ".JPEG")) else 1 if "half" in name else 0
        for row in image.unbind(1):
            assert (row.T.int() - torch.stack(expected)).abs().max() <= far, name


def test_pixels_of_an_unknown_range_are_refused(root):
    path = root / "faces" / NAMES[4]
    Image.new("F", (9, 9), 0.5).save(path, format="TIFF")
    assert message(root).startswith(
        f"{path}: expected an image, found a damaged or other file (its pixels are of Pillow's"
    )


def test_an_image_of_too_many_pixels_and_one_that_is_gone_are_named(root, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
        assert message(root).startswith(f"{root / 'faces'}") and "exceeds limit of 20 pixels" in message(root)
    path = root / "faces" / NAMES[4]
    path.unlink()
    path.symlink_to(root / "gone.png")
    assert message(root).startswith("expected an image, found a file that cannot be read (") and str(path) in message(
        root
    )


@pytest.mark.parametrize("raw", [b"", b"<html>404</html>", "truncated"])
def test_a_damaged_image_is_named_and_nothing_kept(raw, root):
    path = root / "faces" / NAMES[4]
    path.write_bytes(path.read_bytes()[:200] if raw == "truncated" else raw)
    assert message(root).startswith(f"{path}: expected an image, found a damaged or other file (")
    assert not (root / "cache").exists()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"box": (0, 0, 5)}, "box must be (left, top, right, bottom) in pixels from the image's centre, not (0, 0, 5)"),
        ({"box": (-1, -5, -1, 0)}, "box must be (left, top"),
        ({"box": (-6, -6, -1, 0)}, "box=(-6, -6, -1, 0) reaches beyond"),
        ({"box": (-6, -5, 6, 6)}, "box=(-6, -5, 6, 6) reaches beyond"),
        ({"size": 0}, "size must be a whole number of pixels from 1 on, not 0"),
        ({"size": 1.5}, "size must be"),
        ({"train_fraction": 1}, "train_fraction must be between 0 and 1, not 1"),
    ],
)
def test_impossible_arguments_are_refused(change, problem, root):
    assert message(root, ValueError, **change).startswith(problem)


# The cache


def test_images_are_decoded_once(root, decoded):
    first = load_faces(root, size=6, box=(-6, -5, 3, 4))
    assert sorted(decoded) == sorted(name.split("/")[1] for name in NAMES)
    second = load_faces(root, size=6, box=[-6, -5, 3, 4], attributes="a.csv", split_seed=1)
    assert len(decoded) == len(NAMES) and torch.equal(first.images, second.images)
    second.images.zero_()  # is the caller's own
    assert load_faces(root, size=6, box=(-6, -5, 3, 4)).sha256 == first.sha256
    assert [path.suffix for path in (root / "cache").iterdir()] == [".npy"]


def test_the_cache_follows_the_files_and_the_crop(root, decoded):
    def again(**kwargs):
        decoded.clear()
        images = load_faces(root, **({"size": 6} | kwargs)).images
        return images, len(decoded)

    before, _ = again()
    assert again(size=7)[1] == again(box=(-6, -5, 3, 4))[1] == 8
    assert again()[1] == 0
    path = root / "faces" / NAMES[4]
    Image.fromarray(255 - pixels(NAMES[4])).save(path)
    os.utime(path, ns=(0, 0))  # whatever the clock's resolution
    after, count = again()
    assert count == 8 and (after != before).flatten(1).any(1).nonzero().tolist() == [[4]]
    (root / "faces" / NAMES[0]).unlink()
    after, count = again()
    assert count == 7 and torch.equal(after[:3], before[1:4])


def test_what_was_decoded_in_another_way_is_not_taken(root, decoded, monkeypatch):
    load_faces(root, size=6)
    monkeypatch.setattr(faces, "DECODED", faces.DECODED - 1)
    load_faces(root, size=6)
    assert len(decoded) == 16


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY", "truncated", "a bit"])
def test_a_damaged_cache_is_replaced(damage, root, decoded):
    first = load_faces(root, size=6)
    (path,) = (root / "cache").iterdir()
    whole = path.read_bytes()
    del first  # it maps the file
    path.unlink()
    flipped = whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:]
    path.write_bytes({"truncated": whole[:-9], "a bit": flipped}.get(damage, damage))
    load_faces(root, size=6)
    assert len(decoded) == 16 and path.read_bytes() == whole


@pytest.mark.parametrize("broken", ["save", "replace", "mkdir"])
def test_a_cache_that_cannot_be_written_is_skipped(broken, root, decoded, monkeypatch):
    def full(path, *_, **__):
        path.write(b"half") if broken == "save" else None
        raise OSError(errno.ENOSPC, "No space left on device")

    if broken == "mkdir":
        (root / "cache").write_text("in the way")  # as on a read-only disk, which root may write to
    else:
        monkeypatch.setattr(*{"save": (np, "save"), "replace": (os, "replace")}[broken], full)
    assert torch.equal(load_faces(root, size=6).images, load_faces(root, size=6).images)
    assert len(decoded) == 16
    assert broken == "mkdir" or list((root / "cache").iterdir()) == []


def test_an_interrupted_write_leaves_nothing(root, decoded, monkeypatch):
    def interrupted(file, _):
        file.write(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load_faces(root, size=6)
    assert list((root / "cache").iterdir()) == []
    assert len(load_faces(root, size=6).images) == 8 and len(decoded) == 16


# Where faces are found


@pytest.fixture
def network(monkeypatch):
    """Replaces scikit-learn's download by an error, or by one that brings our images."""
    datasets = pytest.importorskip("sklearn.datasets")

    def install(error=None):
        def fetch(data_home, funneled, **_):
            assert funneled
            write(Path(data_home, "lfw_home", "lfw_funneled"), NAMES if error is None else NAMES[:2])
            Path(data_home, "lfw_home", "lfw_funneled", "pairs_01.txt").write_text("not a person")
            if error is not None:
                raise error

        monkeypatch.setattr(datasets, "fetch_lfw_people", fetch)

    return install


def test_faces_come_before_lfw_and_no_network(network, root):
    network(OSError("asked"))
    write(root / "lfw", NAMES[:4])
    assert len(load_faces(root, size=4).images) == 8
    assert len(load_faces(root, folder="lfw", size=4).images) == 4


def test_lfw_is_downloaded_once(network, tmp_path):
    network()
    root = tmp_path / "new" / "folder"
    first = load_faces(root, size=4)
    assert first.names == tuple(NAMES) and first.labels == "none"
    assert sorted(path.name for path in root.iterdir()) == ["cache", "lfw_funneled"]
    table().to_csv(root / "a.csv", index=False)
    network(OSError("asked again"))
    assert np.array_equal(load_faces(root, attributes="a.csv", size=4).attributes, answers())


@pytest.mark.parametrize("error", [OSError("<urlopen error\nName or service not known>"), KeyboardInterrupt()])
def test_a_broken_download_leaves_nothing(error, network, tmp_path):
    network(error)
    with pytest.raises((DatasetError, KeyboardInterrupt)) as caught:
        load_faces(tmp_path)
    assert list(tmp_path.iterdir()) == []
    if isinstance(error, OSError):
        text = str(caught.value)
        for folder in ("faces", "lfw", "lfw-deepfunneled", "lfw_funneled"):
            assert f"{tmp_path / folder}" in text.split("\n")[0]
        assert "fetch_lfw_people failed: OSError: <urlopen error Name or service not known>" in text
        assert "1. put images as" in text and "2. ask the authors of LFWA" in text and "3. load with" in text


def test_no_permission_to_use_the_network(network, tmp_path):
    network()
    assert "nothing is downloaded" in message(tmp_path, download=False)
    assert f"looked for {tmp_path / 'mine'};" in message(tmp_path, folder="mine", download=True)
    (tmp_path / "faces").mkdir()
    assert "has no images, expected <person>/<image>.jpg" in message(tmp_path, download=True)


# Pairs for verification


@given(st.lists(st.integers(0, 6), min_size=4, max_size=40), st.data())
def test_pairs_are_balanced_distinct_and_as_said(who, draw):
    people = torch.tensor(who)
    images = torch.tensor(draw.draw(st.lists(st.integers(0, len(who) - 1), min_size=2)))
    seed = draw.draw(st.integers(0, 2**32 - 1))
    possible = [who[i] == who[j] for i, j in combinations(set(images.tolist()), 2)]
    half = min(sum(possible), len(possible) - sum(possible))
    if half:
        number = 2 * draw.draw(st.integers(1, half))
        drawn, same = pairs(people, images, number, seed)
        assert drawn.shape == (number, 2) and same.tolist() == [True] * (number // 2) + [False] * (number // 2)
        assert torch.equal(people[drawn[:, 0]] == people[drawn[:, 1]], same)
        assert len({frozenset(pair) for pair in drawn.tolist()}) == number
        assert all(i != j for i, j in drawn.tolist()) and set(drawn.flatten().tolist()) <= set(images.tolist())
        again, _ = pairs(people, images.flip(0), number, seed)
        assert torch.equal(drawn, again)
    with pytest.raises(ValueError, match=rf"number=.* needs {half + 1} (same|two)-person pairs, the images have only"):
        pairs(people, images, 2 * half + 2, seed)


@pytest.mark.parametrize("number", [0, -2, 3])
def test_an_odd_number_of_pairs_is_refused(number):
    with pytest.raises(ValueError, match=f"number must be an even number of pairs from 2 on, not {number}"):
        pairs(torch.tensor([0, 0, 1]), torch.arange(3), number, 0)


def test_too_few_pairs_are_counted():
    people = torch.tensor([0, 0, 0, 1, 2, 2])
    with pytest.raises(ValueError, match="number=10 needs 5 same-person pairs, the images have only 4"):
        pairs(people, torch.arange(6), 10, 0)
    with pytest.raises(ValueError, match="number=4 needs 2 two-person pairs, the images have only 0"):
        pairs(people, torch.arange(3), 4, 0)


def test_people_with_many_images_are_not_favoured():
    people = torch.cat([torch.zeros(100, dtype=torch.int64), torch.arange(1, 50).repeat(10)])
    drawn, same = pairs(people, torch.arange(len(people)), 400, 0)
    assert not torch.equal(drawn, pairs(people, torch.arange(len(people)), 400, 1)[0])
    shown = people[drawn]
    assert (shown[same] == 0).float().mean() < 0.05  # 69 % of all same-person pairs are of number 0
    assert (shown[~same] == 0).float().mean() < 0.05  # and 17 % of all images


# The real faces


def test_lfw_itself():
    root = Path(os.environ.get("ADMM_DATA", "data"), "lfwa")
    if not (root / "faces").is_dir():
        pytest.skip(f"no faces in {root}; ADMM_DATA says where the data are")
    found = load_faces(root, size=8, download=False)
    assert len(found.images) == 13233 and len(found.persons) == 5749
    assert found.people.bincount().max() == 530 and found.persons[found.people.bincount().argmax()] == "George_W_Bush"
    assert abs(len(found.train) / 13233 - 6263 / 13143) < 0.02
    assert not set(found.people[found.train].tolist()) & set(found.people[found.test].tolist())
    drawn, same = pairs(found.people, found.test, 6000, 0)
    assert torch.equal(found.people[drawn[:, 0]] == found.people[drawn[:, 1]], same)
    for file in root.glob("*.csv.gz"):
        found = load_faces(root, attributes=file.name, size=8, download=False)
        labelled = (found.attributes >= 0).any(1)
        male = found.attributes[labelled, ATTRIBUTES.index("Male")].float().mean()
        assert labelled.sum() > 12000 and 0.7 < male < 0.85
