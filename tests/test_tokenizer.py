"""The tokenizer: the same ids as transformers, merges as the definition says, rows of 77, files that survive."""

import json
import random
import time
import unicodedata
from collections import Counter
from itertools import pairwise

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers

from sdlearn.tiny.scenes import random_scene
from sdlearn.tokenizer import BOS, EOS, Tokenizer, apply_merges, clean, join, learn_merges, spell, vocabulary, words

transformers.logging.set_verbosity_error()
FEW = settings(deadline=None, max_examples=60, derandomize=True)

SPICE_TEXT = """<|endoftext|> <|startoftext|> <|ENDOFTEXT|> <|StartOfText|> <| |> 's 'S 'll 'RE it's don’t ' '' '''
    İ ı ﬁ ﬀ ß ẞ ſ K Å Σ ς ΑΣ Ǆ ŉ ŒUVRE é e\u0301 o\u0323\u0307 \u0338 >\u0338 \u0345 \u200b \u200c \u200d \u2060 \ufeff
    \u00ad \u202e \ufe0f \U000e0001 👨‍👩‍👧 🏳️‍🌈 🇳🇱 👍🏽 🦋 ½ Ⅷ ² ٣ 四 2024 3.14 1,000 \x00 \x07 \x1b \x7f \ufffe \uffff
    \ue000 \ufffd \U0010ffff \ud7ff \U00010000 각 \u1100\u1161\u11a8 हिन्दी ไทย العربية עברית 日本語 Ġ âĢ ... !!! ?!
    </w> a</w> #tag @name a_b C++ http://x.org/?q=1 %20 $5 €5 \\n the Car STAR tigers"""
SPICE = SPICE_TEXT.split()
SPACES = [*" \t\n\x0b\x0c\x1c\x1f\x85\xa0\u1680\u180e\u2003\u2028\u3000", "  ", "\r\n"]


def unknown_to_the_reference(character: str) -> bool:
    """`tokenizers` normalises with the tables of Unicode 9 and does not know where younger marks are sorted to."""
    order = unicodedata.combining(character)
    if not order:
        return character in "\U00011930\U00011935"  # the one pair that became a character since
    text = f"\u0301{character}" if order < 230 else f"{character}\u0338" if order == 230 else f"{character}\u0301"
    return normalizers.NFC().normalize_str(text) != unicodedata.normalize("NFC", text)


def usable(character: str) -> bool:
    """Known to this Python's Unicode and to the reference's; of younger characters they may well disagree."""
    return unicodedata.category(character) not in ("Cs", "Cn") and not unknown_to_the_reference(character)


ASSIGNED = [chr(n) for n in range(0x110000) if usable(chr(n))]


def nasty_strings(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    kinds = (ASSIGNED, ASSIGNED[:0x250], ASSIGNED[:0x3000], SPICE, SPICE, SPACES)
    strings = ["", " ", *SPICE, *SPACES]
    strings += ["".join(rng.choices("abcdeé蝶🦋 ", k=rng.randint(200, 3000))) for _ in range(30)]
    while len(strings) < count:
        strings.append("".join(rng.choice(rng.choice(kinds)) for _ in range(rng.randint(1, 60))))
    return strings


any_text = st.text(st.characters(exclude_categories=("Cs", "Cn")))
usable_text = any_text.map(lambda text: "".join(filter(usable, text)))
nasty_text = st.lists(st.one_of(usable_text, st.sampled_from(SPICE + SPACES)), max_size=9).map("".join)


@pytest.fixture(scope="module")
def world() -> list[str]:
    rng = random.Random(0)
    return [random_scene(rng).caption(rng) for _ in range(5000)]


@pytest.fixture(scope="module")
def pairs(world, tmp_path_factory):
    """(ours, transformers' from our folder) for CLIP's vocabulary, a trained one, and SDXL's other padding."""
    made = {"clip": Tokenizer.clip(), "tiny": Tokenizer.train(world), "pad": Tokenizer.clip(pad="!")}
    folders = {name: tmp_path_factory.mktemp(name) for name in made}
    for name, tokenizer in made.items():
        tokenizer.save(folders[name])
    return {name: (made[name], transformers.CLIPTokenizer.from_pretrained(folders[name])) for name in made}


@pytest.fixture(scope="module")
def clip(pairs) -> Tokenizer:
    return pairs["clip"][0]


# -- the same as transformers ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip", "tiny", "pad"])
def test_ids_equal_transformers(pairs, name):
    ours, theirs = pairs[name]
    assert ours.vocab == theirs.get_vocab()
    strings = nasty_strings(2500 if name != "pad" else 500)
    reference = theirs(strings, add_special_tokens=False).input_ids
    different = [text for text, ids in zip(strings, reference, strict=True) if ours.encode(text) != ids]
    assert different == []
    rows = theirs(strings, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
    assert torch.equal(ours(strings), rows)
    decoded = theirs.batch_decode(reference, skip_special_tokens=True)
    assert [ours.decode(ids) for ids in reference] == decoded


def test_ids_equal_transformers_on_any_text(pairs):
    @FEW
    @given(nasty_text)
    def check(text):
        for ours, theirs in pairs.values():
            assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids

    check()


def test_every_29th_character_alone_and_inside_a_word(pairs):
    ours, theirs = pairs["clip"]
    strings = [f"a{character}b {character}" for character in ASSIGNED[::29]]
    reference = theirs(strings, add_special_tokens=False).input_ids
    assert [ours.encode(text) for text in strings] == reference


def test_marks_younger_than_the_reference_follow_unicode(pairs):
    """The known difference: two spellings that Unicode calls equal have equal ids here, and other ids there."""
    ours, theirs = pairs["clip"]
    text = "a\u05b4\u0c3c"  # the second mark is of Unicode 14 and is sorted to the front
    assert unknown_to_the_reference(text[2]) and ours.encode(text) == ours.encode(unicodedata.normalize("NFC", text))
    assert theirs(text, add_special_tokens=False).input_ids != ours.encode(text)


@FEW
@given(any_text)
def test_equal_spellings_have_equal_ids(text):
    assert words(unicodedata.normalize("NFD", text)) == words(unicodedata.normalize("NFC", text)) == words(text)


def test_clip_vocabulary(clip):
    assert (len(clip), len(clip.merges)) == (49_408, 48_894)
    assert (clip.bos, clip.eos, clip.pad, clip.positions) == (49_406, 49_407, 49_407, 77)
    assert clip.encode("a photo of a cat") == [320, 1125, 539, 320, 2368]
    assert clip.split("Photorealistic  Cat") == ["photo", "realistic</w>", "cat</w>"]


# -- learning merges ------------------------------------------------------------------------------------------------


def learn_by_recounting(counts: dict[str, int]) -> list[tuple[str, str]]:
    spelled, merges = {word: spell(word) for word in counts}, []
    while True:
        found = Counter()
        for word, symbols in spelled.items():
            for pair in pairwise(symbols):
                found[pair] += counts[word]
        if not found or max(found.values()) < 2:
            return merges
        merges.append(min(found, key=lambda pair: (-found[pair], pair)))
        spelled = {word: join(symbols, merges[-1]) for word, symbols in spelled.items()}


def apply_by_search(word: str, merges: list[tuple[str, str]]) -> list[str]:
    symbols = spell(word)
    while known := [pair for pair in pairwise(symbols) if pair in merges]:
        symbols = join(symbols, min(known, key=merges.index))
    return symbols


@FEW
@given(st.dictionaries(st.text("abcé", min_size=1, max_size=9), st.integers(1, 5), max_size=12))
def test_merges_equal_the_definition(counts):
    merges = learn_merges(counts)
    assert merges == learn_by_recounting(counts)
    assert learn_merges(dict(reversed(counts.items()))) == merges
    assert learn_merges(counts, limit=3) == merges[:3]


@FEW
@given(
    st.dictionaries(st.text("abcé", min_size=1, max_size=9), st.integers(1, 5), max_size=12),
    st.text("abcdé", min_size=1, max_size=30),
)
def test_the_heap_replays_merges_as_the_definition(counts, word):
    merges = learn_merges(counts)
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    for text in [word, *counts]:
        assert apply_merges(text, ranks) == apply_by_search(text, merges)


def test_a_merge_by_hand():
    # "a a" occurs twice in each "aaab", and is not the pair "a a</w>" of "aa".
    merges = learn_merges({"aaab": 3, "ab": 2, "aa": 2})
    assert merges == [("a", "a"), ("a", "b</w>"), ("aa", "ab</w>"), ("a", "a</w>")]
    assert join(["a", "a", "a", "b</w>"], ("a", "a")) == ["aa", "a", "b</w>"]
    assert join(["a"] * 5, ("a", "a")) == ["aa", "aa", "a"]


def test_training_stops_at_pairs_that_occur_once():
    assert learn_merges({"cat": 1}) == [] == learn_merges({}) == learn_merges({"cat": 5}, limit=0)
    assert Tokenizer.train(["a cat", "a cat"]).split("cat") == ["cat</w>"]


def test_every_word_of_the_world_is_one_token(world):
    tokenizer = Tokenizer.train(iter(world))
    assert all(len(tokenizer.encode(word)) == 1 for word in {word for text in world for word in words(text)})
    shuffled = random.Random(1).sample(world, len(world))
    assert Tokenizer.train(shuffled).merges == tokenizer.merges


def test_two_ways_to_one_token_share_an_id(tmp_path):
    merges = [("a", "b"), ("b", "c</w>"), ("a", "bc</w>"), ("ab", "c</w>")]
    ours = Tokenizer(merges)
    assert len(ours) == 512 + 3 + 2 and sorted(ours.vocab.values()) == list(range(len(ours)))
    ours.save(tmp_path)
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    for text in ("abc", "ab abc bc", "aabc", "cab"):
        assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids


# -- text in, text out ----------------------------------------------------------------------------------------------


def test_decode_gives_the_words_back(clip):
    @FEW
    @given(nasty_text.filter(lambda text: "<|" not in text))
    def check(text):
        assert clip.decode(clip.encode(text)) == " ".join(words(text)).strip()

    check()
    assert clip.decode(clip("A red  APPLE")[0]) == "a red apple"
    assert clip.decode([clip.bos, clip.vocab["cat</w>"], clip.eos], special=True) == "<|startoftext|>cat <|endoftext|>"


def test_clean_up():
    assert clean(" A\n\tB  ") == " a b "
    assert clean("e\u0301") == "é"
    assert clean("ΑΣ İ") == "ας i\u0307".replace("ς", "σ")
    assert words("it's 42!!") == ["it", "'s", "4", "2", "!!"]


def test_special_tokens_typed_in_a_text(clip):
    assert clip.split("a<|endoftext|>b") == ["a</w>", EOS, "b</w>"]
    assert EOS not in clip.split("<|ENDOFTEXT|>") and BOS not in clip.split("<| startoftext |>")


def test_rows(clip):
    rows = clip(["", "a cat", "very " * 75, "very " * 76 + "sad"])
    assert rows.shape == (4, 77) and rows.dtype == torch.int64
    assert rows[0].tolist() == [clip.bos] + [clip.eos] * 76
    assert rows[1].tolist() == [clip.bos, 320, 2368] + [clip.eos] * 74
    very = clip.vocab["very</w>"]
    assert rows[2].tolist() == rows[3].tolist() == [clip.bos] + [very] * 75 + [clip.eos]
    assert torch.equal(clip("a cat"), rows[1:2])
    assert clip([]).shape == (0, 77)


def test_dropped(clip):
    assert clip.dropped("very " * 75) == "" == clip.dropped("")
    assert clip.dropped("very " * 74 + "old Castle, far") == "castle , far"
    assert clip.dropped("very " * 74 + "photorealistic") == "realistic"
    assert clip.dropped("very " * 75 + EOS) == EOS
    assert Tokenizer.clip(positions=5).dropped("a red car on blue") == "on blue"


# -- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad", [EOS, "!"])
def test_save_and_load(world, tmp_path, pad):
    trained = Tokenizer(Tokenizer.train(world[:50]).merges, positions=32, pad=pad)
    trained.save(tmp_path / "new" / "folder")
    loaded = Tokenizer.load(tmp_path / "new" / "folder")
    assert loaded.merges == trained.merges and loaded.vocab == trained.vocab
    assert (loaded.positions, loaded.pad, loaded.eos) == (32, trained.pad, trained.eos)
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path / "new" / "folder")
    assert (theirs.model_max_length, theirs.pad_token_id) == (32, trained.pad)
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [
        "merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json",
    ]  # fmt: skip


def test_load_understands_the_files_of_others(tmp_path):
    Tokenizer([("a", "b")]).save(tmp_path)
    (tmp_path / "special_tokens_map.json").unlink()
    (tmp_path / "tokenizer_config.json").unlink()
    assert Tokenizer.load(tmp_path).positions == 77
    config = {"model_max_length": 10**30, "pad_token": {"content": "!", "lstrip": False}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = Tokenizer.load(str(tmp_path))
    assert (loaded.positions, loaded.pad) == (77, 0)


def test_interrupted_save_leaves_whole_files(tmp_path, monkeypatch):
    Tokenizer([("a", "b")]).save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(self, text, **options):
        with self.open("w", encoding="utf-8") as file:
            file.write(text[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(ValueError, match="cannot be written .No space left on device.: make room on the disk"):
        Tokenizer([("a", "b"), ("ab", "c")]).save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("vocab.json", None, "vocab.json is missing: copy the folder again"),
        ("merges.txt", None, "holds no tokenizer: tokenizer.json, or vocab.json and merges.txt, are wanted"),
        ("vocab.json", b'{"!": 0, ', "vocab.json cannot be read as JSON"),
        ("vocab.json", b"[1, 2]", "vocab.json holds a list, but a JSON object is wanted"),
        ("vocab.json", b"{}", "does not follow from its merges"),
        ("merges.txt", b"#version: 0.2\na b c\n", "merge 0 in .*merges.txt has 3 symbols"),
        ("merges.txt", b"a b\nabx c\n", "merge 1 joins 'abx' and 'c'"),
        ("merges.txt", b"\xff\xfe", "merges.txt cannot be read as text"),
        ("merges.txt", b"", "does not follow"),
        ("tokenizer_config.json", b"{", "tokenizer_config.json cannot be read as JSON"),
        ("tokenizer_config.json", b'{"pad_token": "<pad>"}', "'<pad>' is not in the vocabulary"),
        ("tokenizer_config.json", b'{"model_max_length": 1}', "positions is 1"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": 1}}', "adds tokens that do not follow"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": []}', None),
        ("added_tokens.json", b'{"<cat>": 7}', "adds tokens that do not follow on its vocabulary of 515"),
        ("added_tokens.json", b'{"<cat>": "515"}', "adds tokens that do not follow"),
        ("added_tokens.json", b'{"<cat>": 515, "<dog>": 517}', "adds tokens that do not follow"),
        ("added_tokens.json", b'{" ": 515}', "adds tokens that do not follow"),
    ],
)
def test_damaged_folders(tmp_path, name, content, sentence):
    Tokenizer([("a", "b")]).save(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    if sentence is None:
        assert Tokenizer.load(tmp_path)
        return
    with pytest.raises(ValueError, match=sentence) as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


MODERN = [  # a tokenizer.json -> what is said
    ("[]", "tokenizer.json holds a list, but a JSON object is wanted"),
    ("{}", "tokenizer.json has no list of merges"),
    ('{"model": 7}', "tokenizer.json has no list of merges"),
    ('{"model": {"vocab": {}, "merges": ["a b c"]}}', "merge 0 in .*tokenizer.json has 3 symbols"),
    ('{"model": {"vocab": {}, "merges": [["a", 1]]}}', "merge 0 in .*tokenizer.json has 2 symbols"),
    ('{"model": {"vocab": {}, "merges": [7]}}', "merge 0 in .*tokenizer.json has 0 symbols"),
    ('{"model": {"merges": []}}', "has no vocabulary"),
    ('{"model": {"vocab": {}, "merges": []}}', "does not follow from its merges"),
    ('{"model": {"vocab": {}, "merges": []}, "added_tokens": [1]}', "adds tokens that do not follow"),
]


@pytest.mark.parametrize(("content", "sentence"), MODERN)
def test_damaged_files_of_transformers_5(tmp_path, content, sentence):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=sentence) as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("old", [False, True], ids=["tokenizer.json alone", "also in merges.txt"])
def test_added_tokens_are_those_of_transformers(tmp_path, old):
    """Saved by the pinned library with two new words: one id each, wherever and however they are typed."""
    Tokenizer.train(["a red apple", "a red fox"] * 2).save(tmp_path / "ours")
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path / "ours")
    theirs.add_tokens(["<cat-toy>", "<Style>"])
    theirs.save_pretrained(tmp_path / "theirs")
    assert not (tmp_path / "theirs" / "merges.txt").exists()
    loaded = Tokenizer.load(tmp_path / "theirs")
    if old:
        loaded.save(tmp_path / "again")
        loaded = Tokenizer.load(tmp_path / "again")
        theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path / "again")
    assert len(loaded) == len(theirs) and list(loaded.added.values()) == ["<cat-toy>", "<Style>"]
    for text in ("a red <cat-toy>", "<CAT-TOY>, <style>s", "x<cat-toy>y", "<cat-toy", "<cat-toy><cat-toy> a apple"):
        assert loaded.encode(text) == theirs(text).input_ids[1:-1], text
    assert "<cat-toy>" in loaded.decode(loaded.encode("a <cat-toy>"))


def test_merges_may_be_pairs_or_words(tmp_path):
    ours = Tokenizer.train(["a red apple", "a red fox"] * 2)
    for merges in ([list(pair) for pair in ours.merges], [" ".join(pair) for pair in ours.merges]):
        content = {"model": {"vocab": ours.vocab, "merges": merges}}
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        loaded = Tokenizer.load(tmp_path)
        assert loaded.merges == ours.merges and loaded.vocab == ours.vocab and loaded.positions == 77


# -- wrong use, and speed -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (lambda clip: Tokenizer([("a", "b"), ("abc", "d")]), "merge 1 joins 'abc' and 'd'"),
        (lambda clip: Tokenizer([], positions=1), "positions is 1"),
        (lambda clip: Tokenizer([], pad="<pad>"), "'<pad>' is not in the vocabulary"),
        (lambda clip: Tokenizer.train("a cat"), r"write \[text\]"),
        (lambda clip: clip.encode(None), "given NoneType"),
        (lambda clip: clip(["a cat", 3]), "given int"),
        (lambda clip: clip("half \ud83e of a butterfly"), r"U\+D83E"),
        (lambda clip: clip.decode([49_408]), "id 49408 is not in the vocabulary"),
        (lambda clip: clip.decode([-1]), "id -1"),
    ],
)
def test_wrong_use_gets_a_sentence(clip, wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        wrong(clip)


def test_fast_enough(world, clip):
    fresh = Tokenizer(clip.merges)
    start = time.process_time()
    fresh(world[:1000])
    assert time.process_time() - start < 1.5  # in practice 0.03 s
    start = time.process_time()
    Tokenizer.train(world)
    assert time.process_time() - start < 5  # in practice 0.1 s
    start = time.process_time()
    assert fresh.decode(fresh.encode("abcdefghij" * 3000)) == "abcdefghij" * 3000
    assert time.process_time() - start < 5  # in practice 0.2 s


def test_vocabulary_order():
    assert list(vocabulary([("a", "b")]))[-3:] == ["ab", BOS, EOS]
    symbols = list(vocabulary([]))
    assert symbols[:2] == ["!", '"'] and symbols[256:258] == ["!</w>", '"</w>'] and len(symbols) == 514
