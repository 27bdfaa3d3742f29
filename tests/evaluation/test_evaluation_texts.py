"""What opens a text for a model, which every piece of it has in front."""

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from extrope_kernels.evaluation import UsageError, texts

BOS, EOS = 98, 99


@pytest.mark.parametrize(
    ("template", "opening"),
    [
        ("$A", []),
        ("<s> $A", [BOS]),
        ("<s> $A </s>", [BOS]),  # add_eos_token=True, as some save it after fine-tuning
        ("$A <s>", []),  # one token for both ends, put behind
        ("</s> <s> $A", [EOS, BOS]),
    ],
)
def test_pieces_begin_as_the_tokenizer_begins(tokenizer, text, template, opening):
    special = [("<s>", BOS), ("</s>", EOS)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=special
    )
    tokenizer.bos_token = tokenizer.convert_ids_to_tokens(BOS)
    characters = tokenizer(text.read_text(), add_special_tokens=False).input_ids
    read = texts.read_text(tokenizer, str(text))
    assert read.opening.tolist() == opening and read.ids.tolist() == characters
    piece = read.piece(20, 1, 0).tolist()
    start = "".join(map(chr, characters)).find("".join(map(chr, piece[len(opening) :])))
    assert start > 0 and piece[: len(opening)] == opening
    assert not {BOS, EOS} & {*read.ids.tolist()}


def test_a_text_counts_once(tokenizer, text, tmp_path):
    copy = tmp_path / "copy.txt"
    copy.write_text(text.read_text())
    with pytest.raises(UsageError, match=f"text {copy}: is given twice"):
        texts.read_texts(tokenizer, [str(text), str(copy)])


def test_pieces_start_wherever_they_fit():
    ids = torch.arange(12)
    for spare in range(3):
        exact = texts.Text("t", ids[:1], ids[: 9 + spare])
        pieces = [exact.piece(10, index, 0, more=4).tolist() for index in range(60)]
        starts = [piece[1] for piece in pieces]
        assert starts[0] == 0 and set(starts[1:]) == set(range(spare + 1))
        for start, piece in zip(starts, pieces):
            after = [n % (9 + spare) for n in range(start + 9, start + 13)]
            assert piece == [0, *range(start, start + 9), *after]
