"""captions.json, splits and the tokenizer: what users write is read rightly or refused by name."""

from __future__ import annotations

import gc
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataset import find_images, load_captions, split_by_karpathy, split_by_own, split_by_ratio
from tokenizer import (
    END_ID,
    PAD_ID,
    SPECIAL_TOKENS,
    START_ID,
    CaptionTokenizer,
    normalize,
)
from utils import UserError, uncollected

WRONG = {
    "[]": "not an object",
    '"text"': "not an object",
    "null": "not an object",
    "7": "not an object",
    "{}": "is empty",
    "": "not valid JSON",
    '{"a.jpg": ["x"]': "not valid JSON",
    '{"a.jpg": ["x"], "a.jpg": ["y"]}': "'a.jpg' stands twice",
    '{"a.jpg": "x"}': "'a.jpg' needs a list",
    '{"a.jpg": []}': "'a.jpg' needs a list",
    '{"a.jpg": ["x", 5]}': "'a.jpg' has a caption that is no text: 5",
    '{"a.jpg": ["  "]}': "'a.jpg' has a caption that is no text",
    '{"../a.jpg": ["x"]}': "not a name within",
    '{"/etc/a.jpg": ["x"]}': "not a name within",
    '{"b/../../a.jpg": ["x"]}': "not a name within",
    '{"C:/a.jpg": ["x"]}': "not a name within",
    '{"": ["x"]}': "not a name within",
}


@pytest.mark.fault
@pytest.mark.parametrize("text", WRONG)
def test_wrong_captions_are_refused_by_name(tmp_path, text):
    path = tmp_path / "captions.json"
    path.write_text(text)
    with pytest.raises(UserError, match=WRONG[text]) as caught:
        load_captions(path)
    assert str(path) in str(caught.value)


@pytest.mark.fault(count=2)
def test_files_that_cannot_be_read_are_refused(tmp_path):
    flags = "prepare_dataset.py with the flags of before"  # alone it is about another data set
    with pytest.raises(UserError, match=flags):
        load_captions(tmp_path / "absent.json")
    path = tmp_path / "captions.json"
    path.write_text('[{"image": "a.jpg", "caption": "a dog"}]')
    with pytest.raises(UserError, match=flags):
        load_captions(path)
    path.write_bytes('{"a.jpg": ["café"]}'.encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        load_captions(path)
    path.write_bytes(b"\xef\xbb\xbf" + '{"a.jpg": ["café"]}'.encode())
    assert load_captions(path) == {"a.jpg": ["café"]}


@pytest.mark.fault(count=2)
def test_photos_must_be_there_and_within_the_folder(tmp_path):
    images = tmp_path / "images"
    (images / "sub").mkdir(parents=True)
    (images / "a.jpg").touch()
    (images / "sub" / "b.jpg").touch()
    (tmp_path / "images2").mkdir()  # whose name begins as the photo folder's
    (tmp_path / "images2" / "secret.jpg").touch()
    (images / "inside.jpg").symlink_to("a.jpg")
    assert find_images(["a.jpg", "sub/b.jpg", "inside.jpg"], images, 0) == [
        "a.jpg",
        "sub/b.jpg",
        "inside.jpg",
    ]
    assert find_images(["a.jpg", "c.jpg"], images, 1) == ["a.jpg"]
    with pytest.raises(UserError, match=r"c\.jpg.*MAX_BAD_IMAGES"):
        find_images(["a.jpg", "c.jpg"], images, 0)
    (images / "out.jpg").symlink_to("../images2/secret.jpg")
    with pytest.raises(UserError, match="leads out"):
        find_images(["out.jpg"], images, 0)


def test_ratio_split_is_stable_and_disjoint(capsys):
    names = [f"{i}.jpg" for i in range(2000)]
    before = split_by_ratio(names, 0.8)
    after = split_by_ratio([*names, *(f"new{i}.jpg" for i in range(500))], 0.8)
    assert sorted(sum(before.values(), [])) == sorted(names)
    assert abs(len(before["train"]) - 1600) < 80
    assert abs(len(before["val"]) - len(before["test"])) < 60
    for split, members in before.items():
        assert set(members) <= set(after[split])
    with pytest.raises(UserError, match="TRAIN_SPLIT_RATIO"):
        split_by_ratio(names, 1.0)
    capsys.readouterr()
    with pytest.raises(UserError, match="--train_split_ratio 0.999 leaves no photo for val"):
        split_by_ratio(names[:1], 0.999)
    assert not capsys.readouterr().out  # that one is taken


@pytest.mark.parametrize("ratio", [0.001, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("count", [2, 3, 10, 40])
def test_few_photos_leave_some_to_train_and_to_validate_on(count, ratio, capsys):
    names = [f"{i}.jpg" for i in range(count)]
    splits = split_by_ratio(names, ratio)
    assert splits["train"] and splits["val"]
    assert sorted(sum(splits.values(), [])) == sorted(names)
    if ratio == 0.999:
        assert "--train_split_ratio changes" in capsys.readouterr().out


def test_links_out_are_followed_where_asked(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "far.jpg").touch()
    (tmp_path / "images" / "a.jpg").symlink_to(tmp_path / "far.jpg")
    with pytest.raises(UserError, match="--follow_links"):
        find_images(["a.jpg"], tmp_path / "images", 0)
    assert find_images(["a.jpg"], tmp_path / "images", 0, follow_links=True) == ["a.jpg"]


def test_karpathy_split(tmp_path):
    path = tmp_path / "dataset.json"
    splits = ["train", "restval", "val", "test", "train"]
    images = [{"filename": f"{i}.jpg", "split": split} for i, split in enumerate(splits)]
    path.write_text(json.dumps({"images": images}))
    found = split_by_karpathy(["0.jpg", "1.jpg", "2.jpg", "3.jpg", "unknown.jpg"], path)
    assert found == {"train": ["0.jpg", "1.jpg"], "val": ["2.jpg"], "test": ["3.jpg"]}
    there = ["0.JPG", "1.png", "x/2.jpg", "y/2.jpg", "x/3.jpg"]  # and of which 2.jpg it speaks?
    with pytest.raises(UserError, match="leaves no photo for val"):
        split_by_karpathy(there, path)
    del there[3]
    found = split_by_karpathy(there, path)
    assert found == {"train": ["0.JPG", "1.png"], "val": ["x/2.jpg"], "test": ["x/3.jpg"]}
    path.write_text(json.dumps({"train": ["a/0.jpg", "a/1"], "val": ["b/0.jpg", "b/1"]}))
    for there in (["a/0.jpg", "a/1.jpg"], ["0.jpg", "1.jpg"]):  # a photo is of one split
        with pytest.raises(UserError, match="leaves no photo"):
            split_by_karpathy(there, path)
    path.write_text(json.dumps({"images": [images[0] | {"split": "val"}, images[0]]}))
    with pytest.raises(UserError, match="twice"):
        split_by_karpathy(["0.jpg"], path)
    path.write_text('{"pictures": []}')
    with pytest.raises(UserError, match="Karpathy"):
        split_by_karpathy(["0.jpg"], path)


def test_the_first_photos_of_a_split_are_of_all_folders():
    names = [f"{kind}/{i}.jpg" for kind in "abcd" for i in range(100)]
    own = split_by_own([f"{s}/{name}" for s in ("train", "val") for name in names], {}, 0.5)
    for splits in (split_by_ratio(names, 0.5), own):
        for split in ("train", "val"):
            assert {name.split("/")[-2] for name in splits[split][:20]} == {*"abcd"}


def test_of_several_words_for_splits_in_a_folder_s_name_the_last_counts():
    found = split_by_own(["train/0.jpg", "train/val/1.jpg", "dev/test/2.jpg"], {}, 0.5)
    assert found == {
        "train": ["train/0.jpg"],
        "val": ["train/val/1.jpg"],
        "test": ["dev/test/2.jpg"],
    }


def test_a_folder_may_hold_a_list_of_names_for_each_split(tmp_path):
    for split, names in {"train": "0.jpg\n1\n", "dev": "2.jpg", "test": "3.jpg\n"}.items():
        (tmp_path / f"Flickr_8k.{split}Images.txt").write_text(names)
        (tmp_path / f"._Flickr_8k.{split}Images.txt").write_text("of_a_Mac.jpg\n")
    (tmp_path / "Flickr8k.token.txt").write_text("0.jpg#0\tA dog\n")
    (tmp_path / "train_captions.txt").write_text("2.jpg,A dog\n")
    found = split_by_karpathy(["0.jpg", "1.jpg", "2.jpg", "3.jpg", "4.jpg"], tmp_path)
    assert found == {"train": ["0.jpg", "1.jpg"], "val": ["2.jpg"], "test": ["3.jpg"]}
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="no texts called after splits"):
        split_by_karpathy(["0.jpg"], tmp_path / "none")


@pytest.fixture(scope="module")
def tokenizer() -> CaptionTokenizer:
    texts = ["A brown dog runs through the grass .", "Two children play in the snow ."] * 4
    return CaptionTokenizer.train(texts, 400)


def test_special_tokens_stand_first_and_are_never_written_by_text(tokenizer):
    assert [tokenizer.vocab[token] for token in SPECIAL_TOKENS] == [0, 1, 2, 3]
    for token in SPECIAL_TOKENS:
        [ids] = tokenizer.encode([f"a dog {token} runs"])
        assert not set(ids) & {0, 1, 2, 3}
        assert tokenizer.decode(ids) == f"a dog {token} runs"


@given(st.text(max_size=40))
def test_any_text_comes_back_normalised(text):
    tokenizer = CaptionTokenizer.train(["a dog runs"] * 3, 300)
    assert tokenizer.decode(*tokenizer.encode([text])) == normalize(text).strip()


@pytest.mark.parametrize("text", ["एक आदमी सड़क पर साइकिल चला रहा है", "สุนัขสองตัว วิ่งเล่น", "می‌دود"])
def test_a_word_is_one_piece_whatever_marks_its_letters_have(text):
    tokenizer = CaptionTokenizer.train([text] * 3, 1000)
    assert len(*tokenizer.encode([text])) == len(text.split())


def test_without_spaces_pieces_are_signs_and_with_them_words():
    for text, pieces in (
        ("一个穿着T恤的妈妈在慢慢跑", [*"一个穿着t恤的", "妈妈", "在", "慢慢", "跑"]),
        ("一只 棕色 的 狗", ["一只", "棕色", "的", "狗"]),
        ("男の子がスケートボードに乗る", [*"男の子が", "スケートボード", *"に乗る"]),
        ("สุนัขสองตัววิ่งเล่นบนหญ้า", "สุ นั ข ส อ ง ตั ว วิ่ ง เ ล่ น บ น ห ญ้ า".split()),
    ):
        tokenizer = CaptionTokenizer.train([text] * 3, 1000)
        assert [tokenizer.decode([i]) for i in tokenizer.encode([text])[0]] == pieces


def test_a_line_end_that_is_written_is_a_space(tokenizer):
    ids = [tokenizer.vocab[letter] for letter in "\u010aa\u010d\u0120b\u010a"]  # bytes 10, 13, 32
    assert tokenizer.decode(ids) == "a b"


def test_captions_are_framed_and_cut_without_an_end(tokenizer):
    short, cut = tokenizer.encode_texts([("", "A brown dog ."), ("", "two children " * 20)], 8)
    assert short[0] == START_ID and short[-1] == END_ID and len(short) < 8
    assert cut[0] == START_ID and END_ID not in cut and len(cut) == 8
    assert tokenizer.decode([*short, 77, PAD_ID]) == "a brown dog"


@pytest.mark.parametrize("allowed", [True, False])
def test_a_tokenizer_is_kept_beside_the_data_where_that_is_allowed(tmp_path, monkeypatch, allowed):
    monkeypatch.setattr("os.access", lambda path, mode: allowed)
    vocab, merges = files = tmp_path / "vocab.json", tmp_path / "merges.txt"
    made = CaptionTokenizer.learned(lambda: ["a dog", "a cat"] * 3, 300, *files)
    assert len(made) > 256 and vocab.exists() == merges.exists() == allowed


def test_a_tokenizer_is_learned_anew_when_captions_or_its_size_changed(tmp_path, monkeypatch):
    vocab, merges = files = tmp_path / "vocab.json", tmp_path / "merges.txt"
    sizes, captions = [], ["a dog", "a cat", "two dogs"] * 3
    train = CaptionTokenizer.train
    monkeypatch.setattr(
        CaptionTokenizer, "train", lambda texts, size: sizes.append(size) or train(texts, size)
    )

    def learn(captions: list[str], size: int = 300) -> dict[str, int]:
        return CaptionTokenizer.learned(lambda: captions, size, *files).vocab

    assert (
        learn(captions) == learn([f"{text} ." for text in captions]) == train(captions, 300).vocab
    )
    assert sizes == [300]
    assert learn(captions, 262) != learn(captions) != learn([*captions, "cats", "cats"])
    assert sizes == [300, 262, 300, 300]
    vocab.write_text("{}")  # by another program
    assert "Ġcats" in learn([*captions, "cats", "cats"]) and len(sizes) == 5
    assert CaptionTokenizer.load(*files).vocab == learn([*captions, "cats", "cats"])
    assert len(sizes) == 5
    learn(captions, 262)
    few = merges.read_text()
    learn(captions)
    merges.write_text(few)  # as where a run was killed between the two files
    assert len(learn(captions, 262)) == 262


def test_files_and_json_give_the_same_tokenizer(tokenizer, tmp_path):
    vocab, merges = tmp_path / "vocab.json", tmp_path / "merges.txt"
    tokenizer.save(vocab, merges)
    text = "the children's dogs, playing in 3 puddles"
    for other in (
        CaptionTokenizer.load(vocab, merges),
        CaptionTokenizer.from_json(tokenizer.to_json()),
    ):
        assert other.encode([text]) == tokenizer.encode([text])
    before = vocab.stat()
    tokenizer.save(vocab, merges)
    assert vocab.stat() == before  # not written again: perhaps nobody may
    merges.write_text("a b c d\n")
    with pytest.raises(UserError, match="no BPE files"):
        CaptionTokenizer.load(vocab, merges)
    vocab.write_text('{"a": 0}')
    merges.write_text("#version: 0.2\n")
    with pytest.raises(UserError, match="without them .* is learned .*doesn't begin with"):
        CaptionTokenizer.load(vocab, merges)


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_is_looked_for_as_before_once_texts_are_read(enabled):
    @uncollected()
    def read(text):
        assert not gc.isenabled()
        return json.loads(text)

    try:
        (gc.enable if enabled else gc.disable)()
        assert read("[1]") == read("[1]")
        with pytest.raises(ValueError):
            read("[1")
        assert gc.isenabled() is enabled
    finally:
        gc.enable()
