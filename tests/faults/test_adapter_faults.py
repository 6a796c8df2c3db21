"""LoRAs, words and their training on the command line: one sentence, exit code 2, nothing lost."""

import pickle

import pytest
import torch
from lora_files import kohya, random_lora
from PIL import Image
from random_model import random_parts, random_vectors
from safetensors.torch import save_file
from test_bad_input import model, refused  # noqa: F401

from sdlearn.inversion import Embedding, write_embedding


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A LoRA, a word, pictures with captions."""
    folder = tmp_path_factory.mktemp("sound")
    networks = {name: x for name, x in random_parts()[0].networks.items() if name in ("unet", "text_encoder")}
    save_file(kohya(random_lora(networks)), folder / "lora.safetensors")
    write_embedding(folder / "word.safetensors", Embedding("<toy>", random_vectors(2)))
    write_embedding(folder / "wide.pt", Embedding("<toy>", random_vectors(2, 768)))
    write_embedding(folder / "long.pt", Embedding("<toy>", random_vectors(76)))
    write_embedding(folder / "nan.bin", Embedding("<toy>", random_vectors(2) * float("nan")))
    write_embedding(folder / "space.bin", Embedding("my toy", random_vectors(1)))
    save_file({"clip_l": torch.ones(1, 768), "clip_g": torch.ones(1, 1280)}, folder / "xl.safetensors")
    (folder / "evil.pt").write_bytes(pickle.dumps({"string_to_param": {"*": print}}))
    for name in ("lora", "word"):
        content = (folder / f"{name}.safetensors").read_bytes()
        (folder / f"half-{name}.safetensors").write_bytes(content[: len(content) // 2])
    for kind in ("toys", "untold", "broken", "strange"):
        (folder / kind).mkdir()
        for i in range(2):
            Image.new("RGB", (32, 32), (90 * i, 40, 80)).save(folder / kind / f"{i}.png")
            if kind != "untold":
                (folder / kind / f"{i}.txt").write_text("a <toy>")
    (folder / "broken" / "1.png").write_bytes(b"no picture")
    (folder / "strange" / "metadata.jsonl").write_text('{"file_name": 3}')
    (folder / "empty").mkdir()
    return folder


@pytest.fixture
def told(refused, sound, tmp_path, monkeypatch, model):  # noqa: F811
    """The sentence of a command, in which @ stands for the folder of good and bad files."""

    def run(*words):
        words = [str(word).replace("@", f"{sound}/") for word in words]
        return refused(*words, "--model", model)

    return run


DRAWING = {  # what is said with txt2img -> the sentence
    "no LoRA there": (["--lora", "@nowhere.safetensors"], "there is no LoRA"),
    "a LoRA's folder": (["--lora", "@toys"], "there is no LoRA"),
    "a LoRA's scale is NaN": (["--lora", "@lora.safetensors:nan"], "scale is nan; give a finite number"),
    "a LoRA's scale is infinite": (["--lora", "@lora.safetensors:inf"], "scale is inf; give a finite number"),
    "half a LoRA": (["--lora", "@half-lora.safetensors"], "half-lora.safetensors is damaged"),
    "a word as a LoRA": (["--lora", "@word.safetensors"], "(<toy> is no part of one), but a LoRA is wanted"),
    "a picture as a LoRA": (["--lora", "@toys/0.png"], "0.png"),
    "an open tag": (["a <lora:x", "-n", "1"], "tag that nobody can read: write <lora:NAME:0.8>"),
    "an empty tag": (["a <lora:>"], "tag that nobody can read"),
    "a tag of nothing": (["--lora", "nothing"], "there is no LoRA 'nothing'"),
    "a tag in the negative prompt": (["--negative-prompt", "<lora:x:1>"], "stands in the negative prompt"),
    "two prompts with two LoRAs": (["a <lora:x:1>"], "the prompts name different LoRAs"),
    "no word there": (["--embedding", "@nowhere.pt"], "nowhere.pt"),
    "half a word": (["--embedding", "@half-word.safetensors"], "half-word.safetensors is damaged"),
    "a LoRA as a word": (["--embedding", "@lora.safetensors"], "is a LoRA, but a textual inversion is wanted"),
    "a word for SDXL": (["--embedding", "@xl.safetensors"], "is a word for SDXL, but this model is SD 1 or SD 2"),
    "a word for SD 1": (["--embedding", "@wide.pt:<w>"], "have 768 numbers (SD 1), but this model's words have 32"),
    "a word too long": (["--embedding", "@long.pt"], "has 76 tokens; 1 to 75 fit"),
    "a word of NaNs": (["--embedding", "@nan.bin"], "holds NaN or infinite numbers"),
    "a word with a space": (["--embedding", "@space.bin"], "'my toy' is empty or has a space in it"),
    "a word that exists": (["--embedding", "@word.safetensors:cat"], "knows 'cat' already"),
    "a word twice": (["--embedding", "@word.safetensors", "--embedding", "@word.safetensors"], "knows '<toy>' already"),
    "a pickle with a program": (["--embedding", "@evil.pt"], "evil.pt is damaged, its pickle cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("fault", DRAWING)
def test_drawing(told, fault):
    words, sentence = DRAWING[fault]
    assert sentence in told("txt2img", "a cat", *words, "--steps", "1")


LORA = ["lora", "--pictures", "@toys", "--to", "x.safetensors"]
WORD = ["textual-inversion", "--pictures", "@toys", "--to", "x.pt", "--token", "<toy>", "--like", "cat"]
BOOTH = ["dreambooth", "--pictures", "@toys", "--to", "x"]
TRAINING = {  # what is said with train -> the sentence
    "rank 0": ([*LORA, "--rank", "0"], "rank is 0; give a whole number, 1 or more"),
    "rank -1": ([*LORA, "--rank", "-1"], "rank is -1; give a whole number, 1 or more"),
    "rank of a word": ([*LORA, "--rank", "x"], "--rank"),
    "alpha NaN": ([*LORA, "--alpha", "nan"], "alpha is nan; give a finite number above 0"),
    "alpha 0": ([*LORA, "--alpha", "0"], "alpha is 0.0; give a finite number above 0"),
    "no such layers": ([*LORA, "--targets", "attn9"], "no layer is called 'attn9'"),
    "no pattern": ([*LORA, "--targets", "("], "targets '(' is no pattern"),
    "no steps": ([*LORA, "--steps", "0"], "steps is 0"),
    "lr NaN": ([*LORA, "--lr", "nan"], "lr is nan: give a finite"),
    "lr negative": ([*LORA, "--lr", "-1"], "lr is -1.0: give a finite"),
    "batch 0": ([*LORA, "--batch", "0"], "batch is 0"),
    "prior 1": ([*LORA, "--prior", "1"], "prior is 1.0; give a share"),
    "prior NaN": ([*LORA, "--prior", "nan"], "prior is nan; give a share"),
    "no captions": (["lora", "--pictures", "@untold", "--to", "x.safetensors"], "has no caption"),
    "no pictures": (["lora", "--pictures", "@empty", "--to", "x.safetensors"], "holds no pictures"),
    "a broken picture": (["lora", "--pictures", "@broken", "--to", "x.safetensors"], "cannot be read as a picture"),
    "a strange table": (["lora", "--pictures", "@strange", "--to", "x.safetensors"], "metadata.jsonl, line 1,"),
    "a LoRA as .pt": ([*LORA[:-1], "x.pt"], "let it end in .safetensors"),
    "a word as .ckpt": ([*WORD[:4], "x.ckpt"], "give a name that ends in"),
    "a token that exists": ([*WORD[:-4], "--token", "cat"], "knows 'cat' already"),
    "a token with a space": ([*WORD[:-4], "--token", "my toy"], "is empty or has a space in it"),
    "a token that nobody says": ([*WORD[:-4], "--token", "<other>"], "does not say <other>"),
    "no vectors": ([*WORD, "--vectors", "0"], "has 0 tokens; 1 to 75 fit"),
    "too many vectors": ([*WORD, "--vectors", "76"], "has 76 tokens; 1 to 75 fit"),
    "like nothing": ([*WORD, "--like", ""], "the word to begin with is empty"),
    "rank below 0": ([*BOOTH, "--rank", "-1"], "rank is -1"),
    "prior below 0": ([*BOOTH, "--prior", "-1"], "prior is -1.0; give a finite number, 0 or more"),
    "no class pictures": ([*BOOTH, "--class-prompt", "a cat", "--class-pictures", "0"], "class-pictures is 0"),
}  # fmt: skip


@pytest.mark.parametrize("fault", TRAINING)
def test_training(told, fault, tmp_path_factory):
    words, sentence = TRAINING[fault]
    assert sentence in told("train", *words, "--runs", tmp_path_factory.mktemp("runs"))  # a run begins with its lock
