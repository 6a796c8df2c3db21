"""Words learned from pictures: their files, the table they join, what training may change. DreamBooth."""

import random
import re
from dataclasses import replace

import pytest
import torch
from PIL import Image
from random_model import random_parts
from random_model import random_vectors as vectors
from repository import ROOT
from safetensors.torch import load_file, save_file

from sdlearn.checkpoint.inspect import inspect
from sdlearn.cli import main
from sdlearn.inversion import Embedding, NewRows, WordFile, add_embedding, read_embedding, split_word, write_embedding
from sdlearn.pictures import read_parameters
from sdlearn.pipeline import StableDiffusion
from sdlearn.request import Request
from sdlearn.schedule import add_noise
from sdlearn.tiny.inversion import DreamBoothTask, InversionTask, class_pictures, latents_of
from sdlearn.tiny.lora import english, unicorn_scene
from sdlearn.tiny.own import read_folder
from sdlearn.tokenizer import Tokenizer
from sdlearn.training import Recipe, generators, train

TINY = ROOT / "checkpoints" / "tiny"
WIDTH = 32  # of the random model's words
PROMPTS = ["a <toy> above a cat", "a cat", "<TOY>", "a fox to the left of the <toy>, <toy>"]


@pytest.fixture
def sd(small_folder):
    return StableDiffusion.load(small_folder, "cpu")


@pytest.fixture
def toys():
    """Four pictures and what they show."""
    shades = (Image.new("RGB", (32, 32), (60 * i, 40, 200 - 40 * i)) for i in range(4))
    return [(picture, f"a <toy> {place} a cat") for picture, place in zip(shades, ("above", "and") * 2, strict=True)]


# --- the tokenizer
def test_a_new_word_is_one_token_or_several():
    old = random_parts()[0].networks["tokenizer"]
    one, three = old.with_word("<toy>"), old.with_word("<toy>", 3)
    n = len(old)
    assert (len(one), len(three)) == (n + 1, n + 3)
    assert one.encode("a <Toy>cat")[1:2] == [n] and three.encode("a <toy>")[1:] == [n, n + 1, n + 2]
    assert three.encode("<toy>_1") == [n + 1] and three.parts("<toy>") == ["<toy>", "<toy>_1", "<toy>_2"]
    for text in ("a cat above a yellow star", "<to> y", "cat_1", "", "a toy"):
        assert old.encode(text) == one.encode(text) == three.encode(text)
    assert three(PROMPTS).shape == (4, 77) and three.dropped("<toy> " * 25 + "cat") == "cat"
    more = three.with_word("<toys>")  # the longest is found
    assert more.encode("<toys> <toy>") == [n + 3, n, n + 1, n + 2]


def test_a_word_that_is_known_is_refused():
    tokenizer = random_parts()[0].networks["tokenizer"].with_word("<toy>", 2).with_word("style_1")
    for word in ("cat", "CAT", "<|endoftext|>", "<toy>", "<TOY>", "<toy>_1", "<toy>_7", "style", "a"):
        with pytest.raises(ValueError, match="knows .* already"):
            tokenizer.with_word(word)
    for word in ("", " ", "my cat", "\t"):
        with pytest.raises(ValueError, match="empty or has a space"):
            tokenizer.with_word(word)
    for count in (0, -1, 76):
        with pytest.raises(ValueError, match=f"has {count} tokens; 1 to 75 fit"):
            tokenizer.with_word("<new>", count)
    with pytest.raises(ValueError, match="'unicorn' already"):  # a word of CLIP's
        Tokenizer.clip().with_word("unicorn")


# --- files
FORMS = {  # what other programs write: file, how it is made, what it should be called
    "A1111": ("cat.pt", lambda x: {"string_to_token": {"*": 265}, "string_to_param": {"*": x}, "name": "n"}, "cat"),
    "A1111, a parameter": ("c.pt", lambda x: {"string_to_param": {"*": torch.nn.Parameter(x)}, "step": 3}, "c"),
    "the authors'": ("d.pt", lambda x: {"string_to_token": {"*": torch.tensor(265)},
                                        "string_to_param": {"*": x}}, "d"),
    "emb_params": ("easy.safetensors", lambda x: {"emb_params": x}, "easy"),
    "diffusers": ("learned_embeds.safetensors", lambda x: {"<cat-toy>": x}, "<cat-toy>"),
    "diffusers, old": ("learned_embeds.bin", lambda x: {"<cat-toy>": x}, "<cat-toy>"),
    "diffusers, no brackets": ("x.safetensors", lambda x: {"cat-toy": x}, "cat-toy"),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read(tmp_path, form):
    name, make, token = FORMS[form]
    for x in (vectors(1)[0], vectors(1), vectors(5), vectors(2).half()):
        (save_file if name.endswith(".safetensors") else torch.save)(make(x), tmp_path / name)
        found = read_embedding(tmp_path / name)
        assert found.token == token and torch.equal(found.vectors, x.detach().reshape(-1, WIDTH))
        assert read_embedding(tmp_path / name, "<mine>").token == "<mine>"
    if name.startswith("learned_embeds"):
        assert read_embedding(tmp_path).token == token


@pytest.mark.parametrize("name", ["x.safetensors", "x.bin", "x.pt"])
def test_what_is_written_is_read_again(tmp_path, name):
    write_embedding(tmp_path / name, Embedding("<toy>", vectors(3).requires_grad_()))
    token, found, _ = read_embedding(tmp_path / name)
    assert torch.equal(found, vectors(3)) and not found.requires_grad
    assert token == ("x" if name == "x.pt" else "<toy>")  # as A1111, which calls a word as its file


def test_a_name_without_a_form_is_refused(tmp_path):
    with pytest.raises(ValueError, match=re.escape("give a name that ends in .safetensors, .bin, .pt")):
        write_embedding(tmp_path / "x.ckpt", Embedding("<toy>", vectors(1)))
    assert not list(tmp_path.iterdir())


def test_a_file_and_its_word(tmp_path):
    (tmp_path / "a:b.pt").write_bytes(b"x")
    told = {"x.pt": ("x.pt", ""), "x.pt:<toy>": ("x.pt", "<toy>"), "a/x.pt:toy": ("a/x.pt", "toy"),
            r"C:\x.pt": (r"C:\x.pt", ""), r"C:\x.pt:toy": (r"C:\x.pt", "toy"),
            str(tmp_path / "a:b.pt"): (str(tmp_path / "a:b.pt"), "")}  # fmt: skip
    assert {text: split_word(text) for text in told} == told


# --- the model
@pytest.mark.parametrize("count", [1, 4])
def test_only_rows_are_added(small_folder, sd, count):
    before = StableDiffusion.load(small_folder, "cpu")
    add_embedding(sd, Embedding("<toy>", vectors(count)))
    for part, network in before.networks().items():
        new = sd.networks()[part].state_dict()
        for name, x in network.state_dict().items():
            assert torch.equal(new[name][: len(x)], x), name
    assert torch.equal(sd.text_encoder.token_embedding.weight[-count:], vectors(count))
    old = ["a cat above a yellow star", "", "toy"]
    assert torch.equal(sd.encode(old)["context"], before.encode(old)["context"])
    assert not torch.equal(sd.encode(["<toy>"])["context"], before.encode(["<toy>"])["context"])
    add_embedding(sd, Embedding("<other>", vectors(2)))  # and one more
    assert torch.equal(sd.text_encoder.token_embedding.weight[-2 - count :], torch.cat([vectors(count), vectors(2)]))


def test_rows_that_nobody_uses_are_not_counted(sd):
    """Some tables are longer than their vocabulary; new words follow on the vocabulary."""
    text = sd.text_encoder
    text.token_embedding = torch.nn.Embedding.from_pretrained(torch.cat([text.token_embedding.weight, vectors(5)]))
    text.config = replace(text.config, vocab=text.config.vocab + 5)
    add_embedding(sd, Embedding("<toy>", vectors(1)))
    (n,) = sd.tokenizer.encode("<toy>")
    assert torch.equal(text.token_embedding.weight[n], vectors(1)[0]) and text.config.vocab == n + 1


def test_a_refused_word_changes_nothing(sd):
    before = sd.text_encoder.token_embedding.weight, sd.text_encoder.config, sd.tokenizer
    wrong = {
        "'<toy>' have 768 numbers \\(SD 1\\), but this model's words have 32": Embedding("<toy>", vectors(2, 768)),
        "have 1024 numbers \\(SD 2\\)": Embedding("<toy>", vectors(1, 1024)),
        "have 33 numbers, but": Embedding("<toy>", vectors(1, 33)),
        "knows 'cat' already": Embedding("cat", vectors(1)),
        "has 80 tokens": Embedding("<toy>", vectors(80)),
    }
    for sentence, embedding in wrong.items():
        with pytest.raises(ValueError, match=sentence):
            add_embedding(sd, embedding)
    sd.text_encoder.half()
    with pytest.raises(ValueError, match="too large for float16"):
        add_embedding(sd, Embedding("<toy>", 1e6 * vectors(1)))
    assert sd.text_encoder.config == before[1] and sd.tokenizer is before[2]
    assert sd.text_encoder.token_embedding.weight.shape == before[0].shape


@pytest.mark.parametrize("count", [1, 3])
def test_a_saved_model_keeps_its_word(tmp_path, sd, count):
    add_embedding(sd, Embedding("<toy>", vectors(count)))
    sd.save(tmp_path / "new", torch.float32)
    again = StableDiffusion.load(tmp_path / "new", "cpu")
    assert torch.equal(again.encode(PROMPTS)["context"], sd.encode(PROMPTS)["context"])
    settings = {"steps": 2, "seed": 1, "sampler": "ddim"}
    assert again.txt2img(PROMPTS[0], **settings)[0] == sd.txt2img(PROMPTS[0], **settings)[0]
    with pytest.raises(ValueError, match="already"):
        add_embedding(again, Embedding("<toy>", vectors(1)))


def test_a_single_file_has_no_room_for_a_word(tmp_path, sd):
    add_embedding(sd, Embedding("<toy>", vectors(2)))
    for name in ("x.safetensors", "x.ckpt"):
        with pytest.raises(ValueError, match="cannot say that this model has learned the word <toy>: save it as a fo"):
            sd.save(tmp_path / name)
    assert not [*tmp_path.iterdir()]


def test_a_text_ends_where_it_did(sd):
    """The end token is no longer the last row of the table."""
    add_embedding(sd, Embedding("<toy>", vectors(2)))
    tokens = sd.tokenizer(["a <toy> above a cat", "<toy>", ""])
    ends = [(row == sd.tokenizer.eos).nonzero()[0].item() for row in tokens]
    assert ends == [len(sd.tokenizer.encode("a <toy> above a cat")) + 1, 3, 1]
    positions = torch.arange(77.0).expand(3, 77)[..., None]
    assert sd.text_encoder.pool(tokens, positions).flatten().tolist() == ends


# --- training
def test_new_rows_are_those_of_a_longer_table():
    table, rows, tokens = vectors(9), vectors(2), torch.randint(11, (3, 7))
    whole = torch.nn.Embedding.from_pretrained(torch.cat([table, rows]))
    new = NewRows(table, rows)
    assert torch.equal(new(tokens), whole(tokens)) and [*new.state_dict()] == ["rows"]
    new(tokens).sum().backward()
    assert new.rows.grad is not None and new.table.grad is None


def test_only_the_new_rows_learn(tmp_path, small_folder, sd, toys):
    kept = {f"{part}.{name}": x.clone() for part, net in sd.networks().items() for name, x in net.state_dict().items()}
    task = InversionTask(sd, toys, "<toy>", 2, "cat fox")
    begin = task.learned().vectors
    old = [sd.tokenizer.encode(word)[0] for word in ("cat", "fox")]
    assert torch.equal(begin, kept["text_encoder.token_embedding.weight"][old])
    train(task, Recipe(steps=3, batch=2, lr=0.1, warmup=1, decay=0.5, ema=0.0), tmp_path)
    learned = task.learned()
    assert learned.token == "<toy>" and (learned.vectors - begin).abs().min(dim=0).values.max() > 0.01
    now = {f"{part}.{name}": x for part, net in sd.networks().items() for name, x in net.state_dict().items()}
    table = sd.text_encoder.token_embedding.table
    assert torch.equal(table, kept.pop("text_encoder.token_embedding.weight"))
    assert all(torch.equal(now[name], x) for name, x in kept.items())
    fresh = StableDiffusion.load(small_folder, "cpu")  # and the file gives what was trained
    add_embedding(fresh, learned)
    with torch.no_grad():
        ours = task.text_encoder(task.tokenizer(PROMPTS))
    assert torch.equal(fresh.encode(PROMPTS)["context"], ours)


@pytest.mark.slow
def test_the_word_that_is_shipped_helps_on_unseen_pictures():
    """It tells the noise better than the letters do, and than no words; on backgrounds that it was not found with."""
    rng = random.Random(5)
    scenes = [unicorn_scene(rng, pair=False, shown=False) for _ in range(12)]
    told = [english(scene.sentence()) for scene in scenes]
    sd = StableDiffusion.load(TINY, "cpu")
    add_embedding(sd, read_embedding(TINY / "embeddings" / "unicorn.safetensors"))
    x0 = latents_of(sd, [(scene.image(), "") for scene in scenes])
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
    t = torch.full((len(x0),), 500)
    errors = {}
    for word in ("<unicorn>", "unicorn", ""):
        context = sd.encode([text.replace("unicorn", word) if word else "" for text in told])["context"]
        with torch.no_grad():
            answer = sd.unet(add_noise(x0, noise, sd.schedule.at(500)), t, context)
        errors[word] = (answer - noise).square().mean().item()
    assert errors["<unicorn>"] < 0.97 * min(errors["unicorn"], errors[""])


def test_a_caption_without_the_word_is_refused(sd, toys):
    with pytest.raises(ValueError, match="caption 'a cat' does not say <toy>"):
        InversionTask(sd, [*toys, (toys[0][0], "a cat")], "<toy>")
    with pytest.raises(ValueError, match="word to begin with is empty"):
        InversionTask(sd, toys, "<toy>", like=" ")


@pytest.mark.parametrize("rank", [0, 2])
def test_dreambooth_changes_the_unet_alone(tmp_path, sd, toys, rank):
    kept = {part: {n: x.clone() for n, x in net.state_dict().items()} for part, net in sd.networks().items()}
    prior = [(picture, "a cat") for picture, _ in toys]
    task = DreamBoothTask(sd, toys, prior, rank)
    train(task, Recipe(steps=2, batch=4, lr=0.01, warmup=1, ema=0.0), tmp_path)
    same = {
        part: all(torch.equal(x, kept[part][n]) for n, x in net.state_dict().items())
        for part, net in sd.networks().items()
    }
    assert same == {"text_encoder": True, "vae": True, "unet": bool(rank)}
    assert not rank or all(pair.up.abs().max() > 0 for _, pair in task.lora.items())


@pytest.mark.parametrize("batch", [8, 5])  # an odd share of a batch, too
def test_the_prior_is_a_second_half_with_a_weight(sd, toys, batch):
    half = batch // 2
    prior = [(Image.new("RGB", (32, 32), "white"), "a cat")] * 2
    tasks = {w: DreamBoothTask(sd, toys, prior, weight=w, drop=0.0) for w in (0.0, 1.0, 3.0)}
    rngs = generators(Recipe(steps=1, batch=batch), 0)
    batch = tasks[1.0].examples(rngs)
    cat = sd.tokenizer("a cat")[0]
    assert [torch.equal(row, cat) for row in batch["tokens"]] == [i >= half for i in range(len(batch["tokens"]))]
    losses = {w: {k: x.item() for k, x in task(batch).items()} for w, task in tasks.items()}
    own, both = losses[0.0]["loss"], losses[1.0]
    assert both["loss"] == pytest.approx(own + both["prior"]) and both["prior"] > 0
    assert losses[3.0]["loss"] == pytest.approx(own + 3 * both["prior"])
    first = {name: x[:half] for name, x in batch.items()}
    alone = DreamBoothTask(sd, toys, drop=0.0)
    assert alone(first)["loss"].item() == pytest.approx(own, rel=1e-5)
    assert len(alone.examples([random.Random(i) for i in range(3)])["t"]) == 3


def test_class_pictures_are_drawn_once(tmp_path, sd, monkeypatch):
    prompts = ["a cat", "a fox"]
    found = class_pictures(sd, prompts, tmp_path, 3)
    assert [caption for _, caption in found] == ["a cat", "a fox", "a cat"] == [c for _, c in read_folder(tmp_path)]
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    (tmp_path / "0001.txt").unlink()  # interrupted between picture and caption
    again = class_pictures(sd, prompts, tmp_path, 3)
    assert [x.tobytes() for x, _ in again] == [x.tobytes() for x, _ in found]
    assert {path.name for path in tmp_path.iterdir() if path.stat().st_mtime_ns != times[path.name]} == {
        "0001.png",
        "0001.txt",
    }
    monkeypatch.setattr(sd, "draw", None)  # all are there: nothing is drawn
    assert len(class_pictures(sd, prompts, tmp_path, 2)) == 2
    with pytest.raises(ValueError, match="class pictures of other prompts"):
        class_pictures(sd, ["a dog"], tmp_path, 3)


# --- the command line
def test_a_folder_of_pictures_becomes_a_word(tmp_path, small_folder, toys, capsys):
    (tmp_path / "toys").mkdir()
    for i, (picture, _) in enumerate(toys):
        picture.save(tmp_path / "toys" / f"{i}.png")
    words = f"train textual-inversion --pictures {tmp_path}/toys --to {tmp_path}/toy.safetensors --token <toy> "
    words += f"--vectors 2 --like cat --model {small_folder} --steps 2 --batch 2 --precision no --runs {tmp_path}/runs"
    assert main(words.split()) == 0
    assert "draw with --embedding" in capsys.readouterr().err
    (tensor,) = load_file(tmp_path / "toy.safetensors").items()
    assert tensor[0] == "<toy>" and tensor[1].shape == (2, WIDTH)
    (tmp_path / "toy.safetensors").unlink()
    assert main(words.split()) == 0  # its steps are done: the file is written again
    assert torch.equal(load_file(tmp_path / "toy.safetensors")["<toy>"], tensor[1])
    Image.new("RGB", (32, 32), "green").save(tmp_path / "toys" / "0.png")  # it would be told of what it never saw
    capsys.readouterr()
    assert main(words.replace("/toy.safetensors", "/new/toy.safetensors").split()) == 2
    assert "holds a run that differs in pictures: remove it" in capsys.readouterr().err
    assert not (tmp_path / "new" / "toy.safetensors").exists()
    out = tmp_path / "out"
    draw = ["--model", str(small_folder), "--steps", "1", "--seed", "1", "-o", str(out)]
    assert main(["txt2img", "a <dog>", "--embedding", f"{tmp_path}/toy.safetensors:<dog>", *draw]) == 0
    assert main(["txt2img", "a <dog>", *draw]) == 0
    with_word, without = (Image.open(out / f"txt2img-000{i}.png").tobytes() for i in (1, 2))
    assert with_word != without
    told = [read_parameters(out / f"txt2img-000{i}.png") for i in (1, 2)]  # and its own line draws it again
    assert told[0]["Embedding"] == f"{tmp_path}/toy.safetensors:<dog>" and "Embedding" not in told[1]
    assert main(["txt2img", told[0]["prompt"], "--embedding", told[0]["Embedding"], *draw]) == 0
    assert Image.open(out / "txt2img-0003.png").tobytes() == with_word


def test_a_picture_tells_of_every_word():
    words = [WordFile("a, b.pt"), WordFile("c.pt", "<c>"), WordFile("d.pt")]
    text = Request("x", seed=1, extras=words).parameters(0, 8, 8, "m")
    assert 'Embedding: "a, b.pt", Embedding 2: "c.pt:<c>", Embedding 3: d.pt' in text


def test_a_folder_of_pictures_becomes_a_model_or_a_lora(tmp_path, small_folder, toys):
    (tmp_path / "toys").mkdir()
    for i, (picture, _) in enumerate(toys):
        picture.save(tmp_path / "toys" / f"{i}.png")
    words = f"train dreambooth --pictures {tmp_path}/toys --model {small_folder} --steps 1 --batch 2 --precision no "
    words += f"--runs {tmp_path}/runs --class-pictures 2"
    how = [*words.split(), "--prompt", "a zwx cat", "--class-prompt", "a cat", "a fox"]
    assert main([*how, "--to", str(tmp_path / "new")]) == 0
    new, old = StableDiffusion.load(tmp_path / "new", "cpu"), StableDiffusion.load(small_folder, "cpu")
    assert not torch.equal(new.unet.conv_in.weight, old.unet.conv_in.weight)
    assert len(read_folder(tmp_path / "runs" / "dreambooth-new" / "class")) == 2
    assert main([*how, "--rank", "2", "--to", str(tmp_path / "small.safetensors")]) == 0
    assert inspect(tmp_path / "small.safetensors").kind == "LoRA"


FILES = {  # tensors of a file -> what --embedding says of it
    "is a word for SDXL, but this model is SD 1 or SD 2": {"clip_l": (2, 32), "clip_g": (2, 1280)},
    "has 2 vectors for SDXL's first text encoder and 3 for its second": {"clip_l": (2, 768), "clip_g": (3, 1280)},
    "a textual inversion is wanted": {"clip_l": (2, 768), "clip_g": (2, 1280), "x": (2, 3)},
    "is a LoRA, but a textual inversion is wanted": {"unet.x.lora_A.weight": (4, 3), "unet.x.lora_B.weight": (3, 4)},
    "is unknown, but a textual inversion": {"classifier.weight": (10, 3), "classifier.bias": (10,)},
    "wanted: one tensor of floats": {"<toy>": (2, 3, 4)},
    "one tensor of floats, (width,)": {"<toy>": (0, 32)},
    "have 768 numbers (SD 1), but this model's words have 32": {"emb_params": (2, 768)},
    "has 76 tokens; 1 to 75 fit into a prompt": {"<toy>": (76, 32)},
}


@pytest.mark.parametrize("sentence", FILES)
def test_other_files_are_refused(tmp_path, small_folder, capsys, sentence):
    save_file({name: torch.ones(shape) for name, shape in FILES[sentence].items()}, tmp_path / "x.safetensors")
    words = ["txt2img", "x", "--embedding", str(tmp_path / "x.safetensors"), "--model", str(small_folder)]
    assert main([*words, "-o", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1 and not list(tmp_path.glob("*.png"))


def test_damaged_words_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    for bad, sentence in ((torch.tensor([[1.0, float("nan")]]), "holds NaN"), (torch.ones(2, 3).int(), "of floats")):
        save_file({"<toy>": bad}, path)
        with pytest.raises(ValueError, match=sentence):
            read_embedding(path)
    write_embedding(path, Embedding("<toy>", vectors(2)))
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    with pytest.raises(ValueError, match="is damaged"):
        read_embedding(path)
    torch.save({"string_to_token": {"*": torch.tensor(265)}}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="a textual inversion is wanted"):
        read_embedding(tmp_path / "x.pt")
    torch.save({"string_to_param": {"*": vectors(1)}, "hook": {random.Random: 1}}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="holds more than tensors"):
        read_embedding(tmp_path / "x.pt")
    for missing in (tmp_path / "no.pt", tmp_path):
        with pytest.raises(ValueError, match="cannot be read|is a folder"):
            read_embedding(missing)


@pytest.mark.parametrize(("words", "sentence"), [
    ("textual-inversion --to x.ckpt", "x.ckpt does not say its format; give a name that ends in .safetensors, .bin"),
    ("textual-inversion --to x.pt --token cat", "the tokenizer knows 'cat' already"),
    ("textual-inversion --to x.pt --vectors 0", "the new word has 0 tokens; 1 to 75 fit"),
    ("textual-inversion --to x.pt --steps 0", "steps is 0"),
    ("textual-inversion --to x.pt --prompt dog", "the caption 'dog' does not say <unicorn>"),
    ("dreambooth --to x.pt --rank 2", "x.pt does not say its format; give a name that ends in .safetensors"),
    ("dreambooth --to new", "has no caption"),
    ("dreambooth --to new --prompt x --prior nan", "prior is nan"),
    ("dreambooth --to new --prompt x --rank -1", "rank is -1"),
    ("dreambooth --to new --prompt x --class-prompt cat --class-pictures 0", "class-pictures is 0"),
])  # fmt: skip
def test_what_cannot_be_trained(tmp_path, small_folder, toys, capsys, monkeypatch, words, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toys").mkdir()
    toys[0][0].save(tmp_path / "toys" / "0.png")
    assert main(f"train {words} --pictures toys --model {small_folder} --precision no".split()) == 2
    said = capsys.readouterr().err
    assert sentence in said.splitlines()[-1]
    assert not (tmp_path / "x.pt").exists() and not (tmp_path / "new" / "unet").exists()


def test_inspect_says_how_a_word_is_used(tmp_path):
    told = {
        32: "",
        192: "--embedding",
        768: "--embedding",
        1024: "--embedding",
        1280: "have 768, those of SD 2 1024, and those of SDXL 768 and 1280",
    }
    for width, said in told.items():
        path = tmp_path / f"x{width}.safetensors"
        write_embedding(path, Embedding("<toy>", vectors(2, width)))
        report = inspect(path)
        assert said in report.can + " ".join(report.but) and report.description.endswith("vectors: 2"), width
        assert bool(report.can) == (width in (192, 768, 1024))
    write_embedding(path := tmp_path / "xl.safetensors", Embedding("<toy>", vectors(2, 768), vectors(2, 1280)))
    report = inspect(path)
    assert report.description == "textual inversion for SDXL, vectors: 2" and not report.but
    assert report.can == f"sdlearn txt2img '... xl ...' --embedding {path} --model MODEL"
