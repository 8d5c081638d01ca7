"""Text of answers, against the definition: `decode(prompt + new)[len(decode(prompt)):]`."""

import random

import pytest
from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import ByteLevel

from serving.engine import TokenChunk, TokenLogprob
from serving.text.codec import Decoder
from serving.text.detokenizer import Detokenizer
from serving.text.vocabulary import Vocabulary

LOST = "\N{REPLACEMENT CHARACTER}"
PIECES = ["▁", "▁▁", "▁Lily", "▁and", "▁T", "om", ",", "é", "▁日", "本", "a", "\n", LOST]
SENTENCEPIECE = decoders.Sequence(
    [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
)
WORDS = ["the", "cat", "##s", "##ing", ".", ",", "n't", "don", "'", "日"]
KINDS = {  # tokens, those that are single bytes, and the decoder
    "sentencepiece": (PIECES, [f"<0x{byte:02X}>" for byte in range(256)], SENTENCEPIECE),
    "metaspace": (PIECES, [], decoders.Metaspace()),
    "metaspace first": (PIECES, [], decoders.Metaspace(prepend_scheme="first")),
    "byte level": (
        ["Ġthe", "Ċ", "æĹ", "¥æ", "ðŁ¦"],
        sorted(ByteLevel.alphabet()),
        decoders.ByteLevel(),
    ),
    "wordpiece": (WORDS, [], decoders.WordPiece()),
    "bpe": (["hel", "lo</w>", "the</w>", ".</w>"], [], decoders.BPEDecoder()),
    "none": (["hel", "lo", "日"], [], None),
}


def tokenizer_of(kind):
    pieces, byte_tokens, decoder = KINDS[kind]
    names = [*pieces, *byte_tokens]
    tokenizer = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, names[0]))
    if decoder is not None:
        tokenizer.decoder = decoder
    tokenizer.add_special_tokens([AddedToken("<s>"), AddedToken("<|im_end|>")])
    tokenizer.add_tokens([AddedToken("<tool_call>", normalized=False)])
    return tokenizer


def drawn(draw, kind, vocabulary, size):
    """Random tokens; where there are bytes, some are random and some whole characters."""
    pieces, byte_tokens, _ = KINDS[kind]
    first = len(pieces)
    of_byte = {vocabulary.bytes_of(first + i): first + i for i in range(len(byte_tokens))}
    others = [*range(first), *range(first + len(byte_tokens), first + len(byte_tokens) + 3)]
    tokens, byte_share = [], draw.choice([0.1, 0.5, 0.95])
    while len(tokens) < size:
        if not byte_tokens or draw.random() > byte_share:
            tokens.append(draw.choice(others))
        elif draw.random() < 0.2:
            tokens.append(draw.choice(list(of_byte.values())))
        else:
            tokens += [of_byte[bytes([byte])] for byte in draw.choice("日本é🦊a").encode()]
    return tokens[:size]


def is_taken_back(texts):
    """Whether a run of bytes that was text became none, as SentencePiece does with all of it."""
    pairs = zip(texts, texts[1:], strict=False)
    return not all(after.startswith(before.rstrip(LOST)) for before, after in pairs)


@pytest.mark.parametrize("kind", KINDS)
def test_token_by_token_as_all_at_once(kind):
    tokenizer, draw, compared = tokenizer_of(kind), random.Random(0), 0
    vocabulary = Vocabulary(tokenizer)
    for case in range(80):
        prompt = drawn(draw, kind, vocabulary, draw.choice([0, 1, 2, 7, 40]))
        new = drawn(draw, kind, vocabulary, draw.choice([1, 3, 12, 60]))
        texts = [tokenizer.decode(prompt + new[:i]) for i in range(len(new) + 1)]
        if is_taken_back(texts):
            continue  # what was told cannot be
        compared += 1
        decoder, said, count = Decoder(vocabulary, [], prompt), "", 0
        while count < len(new):
            step = draw.choice([1, 1, 1, 4])
            said += decoder.feed(TokenChunk(new[count : count + step])).text
            count += step
            assert texts[min(count, len(new))][len(texts[0]) :].startswith(said), case
        said += decoder.feed(TokenChunk([], None, "length")).text
        assert said == texts[-1][len(texts[0]) :], (case, prompt, new)
    assert compared > 30


def test_a_token_costs_the_same_however_long_the_text_is():
    class Counting(Vocabulary):
        decoded = 0

        def decode(self, tokens):
            self.decoded += len(tokens)
            return super().decode(tokens)

    for kind, name, text in (
        ("sentencepiece", "▁Lily", " Lily"),
        ("sentencepiece", "<0xFF>", LOST),
        ("byte level", "ÿ", LOST),  # the byte 0xFF
        ("metaspace", LOST, LOST),
    ):
        vocabulary, costs = Counting(tokenizer_of(kind)), []
        [token] = ids(tokenizer_of(kind), name)
        for size in (200, 400):
            before = vocabulary.decoded
            detokenizer = Detokenizer(vocabulary, [token] * 2000)
            said = "".join(detokenizer.step(token) for _ in range(size))
            assert said + detokenizer.rest() == text * size
            costs.append(vocabulary.decoded - before)
        assert costs[1] < 2.5 * costs[0]


def fed(decoder, tokens, top=()):
    """Text, logprobs and reason of tokens that come one by one, all at -1."""
    text, logprobs, reason = "", [], None
    reasons = [None] * (len(tokens) - 1) + ["length"]
    for token, ends in zip(tokens, reasons, strict=True):
        found = [TokenLogprob(-1.0, [(other, -2.0) for other in top])]
        chunk = decoder.feed(TokenChunk([token], found, ends))
        text, reason = text + chunk.text, chunk.finish_reason
        logprobs += chunk.logprobs or []
        if reason is not None:
            break
    return text, logprobs, reason


def ids(tokenizer, *names):
    return [tokenizer.token_to_id(name) for name in names]


def test_tokens_and_offsets_are_those_of_the_text():
    tokenizer = tokenizer_of("sentencepiece")
    prompt, new = ids(tokenizer, "<s>", "▁Lily"), ids(tokenizer, "▁and", "▁T", "om", "<|im_end|>")
    text, found, _ = fed(Decoder(Vocabulary(tokenizer), [], prompt), new, top=[2])
    assert text == " and Tom"
    assert [told.token.text for told in found] == [" and", " T", "om", "<|im_end|>"]
    assert [told.offset for told in found] == [0, 4, 6, 8]
    assert {told.top[0].text for told in found} == {" Lily"}
    text, found, _ = fed(Decoder(Vocabulary(tokenizer), [], prompt[:1]), new, top=[2])
    assert [told.token.text for told in found][0] == "and"  # there is no text before it
    assert [told.top[0].text for told in found][:2] == ["Lily", " Lily"]


@pytest.mark.parametrize("kind", ["sentencepiece", "byte level"])
def test_bytes_of_a_part_of_a_character_are_its_own(kind):
    tokenizer = tokenizer_of(kind)
    vocabulary = Vocabulary(tokenizer)
    first = len(KINDS[kind][0])
    of_byte = {vocabulary.bytes_of(first + i): first + i for i in range(256)}
    new = [of_byte[bytes([byte])] for byte in "a日b".encode()]
    text, found, _ = fed(Decoder(vocabulary, ["zz"], []), new)
    assert text == "a日b"
    assert bytes(byte for told in found for byte in told.token.bytes) == text.encode()
    assert found[1].token.text == "bytes:\\xe6" and len({told.token.text for told in found}) == 5
    assert [told.offset for told in found] == [0, 1, 1, 1, 2]


@pytest.mark.parametrize(
    ("stop", "text", "tokens"),
    [
        ("<|im_end|>", " Lily and", ["Lily", "and"]),
        ("and<|im_end|>", " Lily ", ["Lily", "and"]),
        ("and<|im_end|> Tom", " Lily ", ["Lily", "and"]),
        (" and Tom", " Lily", ["Lily"]),
        (" Tom", " Lily and", ["Lily", "and", "<|im_end|>"]),
        ("and<s>", " Lily and Tom Lily", None),
        ("Lily Lily", " Lily and Tom Lily", None),
    ],
)
def test_stop_strings_with_and_without_special_tokens(stop, text, tokens):
    tokenizer = tokenizer_of("sentencepiece")
    names = ["▁Lily", "▁and", "<|im_end|>", "▁T", "om", "▁Lily"]
    prompt = ids(tokenizer, "▁Lily")
    found = fed(Decoder(Vocabulary(tokenizer), [stop], prompt), ids(tokenizer, *names))
    assert found[0] == text and found[2] == ("length" if tokens is None else "stop")
    told = [told.token.text.strip() for told in found[1]]
    assert told == (tokens or ["Lily", "and", "<|im_end|>", "T", "om", "Lily"])


def test_a_special_token_that_is_looked_for_is_part_of_the_text():
    tokenizer = tokenizer_of("byte level")
    new = ids(tokenizer, "Ġthe", "<|im_end|>", "<s>", "Ġthe")
    decoder = Decoder(Vocabulary(tokenizer), [], [], ["<|im_end|>"])
    assert fed(decoder, new)[0] == " the<|im_end|> the"
