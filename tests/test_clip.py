"""CLIP: equal to transformers on the same weights, layer by layer, and able to learn."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sdlearn import clip as clip_module
from sdlearn.clip import (
    CLIP,
    CLIPImageConfig,
    CLIPImageEncoder,
    CLIPTextConfig,
    CLIPTextEncoder,
    contrastive_loss,
    quick_gelu,
)

TEXT = CLIPTextConfig(vocab=100, positions=77, width=64, layers=3, heads=4)
IMAGE = CLIPImageConfig(size=32, patch=8, width=48, layers=2, heads=4)
RENAMED = {
    "token_embedding": "embeddings.token_embedding", "position_embedding": "embeddings.position_embedding",
    "layers.": "encoder.layers.", "to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj",
    "fc": "mlp.fc", "text_encoder": "text_model", "image_encoder": "vision_model", "pre_layernorm": "pre_layrnorm",
    "class_embedding": "embeddings.class_embedding", "patch_embedding": "embeddings.patch_embedding",
}  # fmt: skip


def renamed(state):
    """Our weights under the names of transformers."""
    result = {}
    for name, tensor in state.items():
        for ours, theirs in RENAMED.items():
            name = name.replace(ours, theirs)
        result[name] = tensor
    return result


def prompts(count=3, config=TEXT):
    """Rows of start, 5 to 20 words, end, and ends as padding."""
    tokens = torch.randint(config.vocab - 2, (count, config.positions))
    tokens[:, 0] = config.vocab - 2
    for row in tokens:
        row[torch.randint(6, 22, ()) :] = config.vocab - 1
    return tokens


@pytest.fixture(scope="module")
def pair():
    """The same random weights in ours and in transformers' CLIPModel."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    ours = CLIP(TEXT, IMAGE, projection=40).eval()
    reference = CLIPModel(CLIPConfig(
        text_config={"vocab_size": 100, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3,
                     "num_attention_heads": 4, "bos_token_id": 98, "eos_token_id": 99, "pad_token_id": 99},
        vision_config={"image_size": 32, "patch_size": 8, "hidden_size": 48, "intermediate_size": 192,
                       "num_hidden_layers": 2, "num_attention_heads": 4},
        projection_dim=40)).eval()  # fmt: skip
    reference.load_state_dict(renamed(ours.state_dict()))
    return ours, reference


@torch.no_grad()
def test_every_hidden_state_equals_transformers(pair):
    ours, reference = pair[0].text_encoder, pair[1].text_model
    tokens = prompts()
    output = reference(tokens, output_hidden_states=True)
    states, context = ours.hidden_states(tokens), ours(tokens)
    assert len(states) == len(output.hidden_states) == TEXT.layers + 1
    for mine, theirs in zip(states, output.hidden_states, strict=True):
        assert (mine - theirs).abs().max() <= 1e-4
    assert (context - output.last_hidden_state).abs().max() <= 1e-4
    assert (ours.pool(tokens, context) - output.pooler_output).abs().max() <= 1e-4


@torch.no_grad()
@pytest.mark.parametrize("skip", [0, 1, 2, 3])
def test_clip_skip_keeps_the_final_layer_norm(pair, skip):
    ours, reference = pair[0].text_encoder, pair[1].text_model
    tokens = prompts()
    states = reference(tokens, output_hidden_states=True).hidden_states
    assert (ours(tokens, skip=skip) - reference.final_layer_norm(states[-(skip + 1)])).abs().max() <= 1e-4


@torch.no_grad()
def test_both_towers_and_the_loss_equal_transformers(pair):
    ours, reference = pair
    tokens, image = prompts(5), torch.rand(5, 3, 32, 32) * 2 - 1
    output = reference(tokens, image, return_loss=True)
    logits = ours(tokens, image)
    assert (logits - output.logits_per_text).abs().max() <= 1e-4
    assert (contrastive_loss(logits) - output.loss).abs() <= 1e-4
    assert (ours.embed_image(image) - output.image_embeds).abs().max() <= 1e-4


@torch.no_grad()
def test_the_comparison_would_notice_another_gelu(pair, monkeypatch):
    tokens = prompts()
    expected = pair[1].text_model(tokens).last_hidden_state
    monkeypatch.setattr(clip_module, "quick_gelu", F.gelu)
    assert (pair[0].text_encoder(tokens) - expected).abs().max() > 1e-3


def test_sizes_of_vit_l_14():
    with torch.device("meta"):
        clip = CLIP(CLIPTextConfig(), CLIPImageConfig(), projection=768)
    count = [sum(p.numel() for p in part.parameters()) for part in (clip.text_encoder, clip.image_encoder, clip)]
    assert count == [123_060_480, 303_179_776, 427_616_513]
    assert len(clip.text_encoder.state_dict()) == 196


def test_quick_gelu_is_close_to_gelu_but_not_equal():
    x = torch.linspace(-6, 6, 4001)
    gap = (quick_gelu(x) - F.gelu(x)).abs().max()
    assert 0.0195 < gap < 0.0210
    assert quick_gelu(torch.tensor(1.0)).item() == pytest.approx(1 / (1 + 2.718281828**-1.702), abs=1e-6)


@torch.no_grad()
@settings(deadline=None, max_examples=20)
@given(length=st.integers(3, 30))
def test_what_follows_the_end_token_does_not_matter(length):
    encoder = CLIPTextEncoder(TEXT)
    tokens = prompts(1)
    tokens[:, 1:] = torch.randint(98, (76,))
    tokens[:, length:] = 99
    short = tokens[:, : length + 1]
    torch.testing.assert_close(
        encoder.pool(tokens, encoder(tokens)), encoder.pool(short, encoder(short)), atol=1e-5, rtol=1e-4
    )


@torch.no_grad()
def test_pool_reads_at_the_first_end_token():
    encoder = CLIPTextEncoder(TEXT)
    tokens = torch.tensor([[98, 5, 99, 99, 99], [98, 5, 6, 7, 99]])
    context = torch.arange(10.0).reshape(2, 5, 1)
    assert encoder.pool(tokens, context).flatten().tolist() == [2, 9]


@torch.no_grad()
def test_a_word_changes_nothing_before_it():
    encoder, tokens = CLIPTextEncoder(TEXT), prompts(1)
    other = tokens.clone()
    other[:, 4] = (tokens[:, 4] + 1) % 98
    apart = (encoder(tokens) - encoder(other)).abs().amax(dim=-1)[0]
    assert apart[:4].max() <= 1e-6 < 1e-3 < apart[4]


@torch.no_grad()
def test_the_same_token_at_two_places_is_two_vectors():
    first = CLIPTextEncoder(TEXT).hidden_states(torch.tensor([[5, 5]]))[0][0]
    assert not torch.allclose(first[0], first[1])


@settings(deadline=None, max_examples=30)
@given(batch=st.integers(1, 12))
def test_contrastive_loss_by_hand(batch):
    logits = 3 * torch.randn(batch, batch)
    rows, columns = logits.softmax(dim=1).diagonal(), logits.softmax(dim=0).diagonal()
    expected = -(rows.log().mean() + columns.log().mean()) / 2
    torch.testing.assert_close(contrastive_loss(logits), expected, atol=1e-5, rtol=1e-4)
    assert contrastive_loss(torch.zeros(batch, batch)).item() == pytest.approx(torch.tensor(float(batch)).log().item())
    assert contrastive_loss(100 * torch.eye(batch)) < 1e-3


@torch.no_grad()
def test_embeddings_are_unit_vectors_and_the_scale_is_bounded():
    clip = CLIP(TEXT, IMAGE, projection=40)
    tokens, image = prompts(4), torch.randn(4, 3, 32, 32)
    for vectors in (clip.embed_text(tokens), clip.embed_image(image)):
        torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(4))
    assert clip.logit_scale.exp().item() == pytest.approx(1 / 0.07)
    clip.logit_scale.fill_(20.0)
    torch.testing.assert_close(clip(tokens, image), 100 * clip.embed_text(tokens) @ clip.embed_image(image).T)


@pytest.mark.slow
def test_learns_four_pairs_by_heart():
    clip = CLIP(CLIPTextConfig(100, 16, 32, 1, 2), CLIPImageConfig(16, 8, 32, 1, 2), projection=16)
    tokens, image = torch.randint(98, (4, 16)), torch.randn(4, 3, 16, 16)
    tokens[:, 15] = 99
    optimizer = torch.optim.Adam(clip.parameters(), lr=5e-3)
    losses = []
    for _ in range(100):
        loss = contrastive_loss(clip(tokens, image))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1 and losses[-1] < 0.1
    assert all(p.grad is not None for p in clip.parameters())


def test_too_many_tokens():
    with pytest.raises(ValueError, match="78 tokens do not fit into 77 positions: truncate them"):
        CLIPTextEncoder(TEXT)(torch.zeros(1, 78, dtype=torch.long))


@pytest.mark.parametrize("skip", [-1, 4])
def test_skip_out_of_range(skip):
    with pytest.raises(ValueError, match=f"skip is {skip}: choose 0 to 3"):
        CLIPTextEncoder(TEXT)(prompts(1), skip=skip)


@pytest.mark.parametrize("shape", [(64, 64), (32, 40)])
def test_pictures_of_another_size(shape):
    with pytest.raises(ValueError, match="this tower sees 32 squared: resize it"):
        CLIPImageEncoder(IMAGE)(torch.zeros(1, 3, *shape))
