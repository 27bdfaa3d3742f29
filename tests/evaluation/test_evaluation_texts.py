"""What opens a text for a model, which every piece of it has in front."""

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from extrope_kernels.evaluation import UsageError, texts
from extrope_kernels.evaluation.search import run as search

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
    start = read.start(20 - len(opening), 1, 0)
    assert start and piece == opening + characters[start : start + 20 - len(opening)]
    assert not {BOS, EOS} & {*read.ids.tolist()}
    assert torch.equal(torch.cat([half.ids for half in read.halves()]), read.ids)


def test_a_text_counts_once(tokenizer, text, tmp_path):
    copy = tmp_path / "copy.txt"
    copy.write_text(text.read_text())
    names = [str(text), str(copy)]
    with pytest.raises(UsageError, match=f"--text {copy}: is given twice"):
        texts.load_texts(tokenizer, names, 64)
    with pytest.raises(UsageError, match=f"--text {copy}: is given twice"):
        search.split_texts(tokenizer, names, None, 64)


def test_pieces_start_wherever_they_fit():
    ids = torch.arange(12)
    for spare in range(3):
        exact = texts.Text("t", ids[:1], ids[: 9 + spare])
        starts = {exact.start(9, index, 0) for index in range(1, 60)}
        assert starts == set(range(spare + 1)) and exact.start(9, 0, 0) == 0
        for index in range(4):
            piece, after = exact.piece(10, index, 0), exact.after(10, index, 0, 4)
            first = exact.start(9, index, 0)
            assert piece.tolist() == [0, *range(first, first + 9)]
            assert after.tolist() == [n % (9 + spare) for n in range(first + 9, first + 13)]
