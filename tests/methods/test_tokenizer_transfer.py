"""Another tokenizer: what both know is carried over, the others are the means that the paper's equation gives."""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from tests.core.tiny import tiny, tokens
from tests.methods.small import transformed
from tutelage.base.errors import UserError

WORDS = 307  # of the tiny models' vocabularies


def folder_of(model, place, words):
    """A model folder with a tokenizer that knows some words, each at its place."""
    model.save_pretrained(place)
    Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0])).save(
        str(place / "tokenizer.json")
    )
    return place


def words(*, first=0):
    return [f"w{i}" for i in range(first, first + WORDS)]


def transferred(folders, out, **settings):
    return transformed(folders, out, use="init/tokenizer_transfer", **settings)


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "bert"])
def test_the_same_tokenizer_gives_the_same_model(name, tied, tmp_path):
    model = tiny(name, tied=tied).eval()
    source = folder_of(model, tmp_path / "source", words())
    helper = folder_of(tiny("llama"), tmp_path / "helper", words())
    made, method = transferred([source, helper], tmp_path / "made")
    assert method.state == {"shared": WORDS, "others": 0}
    torch.testing.assert_close(made(**tokens(name)).logits, model(**tokens(name)).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_shared_words_keep_their_rows_and_others_are_the_papers_means(tied, tmp_path):
    """The new tokenizer's words are the old one's from the 100th on, each at another place, and a hundred more."""
    model, small = tiny("llama", tied=tied).eval(), tiny("qwen2").eval()
    source = folder_of(model, tmp_path / "source", words())
    helper = folder_of(small, tmp_path / "helper", words(first=100))
    made, method = transferred([source, helper], tmp_path / "made")
    shared = WORDS - 100
    assert method.state == {"shared": shared, "others": 100}
    near = small.get_input_embeddings().weight
    for new, old in (
        (made.get_input_embeddings().weight, model.get_input_embeddings().weight),
        (made.get_output_embeddings().weight, model.get_output_embeddings().weight),
    ):
        assert new[:shared].equal(old[100:])
        for i in range(shared, WORDS):
            alike = torch.stack([torch.cosine_similarity(near[i], near[j], dim=0) for j in range(shared)])
            wanted = (alike[:, None] * old[100:]).sum(0) / alike.sum()
            torch.testing.assert_close(new[i], wanted, atol=1e-4, rtol=1e-3)
    blocks = {k: v for k, v in made.state_dict().items() if "layers" in k}
    assert blocks and all(v.equal(model.state_dict()[k]) for k, v in blocks.items())
    assert Tokenizer.from_file(str(tmp_path / "made/tokenizer.json")).get_vocab()[f"w{WORDS + 99}"] == WORDS - 1


def test_the_mean_and_random_rows_are_what_the_paper_compares_with(tmp_path):
    model = tiny("llama").eval()
    source = folder_of(model, tmp_path / "source", words())
    helper = folder_of(tiny("qwen2"), tmp_path / "helper", words(first=100))
    mean, _ = transferred([source, helper], tmp_path / "mean", others="mean")
    chance, _ = transferred([source, helper], tmp_path / "chance", others="random")
    kept = model.get_input_embeddings().weight[100:]
    for row in mean.get_input_embeddings().weight[WORDS - 100 :]:
        torch.testing.assert_close(row, kept.mean(dim=0))
    drawn = chance.get_input_embeddings().weight[WORDS - 100 :]
    assert len({tuple(row) for row in drawn.tolist()}) == 100
    torch.testing.assert_close(drawn.std(), kept.std(), atol=0.01, rtol=0.2)


def test_what_cannot_be_carried_over_is_one_line(tmp_path):
    source = folder_of(tiny("llama"), tmp_path / "source", words())
    helper = folder_of(tiny("llama"), tmp_path / "helper", words(first=1000))
    with pytest.raises(UserError, match="share no token"):
        transferred([source, helper], tmp_path / "a")
    (helper / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="no tokenizer.json"):
        transferred([source, helper], tmp_path / "b")
    with pytest.raises(UserError, match="takes 2 models"):
        transferred([source], tmp_path / "c")
