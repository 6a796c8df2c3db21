"""text -> tokens: byte-pair encoding, trained and applied as in CLIP. Chapter 01.
Exported from book/01_tokenizer.ipynb and book/15_lora.ipynb
by `make export`; edit it there.
"""

import gzip
import heapq
import json
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from functools import partial
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import regex
import torch
from torch import Tensor

from sdlearn.disk import read_json, read_text, write_files

BOS, EOS, END = "<|startoftext|>", "<|endoftext|>", "</w>"


def byte_symbols() -> dict[int, str]:
    """Byte -> one visible character, in the order of CLIP's vocabulary.

    As in GPT-2's encoder.py, bytes_to_unicode.
    """
    visible = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {
        byte: chr(256 + n) for n, byte in enumerate(hidden)
    }


SYMBOL_OF_BYTE = byte_symbols()
BYTE_OF_SYMBOL = {symbol: byte for byte, symbol in SYMBOL_OF_BYTE.items()}


def spell(word: str) -> list[str]:
    """A word as the symbols of its UTF-8 bytes; the last carries the mark `</w>`."""
    try:
        symbols = [SYMBOL_OF_BYTE[byte] for byte in word.encode()]
    except UnicodeEncodeError as error:
        half = f"U+{ord(word[error.start]):04X}"
        raise ValueError(
            f"the text holds {half}, half of a character, "
            "which UTF-8 cannot write: remove it"
        ) from None
    return [*symbols[:-1], symbols[-1] + END]


WORD = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|"
    r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
)


def clean(text: str) -> str:
    """NFC, one space for each run of white space, lower case.

    Each character is made small alone, so sigma has one small form.
    """
    text = regex.sub(r"\s+", " ", unicodedata.normalize("NFC", text))
    return text.lower() if text.isascii() else "".join(map(str.lower, text))


def words(text: str) -> list[str]:
    """The pieces of a text; byte-pair merges stay inside a piece."""
    pieces: list[str] = []
    for piece in WORD.findall(clean(text)):
        # A special token typed in capitals is ordinary text, of three pieces.
        pieces += (
            regex.findall(r"\p{L}+|\P{L}+", piece) if piece in (BOS, EOS) else [piece]
        )
    return pieces


def join(symbols: Sequence[str], pair: tuple[str, str]) -> list[str]:
    """Join every occurrence of the pair, from the left."""
    joined: list[str] = []
    for symbol in symbols:
        if joined and (joined[-1], symbol) == pair:
            joined[-1] += symbol
        else:
            joined.append(symbol)
    return joined


def learn_merges(
    counts: dict[str, int], limit: int | None = None
) -> list[tuple[str, str]]:
    """Byte-pair encoding: word -> count becomes a list of merges, best first.

    Sennrich et al. 2016, section 3.2.

    The most frequent pair of neighbours is merged again and again; of equally frequent
    pairs the alphabetically first. It ends after `limit` merges, or when no pair occurs
    twice.
    """
    spelled = {word: spell(word) for word in counts}
    pairs: Counter[tuple[str, str]] = Counter()
    # pair -> the words that (once) held it
    holders: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
    for word, symbols in spelled.items():
        for pair in pairwise(symbols):
            pairs[pair] += counts[word]
            holders[pair].add(word)
    merges: list[tuple[str, str]] = []
    while pairs and (limit is None or len(merges) < limit):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        if pairs[best] < 2:
            break
        merges.append(best)
        for word in holders.pop(best):  # only the words that change are counted again
            for pair in pairwise(spelled[word]):
                pairs[pair] -= counts[word]
            spelled[word] = join(spelled[word], best)
            for pair in pairwise(spelled[word]):
                pairs[pair] += counts[word]
                holders[pair].add(word)
        pairs = +pairs  # forget the pairs that are gone
    return merges


def apply_merges(word: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """The tokens of one word: the neighbours learned first are joined, until none is
    known.
    """
    symbols = spell(word)
    before, after = list(range(-1, len(symbols) - 1)), list(range(1, len(symbols) + 1))
    heap = [
        (ranks[pair], at) for at, pair in enumerate(pairwise(symbols)) if pair in ranks
    ]
    heapq.heapify(heap)
    while heap:
        rank, at = heapq.heappop(heap)
        right = after[at]
        if right == len(symbols) or ranks.get((symbols[at], symbols[right])) != rank:
            continue  # one of the two has been joined with its other neighbour
        symbols[at] += symbols[right]
        symbols[right] = ""
        after[at] = after[right]
        if after[at] < len(symbols):
            before[after[at]] = at
        for left in (before[at], at):
            if left >= 0 and after[left] < len(symbols):
                pair = symbols[left], symbols[after[left]]
                if pair in ranks:
                    heapq.heappush(heap, (ranks[pair], left))
    return [symbol for symbol in symbols if symbol]


def vocabulary(merges: Sequence[tuple[str, str]]) -> dict[str, int]:
    """Token -> id: 256 bytes, 256 that end a word, one for each merge, start, end."""
    symbols = [
        *SYMBOL_OF_BYTE.values(),
        *(symbol + END for symbol in SYMBOL_OF_BYTE.values()),
    ]
    known = set(symbols)
    for number, (left, right) in enumerate(merges):
        if not {left, right} <= known:
            raise ValueError(
                f"merge {number} joins {left!r} and {right!r}, "
                "but no merge before it makes both"
            )
        known.add(left + right)
        symbols.append(left + right)
    return {symbol: n for n, symbol in enumerate(dict.fromkeys([*symbols, BOS, EOS]))}


class BytePairs:
    """Text of any length <-> ids.

    The `special` tokens are recognised where they are typed, and never cut.
    """

    def __init__(
        self, merges: Iterable[tuple[str, str]], special: Iterable[str] = (BOS, EOS)
    ):
        self.merges = [(left, right) for left, right in merges]
        self.vocab = vocabulary(self.merges)
        self._special = dict.fromkeys(special)
        for token in self._special:
            if token not in self.vocab:
                raise ValueError(
                    f"the special token {token!r} is not in the vocabulary; "
                    f"CLIP has {BOS!r} and {EOS!r}"
                )
        self._tokens = list(self.vocab)
        self._ranks = {pair: rank for rank, pair in enumerate(self.merges)}
        self._typed = regex.compile(
            "(" + "|".join(map(regex.escape, self._special)) + ")"
        )
        self._cache: dict[str, list[str]] = {}

    def __len__(self) -> int:
        return len(self.vocab)

    def split(self, text: str) -> list[str]:
        """The tokens of a text, as strings."""
        if not isinstance(text, str):
            raise ValueError(
                f"the tokenizer was given {type(text).__name__}, "
                "but it reads text (str)"
            )
        tokens: list[str] = []
        for n, part in enumerate(self._typed.split(text)):
            if n % 2:  # every second part is a special token
                tokens.append(part)
                continue
            for word in words(part):
                if word not in self._cache:
                    if len(self._cache) >= 100_000:
                        self._cache.clear()
                    self._cache[word] = apply_merges(word, self._ranks)
                tokens += self._cache[word]
        return tokens

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without start and end."""
        return [self.vocab[token] for token in self.split(text)]

    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        """Ids -> text in lower case, a space after each word.

        Special tokens are left out unless asked for.
        """
        symbols = ""
        for n in map(int, ids):
            if not 0 <= n < len(self):
                raise ValueError(
                    f"id {n} is not in the vocabulary, "
                    f"which has the ids 0 to {len(self) - 1}"
                )
            if special or self._tokens[n] not in self._special:
                symbols += self._tokens[n]
        return (
            bytes(BYTE_OF_SYMBOL[symbol] for symbol in symbols)
            .decode(errors="replace")
            .replace(END, " ")
            .strip()
        )


class Tokenizer(BytePairs):
    """One text or several -> tokens (B, positions), as CLIP's text encoder wants them.

    `pad` fills short rows: <|endoftext|> in SD 1.5, "!" in the second encoder of SDXL.
    Like transformers we take a padding token that is typed inside a text for the
    special token, too. Ids of `bos`, `eos`, `pad` are attributes.
    added: words that a model learned later, one token each; they are found in any case.
    """

    def __init__(
        self,
        merges: Iterable[tuple[str, str]],
        positions: int = 77,
        pad: str = EOS,
        added: Iterable[str] = (),
    ):
        super().__init__(merges, (BOS, EOS, pad))
        self.added = {token.lower(): token for token in added}
        for token in self.added.values():
            self.vocab[token] = len(self.vocab)
            self._tokens.append(token)
        if self.added:
            longest = sorted(self.added, key=len, reverse=True)
            words = "|".join(map(regex.escape, longest))
            typed = self._typed.pattern[1:-1]
            self._typed = regex.compile(f"({typed}|(?i:{words}))")
        if positions < 2:
            raise ValueError(
                f"positions is {positions}, but start and end alone take 2; CLIP has 77"
            )
        self.positions = positions
        self.bos, self.eos, self.pad = (self.vocab[token] for token in (BOS, EOS, pad))

    @classmethod
    def clip(cls, positions: int = 77, pad: str = EOS) -> "Tokenizer":
        """OpenAI CLIP's vocabulary of 49,408 tokens, the one of SD 1.5."""
        packed = files("sdlearn").joinpath("data/clip_merges.txt.gz").read_bytes()
        return cls(parse_merges(gzip.decompress(packed).decode()), positions, pad)

    @classmethod
    def train(
        cls, captions: Iterable[str], merges: int | None = None, positions: int = 77
    ) -> "Tokenizer":
        """Learn a vocabulary.

        With `merges=None` until every word that occurs twice is one token.
        """
        if isinstance(captions, str):
            raise ValueError(
                "captions is one text, but a list of texts is wanted: write [text]"
            )
        counts = Counter(word for text in captions for word in words(text))
        return cls(learn_merges(counts, merges), positions)

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        """Texts -> tokens (B, positions): start, the ids that fit, end, padding."""
        rows = []
        for text in [texts] if isinstance(texts, str) else texts:
            row = [self.bos, *self.encode(text)[: self.positions - 2], self.eos]
            rows.append(row + [self.pad] * (self.positions - len(row)))
        return torch.tensor(rows, dtype=torch.long).reshape(len(rows), self.positions)

    def dropped(self, text: str) -> str:
        """The end of a text for which there is no position; "" when all of it fits."""
        return self.decode(self.encode(text)[self.positions - 2 :], special=True)

    def split(self, text: str) -> list[str]:
        """The tokens of a text, as strings."""
        return [self.added.get(token.lower(), token) for token in super().split(text)]

    def files(self) -> dict[str, str]:
        """Name -> text of the files that transformers' CLIPTokenizer reads."""
        pad, added = self._tokens[self.pad], list(self.added.values())
        return tokenizer_files(self.merges, self.vocab, added, self.positions, pad)

    def save(self, folder: str | Path) -> None:
        """Write these files into a folder: all of them, or none."""
        write_files(
            {
                Path(folder) / name: partial(write_text, text)
                for name, text in self.files().items()
            }
        )

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """A folder with `tokenizer.json`, or with `vocab.json` and `merges.txt`;
        positions and padding from the config files, if these are there."""
        merges, vocab, added, positions, pad = read_tokenizer(Path(folder))
        tokenizer = cls(merges, positions, pad, added)
        base = {token: n for token, n in tokenizer.vocab.items() if token not in added}
        if vocab != base:
            raise ValueError(
                f"the vocabulary in {folder} does not follow from its merges: "
                "take both from one tokenizer"
            )
        return tokenizer

    def parts(self, token: str) -> list[str]:
        """A word of several tokens: cat, cat_1, cat_2 ..., as far as they are there."""
        parts = [token]
        while (part := f"{token}_{len(parts)}") in self.vocab:
            parts.append(part)
        return parts

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without start and end; those of all parts of a word."""
        parts = [part for token in self.split(text) for part in self.parts(token)]
        return [self.vocab[part] for part in parts]

    def with_word(self, word: str, count: int = 1) -> "Tokenizer":
        """The same tokenizer with a new word, of `count` tokens behind the vocabulary.

        Typing the word means all its tokens, as in diffusers.
        """
        if not word.strip() or regex.search(r"\s", word):
            raise ValueError(
                f"the new word {word!r} is empty or has a space in it; call it "
                "<unicorn>, say"
            )
        if not 0 < count <= self.positions - 2:
            raise ValueError(
                f"the new word has {count} tokens; 1 to {self.positions - 2} fit into "
                "a prompt"
            )
        base, _, number = word.rpartition("_")
        part = number.isdigit() and base.lower() in self.added
        if part or len(self.split(word)) == 1 or f"{word}_1" in self.vocab:
            raise ValueError(
                f"the tokenizer knows {word!r} already, alone or as a part of a word; "
                "give the new word another name, such as <unicorn>"
            )
        added = [*self.added.values(), word, *(f"{word}_{n}" for n in range(1, count))]
        pad = self._tokens[self.pad]
        return Tokenizer(self.merges, self.positions, pad, added)


def tokenizer_files(
    merges: Sequence[tuple[str, str]],
    vocab: dict[str, int],
    added: Sequence[str],
    positions: int,
    pad: str,
) -> dict[str, str]:
    """Name -> text: a tokenizer folder as transformers and diffusers want it."""
    special = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": pad}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": positions}
    base = {token: n for token, n in vocab.items() if token not in added}
    texts = {
        "merges.txt": "\n".join(["#version: 0.2", *map(" ".join, merges), ""]),
        "vocab.json": json.dumps(base, ensure_ascii=False),
        "special_tokens_map.json": json.dumps(special, indent=2) + "\n",
    }
    settings = config | {"do_lower_case": True} | special
    texts["tokenizer_config.json"] = json.dumps(settings, indent=2) + "\n"
    if added:
        ids = {token: vocab[token] for token in added}
        texts["added_tokens.json"] = json.dumps(ids, indent=2) + "\n"
    return texts


def write_text(text: str, path: Path) -> None:
    """The same bytes on every system."""
    path.write_text(text, encoding="utf-8", newline="\n")


def parse_merges(found: object, path: str | Path = "merges.txt") -> list[tuple]:
    """The text of a merges.txt, or a list of "a b" or [a, b] -> pairs."""
    if isinstance(found, str):
        found = [x for x in found.split("\n") if x.strip() and x[:8] != "#version"]
    if not isinstance(found, list):
        raise ValueError(f"{path} has no list of merges: copy the folder again")
    split = [x.split() if isinstance(x, str) else x for x in found]
    pairs = [tuple(x) if isinstance(x, list) else () for x in split]
    for number, pair in enumerate(pairs):
        if list(map(type, pair)) != [str, str]:
            raise ValueError(
                f"merge {number} in {path} has {len(pair)} symbols, but 2 are wanted: "
                "copy it again"
            )
    return pairs


def read_tokenizer(
    folder: Path,
) -> tuple[list[tuple], dict[str, int], list[str], int, str]:
    """A tokenizer folder -> merges, vocabulary, added tokens, positions, padding."""
    whole, merges = folder / "tokenizer.json", folder / "merges.txt"
    if not whole.exists() and not merges.exists():
        raise ValueError(
            f"{folder} holds no tokenizer: tokenizer.json, or vocab.json and "
            "merges.txt, are wanted, so copy it again"
        )
    content = read_json(whole) if whole.exists() else {}
    if merges.exists():
        pairs = parse_merges(read_text(merges), merges)
        vocab: Any = read_json(folder / "vocab.json")
    else:
        found = content.get("model")
        model = found if isinstance(found, dict) else {}
        pairs, vocab = parse_merges(model.get("merges"), whole), model.get("vocab")
    config = {}
    for name in ("special_tokens_map", "tokenizer_config", "added_tokens"):
        name += ".json"
        there = (folder / name).exists()
        config[name] = read_json(folder / name) if there else {}
    added = find_added(folder, vocab, content, config)
    settings = config["special_tokens_map.json"] | config["tokenizer_config.json"]
    return pairs, vocab, added, *read_settings(settings)


def find_added(folder: Path, vocab: object, content: dict, config: dict) -> list[str]:
    """Tokens behind the vocabulary, in the order of their ids, wherever they stand."""
    if not isinstance(vocab, dict):
        raise ValueError(f"{folder} has no vocabulary: copy it again")
    decoder = config["tokenizer_config.json"].get("added_tokens_decoder") or {}
    listed = content.get("added_tokens") or []
    try:
        found = {entry["content"]: int(n) for n, entry in decoder.items()}
        found |= {entry["content"]: entry["id"] for entry in listed}
        found |= config["added_tokens.json"]
        found = {token: n for token, n in found.items() if vocab.get(token) != n}
        added = sorted(found, key=found.__getitem__)
        behind = list(range(len(vocab), len(vocab) + len(added)))
        ids = [found[token] for token in added]
        good = ids == behind and all(map(str.strip, added))
    except (AttributeError, KeyError, TypeError, ValueError):
        good = False
    if not good:
        raise ValueError(
            f"{folder} adds tokens that do not follow on its vocabulary of "
            f"{len(vocab)}: copy it again"
        )
    return added


def read_settings(settings: dict) -> tuple[int, str]:
    """Positions and padding token; some files say 10^30 and mean "unknown"."""
    positions, pad = settings.get("model_max_length"), settings.get("pad_token") or EOS
    if type(positions) is not int or positions > 100_000:
        positions = 77
    return positions, str(pad.get("content", EOS) if isinstance(pad, dict) else pad)
